"""Errors that a user can mend: one line that says what, where, and the mend; `exit_code` is what the command line ends with."""


class MegaModelError(Exception):
    """Base of this package's user errors."""

    exit_code: int = 1


class ModelError(MegaModelError):
    """The decoder cannot be built or run as asked."""


class TrainingError(MegaModelError):
    """Training cannot start or go on."""


class RefusedError(TrainingError):
    """Training cannot start as it is configured: another start would say the same."""

    exit_code = 2


class ConversionError(MegaModelError):
    """Weights cannot be expressed in, or read from, another format."""


class ParityError(ConversionError):
    """A converted model does not compute what the original computes."""

    exit_code = 3
