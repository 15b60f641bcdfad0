"""The transcoders of a model's MLPs, by layer: what they read, and what their latents write to which layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ...shared.core.errors import ModelError, SaeError
from ...shared.intervene.attached import Attached
from ...shared.model.capture import check_splices, resolve_hook_points
from ...shared.model.certificate import running_blocks
from ...shared.model.hook_points import ResolvedHookPoint, block_and_kind, canonical_hook_point
from ...shared.sae import CrossLayerTranscoder, Sae

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Wired:
    """Transcoders in a model: those given, and the output of every block's MLP."""

    attached: list[Attached]
    outputs: list[ResolvedHookPoint]

    def layer_of(self, one: Attached, group: int) -> int:
        """Return the layer that a group of latents reads in."""
        layer = one.reads[one.groups[group].reads[0]].layer
        assert layer is not None
        return layer

    def target_of(self, one: Attached, write: int) -> int:
        """Return the layer that a transcoder writes its `write`-th target in."""
        layer = one.writes[write].layer
        assert layer is not None
        return layer

    @property
    def replaced(self) -> list[int]:
        """The layers whose MLP has a transcoder."""
        return sorted(self.target_of(one, write) for one in self.attached for write in range(len(one.writes)))


def wire(model: PreTrainedModel, transcoders: Iterable[Sae]) -> Wired:
    """Find the hook points of transcoders, and the MLP outputs of all blocks.

    Raises:
        SaeError: one is not a transcoder of an MLP's output, two are of the same MLP, or a width does not fit.
        HookPointError: the model lacks a hook point, or an MLP's output cannot be replaced.
        ModelError: the model has no list of blocks.
    """
    blocks = running_blocks(model)
    if blocks is None:
        raise ModelError(f"{type(model).__name__} has no list of blocks; expected a transformer")
    saes = list(transcoders)
    outputs = [f"blocks.{layer}.mlp_out" for layer in range(len(blocks.modules))]
    for sae in saes:
        _check(sae, outputs)
    wanted = {canonical_hook_point(name) for sae in saes for name in sae.reads}
    found = resolve_hook_points(model, [*outputs, *sorted(wanted)])
    attached = [Attached(canonical_hook_point(sae.reads[0]), sae, found) for sae in saes]
    wired = Wired(attached, [found[name] for name in outputs])
    twice = {layer for layer in wired.replaced if wired.replaced.count(layer) > 1}
    if twice:
        raise SaeError(f"two transcoders write to blocks.{min(twice)}.mlp_out; give one for each MLP")
    for point in wired.outputs:
        check_splices(model, point)
    for one in attached:
        _check_widths(one, type(model).__name__)
    return wired


def _check(sae: Sae, outputs: list[str]) -> None:
    if sae.wiring_kind not in ("transcoder", "cross_layer"):
        raise SaeError(
            f"the {sae.architecture} SAE of '{sae.hook_point}' is no transcoder; a graph needs one for each MLP "
            "(reads blocks.N.mlp_in, writes blocks.N.mlp_out), or a cross-layer transcoder"
        )
    if sae.selection == "gated":
        raise SaeError(f"the {sae.architecture} of '{sae.hook_point}' has a gate; expected topk, jumprelu or relu")
    if sae.normalizes_rows:
        raise SaeError(
            f"the {sae.architecture} of '{sae.hook_point}' normalises each row ({sae.normalize_activations}), so its "
            "latents are not linear in what it reads; expected one that takes rows as they are"
        )
    for name in map(canonical_hook_point, sae.writes):
        if name not in outputs:
            raise SaeError(
                f"the transcoder of '{sae.hook_point}' writes '{name}'; expected an MLP's output, "
                f"from blocks.0.mlp_out to {outputs[-1]}"
            )
    for read, write in zip(map(canonical_hook_point, sae.reads), map(canonical_hook_point, sae.writes), strict=True):
        here, there = block_and_kind(read), block_and_kind(write)
        assert there is not None
        if here is None or here[0] > there[0] or here[1] in ("resid_post", "mlp_out"):
            raise SaeError(
                f"a transcoder reads '{read}' and writes '{write}'; expected a read before that MLP's output"
            )


def _check_widths(one: Attached, model: str) -> None:
    for points, width, verb in ((one.reads, one.sae.d_in, "reads"), (one.writes, one.sae.d_out, "writes")):
        have = sum(point.d_in for point in points)
        if have != width:
            raise SaeError(
                f"the transcoder of '{one.name}' {verb} {width} channels, and {model} has {have}; give its own model"
            )


def encoder_rows(one: Attached, group: int, latents: Int64[Tensor, " n"]) -> Float[Tensor, "n d_in"]:
    """Return the encoders of some latents of a group."""
    if isinstance(one.sae, CrossLayerTranscoder):
        return one.sae.get_parameter(f"W_enc_{group}")[latents]
    return one.sae.W_enc[:, latents].T


@torch.no_grad()
def encode_by_group(
    one: Attached, reads: Mapping[int, Float[Tensor, "context d_in"]], skipped: int
) -> list[tuple[Int64[Tensor, "2 n"], Float[Tensor, " n"]]]:
    """Return, for each group, the active latents' positions and numbers, and their activations.

    `reads` are the rows of each hook point read; the first `skipped` of them have no latents.
    """
    latents = one.sae.encode(torch.cat([reads[read] for read in range(len(one.reads))], dim=-1))
    latents[:skipped] = 0
    found = []
    for group in one.groups:
        part = latents[:, group.first : group.first + group.size]
        indices = part.nonzero().T
        found.append((indices, part[indices[0], indices[1]]))
    return found
