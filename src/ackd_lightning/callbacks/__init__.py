"""Lightning callbacks and loggers of a run; nothing here changes what is learned."""
