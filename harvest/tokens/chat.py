"""Render conversations with a chat template, and find the role of each rendered character.

A template is a program: it may strip contents, merge the system message into the user's, drop earlier reasoning or
start with a BOS. Searching for a message's characters would therefore be unreliable. Instead, the conversation is
rendered a second time with every character of the contents replaced by a unique private-use character, except white
space and text that looks like a tag, which templates test for. The replacements show where each character ends up, and
everything else must be equal in both renderings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int8, UInt32

from ...shared.core.errors import ConfigError, DataError, ModelError
from ...shared.store.format.roles import ASSISTANT, MARKER, OTHER, SYSTEM, TOOL, USER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLE_OF = {
    "system": SYSTEM,
    "developer": SYSTEM,
    "user": USER,
    "assistant": ASSISTANT,
    "model": ASSISTANT,
    "tool": TOOL,
    "function": TOOL,
    "ipython": TOOL,
}
CONTENT_KEYS = ("content", "reasoning_content", "reasoning", "thinking")
_DATE = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri"}
"""A fixed date for templates that print today's, so that a resumed harvest renders the same: Llama 3's default."""

_KEPT = re.compile(r"</?[\w|./-]{1,40}>|<\|[^<>|]{1,40}\|>|\[/?[A-Z_]{2,30}\]|[\"\\]|\s+")
_TAGS = np.concatenate([np.arange(0xF0000, 0xFFFFE), np.arange(0x100000, 0x10FFFE)]).astype(np.uint32)
"""The characters of the two supplementary private-use planes."""


class Leaf(NamedTuple):
    """One text of a message, its location (`part` is None unless contents are a list), and its role."""

    message: int
    key: str
    part: int | None
    text: str
    role: int


class ChatTemplate:
    """A tokenizer's chat template, or another one, given as text, as a file or by its name in the tokenizer.

    Raises:
        ModelError: the tokenizer has no template.
        ConfigError: there is no such file or template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
        self._tokenizer = tokenizer
        own = getattr(tokenizer, "chat_template", None)
        if template is not None:
            self.source = own[template] if isinstance(own, dict) and template in own else template_source(template)
            if self.source == template and "{" not in template:
                names = f", or one of {', '.join(own)}" if isinstance(own, dict) else ""
                raise ConfigError(f"no chat_template at '{template}'; give a file or the text of a template{names}")
        elif own is None:
            raise ModelError(
                f"the tokenizer '{tokenizer.name_or_path}' has no chat template to render messages with; set "
                "chat_template to a file of one, or text_column to a column of text"
            )
        else:
            try:
                self.source = tokenizer.get_chat_template()
            except ValueError:
                raise ConfigError(
                    f"expected chat_template to be one of {', '.join(own)}, the templates of the tokenizer; got none"
                ) from None

        self._dated = _date_macro() + self.source if "strftime_now" in self.source else self.source

    def render(self, messages: list[dict[str, Any]], document: str) -> str:
        """Return a conversation as text; raise `DataError` if the template rejects it."""
        try:
            rendered = self._tokenizer.apply_chat_template(messages, chat_template=self._dated, tokenize=False)
        except Exception as error:  # a template is a program: whatever it does wrong
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"the chat template refuses the messages of document '{document}': {reason}; change them, or set "
                "chat_template"
            ) from None
        return str(rendered)

    def character_roles(
        self, messages: list[dict[str, Any]], rendered: str, document: str
    ) -> Int8[np.ndarray, " characters"]:
        """Return the role of every character of a rendered conversation.

        Raises:
            DataError: the template changes contents in a way that cannot be followed.
        """
        leaves = list(leaves_of(messages))
        tags = Tags.of(leaves)
        shadow = self.render(_replaced(messages, dict(zip(leaves, tags.texts, strict=True))), document)
        real, other = _code_points(rendered), _code_points(shadow)
        if len(real) != len(other):
            raise _unclear(document)
        source = tags.follow(other)
        positions = np.flatnonzero(source >= 0)
        source_of_position = source[positions]
        unchanged = np.array_equal(real[source < 0], other[source < 0])
        if not unchanged or not np.array_equal(real[positions], tags.character[source_of_position]):
            raise _unclear(document)
        roles = np.full(len(real), MARKER, dtype=np.int8)
        for number, leaf in enumerate(leaves):
            mine = tags.leaf[source_of_position] == number
            if mine.any():
                within = tags.offset[source_of_position[mine]]
                for start, stop in self._gaps(messages, leaf, positions[mine], within, rendered, document):
                    roles[start:stop] = leaf.role
                roles[positions[mine]] = leaf.role
        return roles

    def _gaps(
        self,
        messages: list[dict[str, Any]],
        leaf: Leaf,
        positions: Int[np.ndarray, " n"],
        within: Int[np.ndarray, " n"],
        rendered: str,
        document: str,
    ) -> Iterator[tuple[int, int]]:
        """Yield the ranges of the rendering that belong to a text besides its tagged characters (at `positions`)."""
        text, step = leaf.text, np.diff(positions)
        for gap in np.flatnonzero((step > 1) & (step <= np.diff(within))).tolist():
            start, stop = int(positions[gap]) + 1, int(positions[gap + 1])
            if _is_within(rendered[start:stop], text[within[gap] + 1 : within[gap + 1]]):
                yield start, stop
        # What lies before the first and behind the last tagged character: tags, and beyond them white space.
        first, last = len(text) - len(text.lstrip()), len(text.rstrip())
        start, stop = int(positions[0]), int(positions[-1]) + 1
        before, after = text[first : within[0]], text[within[-1] + 1 : last]
        same = _common_prefix(before[::-1], rendered[max(0, start - len(before)) : start][::-1])[::-1]
        if same == before and first:
            yield start - len(same) - self._lost(messages, leaf, text[first:], rendered, document), start
        yield start - len(same if same == before else same.lstrip()), start
        same = _common_prefix(after, rendered[stop : stop + len(after)])
        if same == after and last < len(text):
            yield stop, stop + len(same) + self._lost(messages, leaf, text[:last], rendered, document)
        yield stop, stop + len(same if same == after else same.rstrip())

    def _lost(self, messages: list[dict[str, Any]], leaf: Leaf, text: str, rendered: str, document: str) -> int:
        """Return how much shorter the rendering becomes if the leaf has this text, stripped at one end."""
        lost = len(rendered) - len(self.render(_replaced(messages, {leaf: text}), document))
        if not 0 <= lost <= len(leaf.text) - len(text):
            raise _unclear(document)
        return lost


def template_source(template: str) -> str:
    """Return a template's text, reading it if a file is given; return anything else, such as a name, unchanged."""
    if "{{" in template or "{%" in template:
        return template
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"cannot read chat_template '{template}': it is not UTF-8 text") from None
    except OSError:
        return template


def _date_macro() -> str:
    """Return a macro that replaces the templates' date function."""
    replaced = "".join(f".replace('{code}', '{value}')" for code, value in _DATE.items())
    return "{%- macro strftime_now(format) -%}{{ format" + replaced + " }}{%- endmacro +%}"


def given_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages without null keys, which tables add if other rows have a value there."""
    return [
        {key: value for key, value in message.items() if value is not None or key == "content"} for message in messages
    ]


def check_contents(messages: list[dict[str, Any]], document: str) -> None:
    """Raise `DataError` unless every message's content is text, null, or a list of text parts.

    Templates print other contents as Python literals, drop them, or insert a placeholder for an image that the model
    does not get.
    """
    for message in messages:
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        wrong = [content] if not isinstance(content, list) else [part for part in content if not _is_text(part)]
        if wrong or not content:
            kind = wrong[0].get("type") if wrong and isinstance(wrong[0], dict) else None
            got = f"a part of type '{kind}'" if kind else f"{wrong[0] if wrong else content!r}"[:60]
            raise DataError(
                f"a message of document '{document}' has content that is not text: expected text, null or a list of "
                f'{{"type": "text", "text": ...}}, got {got}; leave it out'
            )


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text"


def leaves_of(messages: list[dict[str, Any]]) -> Iterator[Leaf]:
    """Yield the texts of messages: contents or their text parts, and reasoning."""
    for number, message in enumerate(messages):
        role = ROLE_OF.get(str(message.get("role")), OTHER)
        for key in CONTENT_KEYS:
            value = message.get(key)
            if isinstance(value, str):
                yield Leaf(number, key, None, value, role)
            elif isinstance(value, list):
                for part, entry in enumerate(value):
                    if isinstance(entry, dict) and isinstance(entry.get("text"), str):
                        yield Leaf(number, key, part, entry["text"], role)


class Tags(NamedTuple):
    """Texts with characters replaced by tags; for each tag its leaf, the offset in it, and the code point."""

    texts: list[str]
    leaf: Int[np.ndarray, " tagged"]
    offset: Int[np.ndarray, " tagged"]
    character: Int[np.ndarray, " tagged"]

    @classmethod
    def of(cls, leaves: list[Leaf]) -> Tags:
        """Tag every character that templates do not test for; in a text without such, all but white space."""
        texts, n = [], 0
        none = np.zeros(0, dtype=np.int64)
        numbers, positions, characters = [none], [none], [none]
        for number, leaf in enumerate(leaves):
            codes = _code_points(leaf.text)
            may_change = np.ones(len(codes), dtype=bool)
            for match in _KEPT.finditer(leaf.text):
                may_change[slice(*match.span())] = False
            if not may_change.any():
                may_change = np.array([not character.isspace() for character in leaf.text], dtype=bool)
            changed = np.flatnonzero(may_change)
            tagged = codes.copy()
            tagged[changed] = _TAGS[np.arange(n, n + len(changed)) % len(_TAGS)]
            texts.append(tagged.tobytes().decode("utf-32-le", "surrogatepass"))
            numbers.append(np.full(len(changed), number))
            positions.append(changed)
            characters.append(codes[changed].astype(np.int64))
            n += len(changed)
        return cls(texts, np.concatenate(numbers), np.concatenate(positions), np.concatenate(characters))

    def follow(self, shadow: UInt32[np.ndarray, " characters"]) -> Int[np.ndarray, " characters"]:
        """Return the number of the tag at each character of the second rendering; -1 for other characters.

        Tags repeat in a conversation of more than 131,068 characters; then the one nearest to the last tag is taken.
        """
        index = np.searchsorted(_TAGS, shadow).clip(max=len(_TAGS) - 1)
        source = np.where(_TAGS[index] == shadow, index, -1)
        if len(self.leaf) > len(_TAGS):
            last = 0
            for at in np.flatnonzero(source >= 0).tolist():
                last = int(source[at]) + round((last - int(source[at])) / len(_TAGS)) * len(_TAGS)
                source[at] = last
        source[source >= len(self.leaf)] = -1
        return source


def _replaced(messages: list[dict[str, Any]], texts: Mapping[Leaf, str]) -> list[dict[str, Any]]:
    """Return a copy of messages with some texts replaced."""
    copies = [dict(message) for message in messages]
    for leaf, text in texts.items():
        message = copies[leaf.message]
        if leaf.part is None:
            message[leaf.key] = text
        else:
            parts = message[leaf.key] = list(message[leaf.key])
            parts[leaf.part] = parts[leaf.part] | {"text": text}
    return copies


def _common_prefix(first: str, second: str) -> str:
    return "".join(mine for mine, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _is_within(text: str, other: str) -> bool:
    """Return whether a text is a subsequence of another."""
    if text == other:
        return True
    rest = iter(other)
    return all(character in rest for character in text)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _unclear(document: str) -> DataError:
    return DataError(
        f"the chat template changes the messages of document '{document}' in a way that does not show which rows are "
        'whose; render them yourself and harvest the text with special_tokens = "tokens"'
    )
