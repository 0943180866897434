"""The command line, the whole run's configuration, and the processes it becomes."""
