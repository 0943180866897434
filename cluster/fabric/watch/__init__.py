"""The watch of a run: a process beside each host's ranks that stays able to speak when they no longer can.

A thread of each rank tells the watcher of its host what the rank's collectives do (`rank_side`), the watchers tell the
one on rank 0's host, the head, and the head names who is missing, or who called what else (`head`, `hang`). None of it
uses the collective library, and a watcher imports no torch.
"""
