"""The Hub's errors as one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..core.errors import HubError, ThresherError, one_line
from .address import HubAddress


class _UnreachableHubError(HubError):
    """The Hub does not answer."""


def is_unreachable(error: HubError) -> bool:
    """Return whether the Hub did not answer, so that what is in the cache may serve."""
    return isinstance(error, _UnreachableHubError)


@contextmanager
def explained(address: HubAddress) -> Iterator[None]:
    """Turn errors of `huggingface_hub` into `HubError`.

    Raises:
        HubError: for each of them, with what to do.
    """
    from huggingface_hub import constants, errors

    where = f"'hf://{address.repository}'"
    try:
        yield
    except ThresherError:
        raise
    except errors.GatedRepoError:
        raise HubError(
            f"access to {where} must be granted: accept its terms on {constants.ENDPOINT}/{address.repository}, and "
            "log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"no repository {where} at {constants.ENDPOINT}, or it is private; check the name, and log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"no revision '{address.revision}' in {where}; give a branch, a tag or a commit") from None
    except errors.OfflineModeIsEnabled as error:
        raise _UnreachableHubError(one_line(error, 160)) from None
    except errors.LocalEntryNotFoundError as error:
        raise _UnreachableHubError(f"'{address}' is not in the cache, and {one_line(error, 160)}") from None
    except errors.HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else None
        if code in (401, 403):
            raise HubError(
                f"the Hub refuses access to {where}; log in with `hf auth login`, or set HF_TOKEN to a token that may "
                "read it, or write it for a push"
            ) from None
        raise HubError(f"the Hub answered {code} for '{address}': {one_line(error, 160)}") from None
    except (errors.HFValidationError, errors.EntryNotFoundError, errors.FileMetadataError) as error:
        raise HubError(f"'{address}' cannot be read from the Hub: {one_line(error, 160)}") from None
    except OSError as error:
        raise HubError(f"'{address}' could not be transferred: {one_line(error, 200)}") from None
    except Exception as error:
        # The Hub's client has been built on more than one library, whose errors share this base's name.
        if not any(base.__name__ == "TransportError" for base in type(error).__mro__):
            raise
        raise _UnreachableHubError(
            f"the Hub at {constants.ENDPOINT} cannot be reached: {one_line(error, 160)}; check the network"
        ) from None
