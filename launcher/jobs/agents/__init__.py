"""The head of a job, the agents on its hosts, and what they say to one another. Without torch."""
