"""Errors that `parallel` raises for its users. Each is one line: what, where, and the mend."""


class ParallelError(Exception):
    """The ranks cannot work together as asked, or have lost one another."""

    exit_code = 1


class DeviceError(ParallelError):
    """The configuration asks for a device that this rank has not: another start would say the same."""

    exit_code = 2


class CheckpointError(Exception):
    """A checkpoint could not be written, found or read."""

    exit_code = 1


class CorruptCheckpointError(CheckpointError):
    """A checkpoint is not what its manifest says, or none of a run's checkpoints is."""

    exit_code = 3
