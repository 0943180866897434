"""Errors that `cluster` raises for its users. Each is one line: what, where, and the mend."""


class FabricError(Exception):
    """The fabric cannot be measured as asked, or the ranks that measure it have lost one another."""

    exit_code = 1
