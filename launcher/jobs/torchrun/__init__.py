"""Ranks started by torchrun, on hosts that join a job by themselves: `mega launch --on torchrun` on each of them."""
