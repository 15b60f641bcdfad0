"""Name the points in a transformer where activations are read.

A canonical name is `blocks.N.KIND`, with KIND one of

    resid_pre, resid_post   the residual stream before and after block N
    resid_mid               between attention and MLP (blocks that are not parallel)
    attn_out, mlp_out       what attention and MLP add to the residual stream
    mlp_in                  the MLP's input, after its norm: what a transcoder reads
    mlp_in_normalized       the same before the norm's weight and bias (TransformerLens: ln2.hook_normalized)
    mlp_branch              the stream as only the MLP's norm reads it (TransformerLens: hook_mlp_in)
    attn_z                  the heads' outputs, concatenated, before the output projection

or the path of any module, which stands for that module's output. In blocks that normalise or scale the outputs of
attention and MLP (Gemma 2 and 3, OLMo 2, GLM 4; Granite), `attn_out` and `mlp_out` are taken after that, as in
TransformerLens. In post-norm encoders (BERT), `resid_post` is the block's normalised output, and `attn_out` and
`mlp_out` are the projections before the residual is added.

Which hook points a model has is measured in the model itself (`shared/model/certificate.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..core.errors import HookPointError
from ..core.lazy import lazy_exports

if TYPE_CHECKING:
    from .probe.blocks import find_blocks as find_blocks
    from .probe.norms import Affine

__getattr__ = lazy_exports(__package__ or "", {"find_blocks": ".probe.blocks"})

KINDS = (
    "resid_pre", "resid_mid", "resid_post", "attn_out", "attn_z",
    "mlp_branch", "mlp_in_normalized", "mlp_in", "mlp_out",
)  # fmt: skip

_GROUP_SEPARATOR = " + "

_TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "attn.hook_z": "attn_z",
    "hook_mlp_in": "mlp_branch",
    "ln2.hook_normalized": "mlp_in_normalized",
    "mlp.hook_in": "mlp_in",
    "hook_mlp_out": "mlp_out",
}


@dataclass(frozen=True)
class ResolvedHookPoint:
    """Where one activation `[batch, context, d_in]` is read or replaced.

    The activation is `scale` times the module's input or output or, with `affine`, the norm's result before its weight
    and bias. `layer` is the block's index, or None for a module outside the blocks. With `clone`, the activation is
    copied when it is read, because the model later writes into it. `splice` says how to replace it: "replace" the
    argument or result, "write" into the existing tensor, or "" if neither replaces it for everything downstream.
    `identity` is the identity that was measured, and `derived` how the activation differs from the module's own.
    """

    name: str
    module_path: str
    kind: Literal["input", "output"]
    layer: int | None
    d_in: int
    scale: float = 1.0
    affine: Affine | None = None
    clone: bool = False
    splice: Literal["replace", "write", ""] = "replace"
    identity: str = ""
    derived: str = ""


def canonical_hook_point(name: str) -> str:
    """Return the canonical spelling of a hook point: `blocks.2.hook_resid_post` -> `blocks.2.resid_post`."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match is None:
        return name
    kind = _TRANSFORMER_LENS.get(match[2], match[2])
    return f"blocks.{int(match[1])}.{kind}" if kind in KINDS else name


def block_and_kind(name: str) -> tuple[int, str] | None:
    """Return the block index and kind of a canonical name, or None for a module's path."""
    match = re.fullmatch(r"blocks\.(\d+)\.(\w+)", name)
    return (int(match[1]), match[2]) if match is not None and match[2] in KINDS else None


def unique_canonical(names: Iterable[str]) -> list[str]:
    """Return the canonical names in order, without duplicates; raise `HookPointError` if there are no names."""
    canonical = list(dict.fromkeys(canonical_hook_point(name) for name in names))
    if not canonical:
        raise HookPointError("no hook points given; name at least one, such as 'blocks.0.resid_post'")
    return canonical


def group_name(hook_points: Iterable[str]) -> str:
    """Return the name of a group of hook points, such as a crosscoder's; that of a group of one is its hook point's."""
    return _GROUP_SEPARATOR.join(hook_points)


def members(group: str) -> list[str]:
    """Return the hook points of a group, from its name."""
    return group.split(_GROUP_SEPARATOR)
