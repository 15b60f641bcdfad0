"""All errors that a user can cause. They share one root, and each also derives from the builtin it resembles.

A message says what was expected, what was found, and what to do. The command line prints it as one line and exits with
code 2. Any other exception is a bug in Thresher and keeps its traceback. docs/troubleshooting.md has a section for each
class, which is named after the message where it says more.
"""

import textwrap
from typing import ClassVar

_PAGE = "docs/troubleshooting.md"


class ThresherError(Exception):
    """Root of all errors that the user can fix."""

    names_page: ClassVar[bool] = True
    """Whether the section on this class says more than a message of it."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        if self.names_page:
            self.add_note(f"see {self._section()}")  # tracebacks show it below the message

    @classmethod
    def anchor(cls) -> str:
        """Return the anchor of the section on this class in docs/troubleshooting.md; its base's if it is private."""
        return next(each.__name__ for each in cls.__mro__ if each.__name__[0] != "_").lower()

    def line(self) -> str:
        """Return the message in one line, with the section that says more."""
        message = " ".join(str(self).split())
        return f"{message} ({self._section()})" if self.names_page else message

    def _section(self) -> str:
        return f"{_PAGE}#{self.anchor()}"


class ConfigError(ThresherError, ValueError):
    """A configuration key or value is not acceptable."""

    names_page = False  # the message says which key, what was expected and what was given


class MissingFileError(ThresherError, FileNotFoundError):
    """A path that the configuration names does not exist."""


class DataError(ThresherError, ValueError):
    """A text source has no usable text."""


class HookPointError(ThresherError, LookupError):
    """A hook point does not exist in this model, store or SAE."""


class ModelError(ThresherError, ValueError):
    """A language model cannot be loaded or used as configured."""


class NonFiniteError(ThresherError, ArithmeticError):
    """A model or a training run produced NaN or infinity."""


class StoreError(ThresherError, ValueError):
    """An activation store is damaged, incomplete, or does not fit the request."""


class StoreBusyError(StoreError):
    """Another process is writing to the store."""


class OutputBusyError(ThresherError, RuntimeError):
    """Another process is writing to the output folder."""


class UnreachableError(StoreError):
    """An object store does not answer, or refuses a request."""


class HubError(ThresherError, OSError):
    """The Hugging Face Hub does not answer, refuses a request, or sent a file that does not match its checksum."""


class LlmError(ThresherError, OSError):
    """The server of a language model that explains or judges does not answer, or refuses a request."""


class RankError(ThresherError, RuntimeError):
    """Another process of the run failed, ended, cannot be reached, or was started differently."""


class DiskSpaceError(ThresherError, OSError):
    """There is too little free space on the disk."""


class OutputError(ThresherError, OSError):
    """A file or folder cannot be written."""


class SaeError(ThresherError, ValueError):
    """An SAE on disk is damaged, unsupported, or does not fit the store."""


class InterventionError(ThresherError, ValueError):
    """An edit, a metric or a text does not fit the model or the SAEs in it."""


def one_line(error: Exception, width: int = 300) -> str:
    """Return a library's error as one line, preceded by its class name if the message alone is unclear."""
    words = " ".join(str(error).split())
    if not words or not isinstance(error, (OSError, ValueError, ImportError, RuntimeError)):
        words = f"{type(error).__name__}: {words}"
    return textwrap.shorten(words, width, placeholder=" ...").rstrip(".: ")
