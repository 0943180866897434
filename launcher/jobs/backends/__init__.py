"""Who starts the agents of a job on its hosts; each is a `launcher.jobs.backend.Backend`."""
