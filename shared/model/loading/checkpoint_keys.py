"""Check that a checkpoint's weights are those of the model that was built for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ...core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A pooler is computed from the last hidden states, and nothing that is harvested depends on it.
_UNUSED = re.compile(r"(^|\.)pooler\.")

# What checkpoints carry beside the weights: causal masks, position numbers and rotary frequencies that are computed
# now, and heads on top of the hidden states other than the one that predicts tokens.
_LEFT_OVER = re.compile(
    r"(^|\.)(masked_bias|causal_mask|position_ids|inv_freq|(cos|sin)_cached|num_batches_tracked|version)$"
    r"|(^|\.)(attn|attention|self_attn)\.bias$"
    r"|(^|\.)(pooler|mtp|mtp_layers|score|classifier|qa_outputs|v_head|value_head|reward_head)\."
)
_N_NAMED = 3


def check_checkpoint_keys(model: PreTrainedModel, info: Mapping[str, Iterable[Any]], name: str, partial: bool) -> None:
    """Raise `ModelError` where weights are missing, of another shape, or have no place in the model.

    Args:
        model: the model as transformers loaded it.
        info: the `output_loading_info` of `from_pretrained(..., ignore_mismatched_sizes=True)`.
        name: the checkpoint, for the message.
        partial: the model is part of the checkpoint's, such as an encoder without its head: what lies wholly outside
            its modules is then left out.
    """
    missing = sorted(key for key in info["missing_keys"] if not _UNUSED.search(key))
    shapes = sorted(f"{key} ({list(found)}, expected {list(built)})" for key, found, built in info["mismatched_keys"])
    unexpected = []
    if getattr(model, "hf_quantizer", None) is None:  # quantised weights come with scales of their own
        unexpected = sorted(key for key in info["unexpected_keys"] if not _is_left_over(model, key, partial))
    faults = [
        _told(shapes, "of another shape than config.json says"),
        _told(missing, "missing"),
        _told(unexpected, "without a place in the model"),
    ]
    if any(faults):
        raise ModelError(
            f"the weights of '{name}' do not fit {type(model).__name__}: {'; '.join(filter(None, faults))}. "
            "Give the config.json and the weights of one model, as its save_pretrained wrote them"
        )


def _is_left_over(model: PreTrainedModel, key: str, partial: bool) -> bool:
    if _LEFT_OVER.search(key):
        return True
    if not partial:
        return False
    modules = dict(model.named_children()) | dict(model.base_model.named_children())
    first = key.removeprefix(f"{model.base_model_prefix}.").split(".")[0]
    return first not in modules or bool(re.search(r"(^|\.)lm_head\.", key))


def _told(keys: list[str], what: str) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - _N_NAMED} more" if len(keys) > _N_NAMED else ""
    return f"{len(keys)} {what}: {', '.join(keys[:_N_NAMED])}{more}"
