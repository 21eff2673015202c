"""The errors a user can cause.

Each is one sentence that says what is wrong, where, and what to do about it. The command line
prints the sentence and exits with code 2; from Python it is an ordinary exception. Anything that
is not a ``HalfbyteError`` is a defect of halfbyte and keeps its traceback.
"""

from typing import Any

from halfbyte.redaction import redact


class HalfbyteError(Exception):
    """Something the user can mend; ``str(error)`` is the one sentence to show, without secrets."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*(redact(arg) if isinstance(arg, str) else arg for arg in args))


class RecipeError(HalfbyteError):
    """The recipe, or an override of it, is wrong."""


class DataError(HalfbyteError):
    """A data file, a column or a row is wrong."""


class ModelError(HalfbyteError):
    """A model, a tokenizer or an adapter cannot be read or does not fit."""


class RunError(HalfbyteError):
    """A run folder cannot be written, read or continued."""


class DivergenceError(RunError):
    """The loss or the weights of a run are no longer finite numbers."""


class DeviceError(HalfbyteError):
    """What the recipe states cannot be done on this machine."""


def gave_up(error: BaseException) -> bool:
    """Whether a library written in Rust gave up, as ``tokenizers`` does on some files.

    It raises what is no Exception, under a name that cannot be imported.
    """
    return type(error).__name__ == "PanicException"
