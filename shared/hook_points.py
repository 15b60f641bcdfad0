"""Name the places in a transformer where activations are read, and find their modules.

A canonical name is `blocks.N.KIND`, with KIND one of

    resid_pre, resid_post   the residual stream before and after block N
    resid_mid               between attention and MLP (blocks that are not parallel)
    attn_out, mlp_out       what attention and MLP add to the residual stream
    mlp_in                  the MLP's input, after its norm: what a transcoder reads
    attn_z                  the heads' outputs side by side, before the output projection

or any module's path, which means that module's output. In blocks that normalise what a part
adds (Gemma 2 and 3, OLMo 2, GLM 4), `attn_out` and `mlp_out` are taken after that norm, as in
TransformerLens. In post-norm encoders (BERT) `resid_post` is the block's normalised output, and
`attn_out` and `mlp_out` are the projections before the residual is added.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .errors import HookPointError

if TYPE_CHECKING:
    from torch import nn

KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "attn_z", "mlp_in", "mlp_out")

_TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_in": "resid_mid",  # TransformerLens reads it before the norm
    "hook_mlp_out": "mlp_out",
    "attn.hook_z": "attn_z",
    "ln2.hook_normalized": "mlp_in",
}

_ATTENTION = ("attn", "self_attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_OUT_PROJECTION = ("c_proj", "o_proj", "out_proj", "dense", "out_lin", "wo")

# For each kind, (side, paths inside the block): the first path that exists is taken. A path with a
# condition "a & b" needs b too, which tells one family's use of a name from another's.
_INSIDE: dict[str, tuple[Literal["input", "output"], tuple[str, ...]]] = {
    "attn_out": (
        "output",
        (
            "post_attention_layernorm & post_feedforward_layernorm",
            "post_self_attn_layernorm & post_mlp_layernorm",
            "attention.output.dense",
            *_ATTENTION,
        ),
    ),
    "attn_z": (
        "input",
        ("attention.output.dense", *(f"{a}.{p}" for a in _ATTENTION for p in _OUT_PROJECTION)),
    ),
    "resid_mid": (
        "input",
        (
            "pre_feedforward_layernorm",
            "post_attention_layernorm & input_layernorm",
            "ln_2",
            "ffn_norm",
            "mlp & post_feedforward_layernorm",  # OLMo 2: the MLP reads the stream itself
        ),
    ),
    "mlp_in": ("input", (*_MLP, "intermediate")),
    "mlp_out": (
        "output",
        ("post_feedforward_layernorm", "post_mlp_layernorm", *_MLP, "output.dense"),
    ),
}


@dataclass(frozen=True)
class ResolvedHookPoint:
    """Where one activation `[batch, context, d_in]` is read or replaced.

    `layer` is the block's index, or None for a module outside the blocks.
    """

    name: str
    module_path: str
    kind: Literal["input", "output"]
    layer: int | None
    d_in: int


def canonical_hook_point(name: str) -> str:
    """Return our spelling of a hook point: `blocks.2.hook_resid_post` -> `blocks.2.resid_post`."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match is None or match[2] not in _TRANSFORMER_LENS:
        return name
    return f"blocks.{int(match[1])}.{_TRANSFORMER_LENS[match[2]]}"


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Return the path of the model's list of blocks, and the list, or None when there is none.

    It is the first `ModuleList` of as many modules as the configuration has layers.
    """
    import torch.nn as nn

    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    n_layers = getattr(config, "num_hidden_layers", None)
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    lists = [(path, module) for path, module in lists if len(module)]
    for path, module in lists:
        if len(module) == n_layers:
            return path, module
    return max(lists, key=lambda item: len(item[1]), default=None)


def block_hook_point(model: nn.Module, layer: int, kind: str) -> tuple[str, Literal["input", "output"]] | None:
    """Return the module path and side of `blocks.{layer}.{kind}`, or None where the block has no such place."""
    found = find_blocks(model)
    if found is None or layer >= len(found[1]):
        return None
    path, blocks = found
    block, block_path = blocks[layer], f"{path}.{layer}"
    if kind in ("resid_pre", "resid_post"):
        return block_path, "input" if kind == "resid_pre" else "output"
    if kind not in _INSIDE:
        return None
    if kind == "resid_mid" and getattr(block, "use_parallel_residual", False):
        return None
    side, candidates = _INSIDE[kind]
    for candidate in candidates:
        wanted, _, condition = candidate.partition(" & ")
        if _submodule(block, wanted) is not None and (not condition or _submodule(block, condition) is not None):
            return f"{block_path}.{wanted}", side
    return None


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    for part in path.split("."):
        module = getattr(module, part, None)  # pyright: ignore[reportAssignmentType]
        if module is None:
            return None
    return module


def locate(model: nn.Module, name: str) -> tuple[str, Literal["input", "output"], int | None]:
    """Return the module path, side and layer of a canonical hook point, or raise `HookPointError`."""
    match = re.fullmatch(r"blocks\.(\d+)\.(\w+)", name)
    if match is not None:
        place = block_hook_point(model, int(match[1]), match[2])
        if place is not None:
            return *place, int(match[1])
    modules = dict(model.named_modules())
    base = getattr(model, "base_model_prefix", "")
    for path in (name, f"{base}.{name}"):
        if path and path in modules:
            return path, "output", _layer_of(model, path)
    raise HookPointError(_unknown(model, name))


def _layer_of(model: nn.Module, path: str) -> int | None:
    found = find_blocks(model)
    match = re.match(rf"{re.escape(found[0])}\.(\d+)(\.|$)", path) if found else None
    return int(match[1]) if match else None


def hook_point_kinds(model: nn.Module) -> Iterator[str]:
    """Yield the kinds of hook point that the model's blocks have."""
    for kind in KINDS:
        if block_hook_point(model, 0, kind) is not None:
            yield kind


def _unknown(model: nn.Module, name: str) -> str:
    found = find_blocks(model)
    kinds = ", ".join(hook_point_kinds(model))
    here = f"blocks.N.KIND with N from 0 to {len(found[1]) - 1} and KIND one of {kinds}; or " if found and kinds else ""
    some = f"{found[0]}.0" if found else next((path for path, _ in model.named_modules() if path), "")
    return f"no hook point '{name}' in {type(model).__name__}; it has {here}any module path such as '{some}'"


def unique_canonical(names: Iterable[str]) -> list[str]:
    """Return the canonical names in order, each once; raise `HookPointError` when there are none."""
    canonical = list(dict.fromkeys(canonical_hook_point(name) for name in names))
    if not canonical:
        raise HookPointError("no hook points given; name at least one, such as 'blocks.0.resid_post'")
    return canonical
