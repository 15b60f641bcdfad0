"""Every error a user can cause: one root, each also the builtin it resembles.

A message says what was expected, what came, and what to do. The command line prints it as one
line and exits with code 2; any other exception is a bug of ours and keeps its traceback.
"""

import textwrap


class ThresherError(Exception):
    """Root of all errors that the user can mend."""


class ConfigError(ThresherError, ValueError):
    """A configuration key or value is not acceptable."""


class MissingFileError(ThresherError, FileNotFoundError):
    """A path that the configuration names does not exist."""


class DataError(ThresherError, ValueError):
    """A text source gives no usable text."""


class HookPointError(ThresherError, LookupError):
    """A hook point does not exist in this model, store or SAE."""


class ModelError(ThresherError, ValueError):
    """A language model cannot be loaded or used as asked."""


class NonFiniteError(ThresherError, ArithmeticError):
    """A model or a training run produced NaN or infinity."""


class StoreError(ThresherError, ValueError):
    """An activation store is damaged, incomplete, or does not fit what is asked of it."""


class StoreBusyError(StoreError):
    """Another process is writing to the store."""


class OutputBusyError(ThresherError, RuntimeError):
    """Another process is writing to the output folder."""


class UnreachableError(StoreError):
    """An object store does not answer, or refuses what is asked of it."""


class RankError(ThresherError, RuntimeError):
    """Another of the processes that work together has failed, is gone, out of reach, or was started differently."""


class DiskSpaceError(ThresherError, OSError):
    """The disk has, or has left, too little room."""


class OutputError(ThresherError, OSError):
    """A file or folder cannot be written."""


class SaeError(ThresherError, ValueError):
    """An SAE on disk is damaged, unsupported, or does not fit the store."""


def one_line(error: Exception, width: int = 300) -> str:
    """Return a library's error in one line: its message, with the kind of error where that alone says little."""
    words = " ".join(str(error).split())
    if not words or not isinstance(error, (OSError, ValueError, ImportError, RuntimeError)):
        words = f"{type(error).__name__}: {words}"
    return textwrap.shorten(words, width, placeholder=" ...").rstrip(".: ")
