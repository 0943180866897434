"""The one error that a user of this package meets."""


class DataError(Exception):
    """The data cannot be used as they are. One line: what is wrong, in which file, and the mend."""

    exit_code: int = 1
