"""The language model and its tokenizer, and SAEs attached to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ....shared.core.errors import InterventionError, ModelError
from ....shared.intervene.attached import Attached, attach, sae_key
from ....shared.intervene.sae_model import SaeModel
from ....shared.intervene.texts import first_token, token_lists
from ....shared.model.language_model import load_model, load_tokenizer
from ....shared.model.loading.context_limit import context_limit
from ...features.token_text import TokenTexts
from ..data.run_folder import ModelSource
from ..data.saes import SaeShelf

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LoadedModel:
    """A model in float32, its tokenizer, and the SAEs of a run. Only the worker's thread uses it."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        shelf: SaeShelf,
        maxima: Callable[[str], Float[Tensor, " d_sae"]],
        max_tokens: int,
        bos: int | None = None,
        masked: Sequence[int] = (),
    ):
        self.model, self.tokenizer, self.shelf, self.maxima = model, tokenizer, shelf, maxima
        limit = context_limit(model)
        self.max_tokens = max_tokens if limit is None else min(limit, max_tokens)
        self._first = first_token(tokenizer) if bos is None else bos
        self._masked = {*masked, *([] if self._first is None else [self._first])}
        self._attached: dict[str, Attached] = {}

    @classmethod
    def open(
        cls,
        source: ModelSource,
        shelf: SaeShelf,
        maxima: Callable[[str], Float[Tensor, " d_sae"]],
        *,
        device: str,
        max_tokens: int,
        trust_remote_code: bool,
        eager: bool = False,
    ) -> LoadedModel:
        """Load the model, with `eager` attention if graphs are traced; raise `ModelError` if it cannot be loaded."""
        if source.name is None:
            raise ModelError(source.missing)
        model = load_model(
            source.name,
            "float32",
            device,
            source.revision,
            adapter=source.adapter,
            trust_remote_code=trust_remote_code,
            attn_implementation="eager" if eager else None,
        )
        tokenizer = source.tokenizer() if source.tokenizer is not None else None
        if tokenizer is None:
            tokenizer = load_tokenizer(source.name, source.revision, trust_remote_code=trust_remote_code)
        shelf.device = str(model.device)
        return cls(model, tokenizer, shelf, maxima, max_tokens, source.bos, source.masked)

    def tokens(self, text: str | None, messages: Sequence[Mapping[str, str]] | None = None) -> list[int]:
        """Return the token ids of a text, or of a conversation by the tokenizer's chat template.

        Raises:
            InterventionError: there is neither, or both, or it is too long, or there is no chat template.
        """
        if (text is None) == (messages is None):
            raise InterventionError("expected a text or a list of messages, and not both")
        given: Any = text
        if messages is not None:
            given = self._conversation(messages)
        (tokens,) = token_lists(given, self.tokenizer, self._first, None)
        if len(tokens) > self.max_tokens:
            raise InterventionError(
                f"the text has {len(tokens):,} tokens, more than the limit of {self.max_tokens:,}; shorten it"
            )
        return tokens

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def _conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the token ids up to where the assistant answers, or, if it has the last turn, goes on."""
        if not self.chats:
            raise InterventionError("this model's tokenizer has no chat template; give a text instead of messages")
        begun = bool(messages) and messages[-1]["role"] == "assistant"
        try:
            found: Any = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=True,
                add_generation_prompt=not begun,
                continue_final_message=begun,
                return_dict=False,
            )
        except Exception as error:  # a template may raise anything, also of jinja2
            raise InterventionError(f"the chat template refuses these messages: {error}") from None
        return [int(token) for token in found]

    def texts(self, tokens: Sequence[int]) -> list[str]:
        """Return the text of each token of a context, with whole characters."""
        return TokenTexts.of(self.tokenizer, set(tokens)).in_context(list(tokens))

    def alone(self, tokens: Sequence[int]) -> list[str]:
        """Return the text of each of some tokens by itself."""
        known = TokenTexts.of(self.tokenizer, set(tokens))
        return [known.alone(token) for token in tokens]

    def usable(self, tokens: Tensor) -> Tensor:
        """Return which tokens SAEs read: all but those that they were not trained on, such as BOS."""
        return ~torch.isin(tokens, torch.tensor(sorted(self._masked), dtype=tokens.dtype, device=tokens.device))

    def usable_first(self, tokens: Sequence[int]) -> bool:
        """Return whether SAEs read the first token of a text."""
        return self._first is None or tokens[0] != self._first

    def attached(self, name: str) -> Attached:
        """Return an SAE at its hook points in the model."""
        sae = self.shelf.get(name)
        if name not in self._attached or self._attached[name].sae is not sae:
            (self._attached[name],) = attach(self.model, {sae_key(sae): sae})
        return self._attached[name]

    def with_saes(self, names: Sequence[str]) -> tuple[SaeModel, dict[str, str]]:
        """Return the model with some SAEs in it, and the hook point of each.

        Raises:
            InterventionError: two of them are at the same hook point.
        """
        keys: dict[str, str] = {}
        for name in dict.fromkeys(names):
            key = self.attached(name).name
            if key in keys.values():
                other = next(one for one, place in keys.items() if place == key)
                raise InterventionError(f"'{other}' and '{name}' are both at '{key}'; edit latents of one of them")
            keys[name] = key
        lm = SaeModel(self.model, {key: self.shelf.get(name) for name, key in keys.items()}, self.tokenizer)
        lm.skipped = self._first
        for name, key in keys.items():
            lm.maxima[key] = self.maxima(name).to(lm.device)
        return lm, keys
