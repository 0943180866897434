"""From a configuration to a job that is under way."""
