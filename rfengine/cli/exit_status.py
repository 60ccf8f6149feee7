"""The exit statuses of commands and scripts."""

CALLER_ERROR, OTHER_ERROR, INTERRUPTED = 2, 1, 130
CLOSED_PIPE = 141  # as a shell tells of a program that the signal of a closed pipe ended
