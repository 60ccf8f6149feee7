"""The exit statuses of commands and scripts."""

CALLER_ERROR, OTHER_ERROR, INTERRUPTED = 2, 1, 130
CLOSED_PIPE = 141  # what a shell reports for a program that SIGPIPE ended
