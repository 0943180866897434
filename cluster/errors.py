"""Errors that `cluster` raises for its users. Each is one line: what, where, and the mend."""


class FabricError(Exception):
    """The fabric cannot be measured as asked, or the ranks that measure it have lost one another."""

    exit_code = 1


class NetworkError(Exception):
    """A host lacks the network that the run asks for."""

    exit_code = 3


class PreflightError(Exception):
    """Something was found before the first step that speaks against training on these hosts."""

    exit_code = 3
