"""Video jobs over HTTP: what is asked for, where it is kept, and who makes it."""
