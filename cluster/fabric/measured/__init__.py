"""A real fabric, measured by ranks that talk over torch.distributed or MPI."""
