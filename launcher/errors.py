"""Errors that a user can mend. Each carries the exit code of the command that it ends."""

from __future__ import annotations


class ConfigError(Exception):
    """A configuration or an argument is wrong: nothing was started. `problems` holds one line for each."""

    exit_code = 2

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


class RankError(Exception):
    """A rank of a local run failed; the message names the first cause, the exit code is that rank's."""

    exit_code = 1

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RunError(Exception):
    """A run directory lacks what a verb needs, or something else is in its place."""

    exit_code = 1
