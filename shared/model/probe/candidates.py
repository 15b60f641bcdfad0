"""List the modules of a block whose outputs may be what attention and MLP add; measurement decides between them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

ATTENTION = (
    "attn", "self_attn", "attention", "self_attention", "linear_attn", "temporal_block", "norm_attn_norm.attn",
    "multi_head_attention",
)  # fmt: skip
MLP = (
    "mlp", "feed_forward", "ffn", "block_sparse_moe", "mlp_block", "moe", "feedforward", "channel_mixer", "ff",
    "sparse_moe",
)  # fmt: skip
_MLP_INPUTS = (*MLP, "intermediate", "fc1")
_LAST_OF_ATTENTION = (
    "c_proj",
    "o_proj",
    "out_proj",
    "dense",
    "out_lin",
    "wo",
    "linear_out",
    "Wo",
    "attention.out_proj",
    "attn.o",
)
_LAST_OF_MLP = ("down_proj", "c_proj", "dense_4h_to_h", "fc_out", "fc2", "w2", "lin2", "dense", "out_proj", "wo", "Wo")
_LATER = ("output.dense", "fc2")
_NORMS_AFTER_ATTENTION = (
    "post_attention_layernorm",
    "post_self_attn_layernorm",
    "post_attention_norm",
    "post_attn_norm",
)
_NORMS_AFTER_MLP = (
    "post_feedforward_layernorm", "post_mlp_layernorm", "post_mlp_norm", "post_ffn_norm", "post_feedforward_norm",
)  # fmt: skip


def attention_candidates(block: nn.Module) -> list[str]:
    """Return the paths in a block whose output may be what attention adds to the stream, the most likely first."""
    names = [*ATTENTION, *_NORMS_AFTER_ATTENTION, *_inside(ATTENTION, _LAST_OF_ATTENTION), "attention.output.dense"]
    return _present(block, names)


def attention_projections(block: nn.Module) -> list[str]:
    """Return the paths in a block that may be attention's output projection."""
    return _present(block, ["attention.output.dense", *_inside(ATTENTION, _LAST_OF_ATTENTION)])


def mlp_candidates(block: nn.Module) -> list[str]:
    """Return the paths in a block whose output may be what the MLP adds to the stream, the most likely first."""
    return _present(block, [*MLP, *_NORMS_AFTER_MLP, *_inside(MLP, _LAST_OF_MLP), *_LATER])


def mlp_inputs(block: nn.Module) -> list[str]:
    """Return the paths in a block whose input may be the MLP's input."""
    return _present(block, _MLP_INPUTS)


def _inside(modules: tuple[str, ...], last: tuple[str, ...]) -> Iterator[str]:
    return (f"{module}.{name}" for module in modules for name in last)


def _present(block: nn.Module, paths: object) -> list[str]:
    modules = dict(block.named_modules(remove_duplicate=False))
    return [path for path in paths if path in modules]  # pyright: ignore[reportGeneralTypeIssues]
