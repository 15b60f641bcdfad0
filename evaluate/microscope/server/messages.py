"""What requests contain: their bodies and their query parameters, with types and bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from ....shared.core.errors import ConfigError
from ..data.latents import SortKey
from ..model.steering import LatentEditRequest, SamplingRequest

StructT = TypeVar("StructT", bound=msgspec.Struct)
_Text = Annotated[str, Meta(max_length=200_000)]
_Name = Annotated[str, Meta(max_length=500)]
_Names = Annotated[list[_Name], Meta(max_length=200)]
_Latent = Annotated[int, Meta(ge=0, lt=1 << 40)]


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Annotated[str, Meta(max_length=50)]
    content: _Text


_Prompt = _Text | Annotated[list[ChatMessage], Meta(max_length=100)]
Conversation = list[dict[str, str]]


def text_or_messages(prompt: str | list[ChatMessage]) -> tuple[str | None, Conversation | None]:
    """Return a prompt as a text, or else as plain messages."""
    if isinstance(prompt, str):
        return prompt, None
    return None, [msgspec.structs.asdict(message) for message in prompt]


class TextRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A text, or a conversation."""

    text: _Text | None = None
    messages: Annotated[list[ChatMessage], Meta(max_length=100)] | None = None

    def parts(self) -> tuple[str | None, Conversation | None]:
        """Return the text, and the messages as plain objects."""
        return self.text, None if self.messages is None else text_or_messages(self.messages)[1]


class ActivationsRequest(TextRequest, kw_only=True):
    """A text to run through SAEs (default: all), and latents to follow in it, by SAE."""

    saes: _Names | None = None
    top: Annotated[int, Meta(ge=1, le=50)] = 5
    latents: dict[str, Annotated[list[_Latent], Meta(max_length=200)]] = {}


class ContrastRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Texts or conversations of one kind and of another."""

    a: Annotated[list[_Prompt], Meta(min_length=1, max_length=32)]
    b: Annotated[list[_Prompt], Meta(min_length=1, max_length=32)]
    saes: _Names | None = None
    limit: Annotated[int, Meta(ge=1, le=200)] = 40


class SteerRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A prompt (a text or messages), edits of latents, and how to sample."""

    prompt: _Prompt
    edits: Annotated[list[LatentEditRequest], Meta(max_length=32)] = []
    sampling: SamplingRequest = msgspec.field(default_factory=SamplingRequest)


class CurveRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A prompt, one latent's edit, and the strengths to compare."""

    prompt: _Prompt
    edit: LatentEditRequest
    strengths: Annotated[list[float], Meta(min_length=1, max_length=12)]
    concept: Annotated[list[_Name], Meta(max_length=10)] = []
    random_latents: Annotated[int, Meta(ge=0, le=8)] = 2
    sampling: SamplingRequest = msgspec.field(default_factory=lambda: SamplingRequest(max_new_tokens=20))


class GraphRequest(TextRequest, kw_only=True):
    """A prompt whose next token is traced, and the transcoders to trace it through (default: all)."""

    saes: _Names | None = None


class AttributionRequest(TextRequest, kw_only=True):
    """A prompt whose next token is explained, and the SAEs to do so (default: the first at each hook point)."""

    saes: _Names | None = None


class NoteRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A latent's note; an empty one removes it."""

    sae: _Name
    latent: _Latent
    label: str = ""
    comment: str = ""
    starred: bool = False
    lists: list[str] = []


class LatentsQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which latents to list, and in which order."""

    sort: SortKey = "interestingness"
    ascending: bool = False
    limit: Annotated[int, Meta(ge=1, le=500)] = 80
    offset: Annotated[int, Meta(ge=0, lt=1 << 40)] = 0
    alive: bool = True
    min_density: float | None = None
    max_density: float | None = None
    promotes: _Name | None = None
    suppresses: _Name | None = None
    peaks: _Name | None = None
    numbers: Annotated[str, Meta(max_length=4000, pattern=r"^\d{1,12}(,\d{1,12})*$")] | None = None
    starred: bool = False
    list: _Name | None = None


class SearchQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What to search for, in which SAE (default: all)."""

    q: Annotated[str, Meta(max_length=1000)]
    sae: _Name | None = None
    limit: Annotated[int, Meta(ge=1, le=200)] = 40


class NotesQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Whose notes, and in which format."""

    sae: _Name | None = None
    format: Literal["json", "parquet"] = "json"


class NoQuery(msgspec.Struct, forbid_unknown_fields=True):
    """No parameters."""


def from_body(cls: type[StructT], body: bytes) -> StructT:
    """Return a request's body; raise `ConfigError` with what is wrong in it."""
    try:
        return msgspec.json.decode(body, type=cls)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"the request's body: {error}") from None
    except UnicodeDecodeError:
        raise ConfigError("the request's body is not UTF-8") from None


def from_query(cls: type[StructT], parameters: Mapping[str, Any]) -> StructT:
    """Return a request's query parameters, converted from text; raise `ConfigError` with what is wrong in them."""
    try:
        return msgspec.convert(dict(parameters), cls, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the request's parameters: {error}") from None
