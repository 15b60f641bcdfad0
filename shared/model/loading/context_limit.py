"""Determine how many tokens a model can read at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def context_limit(model: PreTrainedModel) -> int | None:
    """Return the largest number of tokens that the model can read at once, or None if there is no limit.

    Models of the RoBERTa family number positions from `padding_idx + 1`, so they read that many tokens fewer than their
    position table has rows.
    """
    config: Any = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    tables = (module for path, module in model.named_modules() if path.rpartition(".")[2] == "position_embeddings")
    paddings = [getattr(table, "padding_idx", None) for table in tables]
    return limit - max((padding + 1 for padding in paddings if isinstance(padding, int)), default=0)
