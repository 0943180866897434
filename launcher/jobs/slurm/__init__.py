"""All that speaks to SLURM: the batch script, the step, its commands."""
