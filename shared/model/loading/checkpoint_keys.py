"""Check that a checkpoint's weights match the model that was built from its configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ...core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A pooler reads the last hidden states, and no harvested activation depends on it.
_UNUSED = re.compile(r"(^|\.)pooler\.")

# Keys of checkpoints that the model does not use: causal masks, position numbers and rotary frequencies, which it
# computes, and heads other than the one that predicts tokens.
_IGNORED = re.compile(
    r"(^|\.)(masked_bias|causal_mask|position_ids|inv_freq|(cos|sin)_cached|num_batches_tracked|version)$"
    r"|(^|\.)(attn|attention|self_attn)\.bias$"
    r"|(^|\.)(pooler|mtp|mtp_layers|score|classifier|qa_outputs|v_head|value_head|reward_head)\."
)
_MAX_LISTED = 3


def check_checkpoint_keys(model: PreTrainedModel, info: Mapping[str, Iterable[Any]], name: str, partial: bool) -> None:
    """Raise `ModelError` if weights are missing, have another shape, or do not exist in the model.

    Args:
        model: the model as transformers loaded it.
        info: the `output_loading_info` of `from_pretrained(..., ignore_mismatched_sizes=True)`.
        name: the checkpoint, for the message.
        partial: the model is a part of the checkpoint's model, such as an encoder without its head; weights that are
            entirely outside its modules are ignored.
    """
    missing = sorted(key for key in info["missing_keys"] if not _UNUSED.search(key))
    shapes = sorted(f"{key} ({list(found)}, expected {list(built)})" for key, found, built in info["mismatched_keys"])
    unexpected = []
    if getattr(model, "hf_quantizer", None) is None:  # quantised weights come with additional scales
        unexpected = sorted(key for key in info["unexpected_keys"] if not _is_ignored(model, key, partial))
    faults = [
        _list_keys(shapes, "with another shape than config.json specifies"),
        _list_keys(missing, "missing"),
        _list_keys(unexpected, "not in the model"),
    ]
    if any(faults):
        raise ModelError(
            f"the weights of '{name}' do not fit {type(model).__name__}: {'; '.join(filter(None, faults))}. "
            "Give the config.json and the weights of the same model, as save_pretrained wrote them"
        )


def _is_ignored(model: PreTrainedModel, key: str, partial: bool) -> bool:
    if _IGNORED.search(key):
        return True
    if not partial:
        return False
    modules = dict(model.named_children()) | dict(model.base_model.named_children())
    first = key.removeprefix(f"{model.base_model_prefix}.").split(".")[0]
    return first not in modules or bool(re.search(r"(^|\.)lm_head\.", key))


def _list_keys(keys: list[str], what: str) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
    return f"{len(keys)} {what}: {', '.join(keys[:_MAX_LISTED])}{more}"
