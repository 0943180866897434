"""A job: one run on several hosts, started, watched and started again by a supervisor. See docs/launching.md."""
