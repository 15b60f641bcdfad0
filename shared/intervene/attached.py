"""An SAE at its hook points in a model: what it reads there, and what each of its latents writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..core.errors import HookPointError, SaeError
from ..model.capture import check_splices, resolve_hook_points
from ..model.hook_points import ResolvedHookPoint, canonical_hook_point, group_name, members
from ..sae import CrossLayerTranscoder, Sae
from ..sae.selection import active_entries

_ENTRIES = 1 << 24
"""Dense latents held at a time."""


class Codes(NamedTuple):
    """The active latents of some rows, padded with zeros: their activations and numbers."""

    values: Float[Tensor, "rows m"]
    latents: Int64[Tensor, "rows m"]

    def of(self, latents: Int64[Tensor, " n"]) -> Float[Tensor, "rows n"]:
        """Return the activations of some latents."""
        return torch.stack([(self.values * (self.latents == latent)).sum(dim=1) for latent in latents], dim=1)


class LatentGroup(NamedTuple):
    """Latents that are computed together: from the hook points `reads`, with numbers from `first` on."""

    first: int
    size: int
    reads: tuple[int, ...]


class Attached:
    """An SAE, its hook points in a model, and its weights by group of latents and by hook point written to.

    All of an SAE's latents are one group, apart from those of a cross-layer transcoder, which are one a layer.
    """

    def __init__(self, name: str, sae: Sae, found: Mapping[str, ResolvedHookPoint]):
        self.name, self.sae = name, sae
        self.reads = [found[canonical_hook_point(read)] for read in _reads(name, sae)]
        self.writes = [found[canonical_hook_point(write)] for write in _writes(name, sae)]
        self.same = [point.name for point in self.reads] == [point.name for point in self.writes]
        if isinstance(sae, CrossLayerTranscoder):
            n, size, *_ = sae.sizes
            self.groups = [LatentGroup(layer * size, size, (layer,)) for layer in range(n)]
        else:
            self.groups = [LatentGroup(0, sae.d_sae, tuple(range(len(self.reads))))]

    @property
    def reads_several(self) -> bool:
        """Whether a latent depends on several hook points, so that it is known only after the last of them."""
        return any(len(group.reads) > 1 for group in self.groups)

    def encode(self, group: int, x: Float[Tensor, "rows d_in"], only: Int64[Tensor, " n"] | None = None) -> Codes:
        """Return a group's latents from the rows of what it reads, side by side; with gradients if `x` has them.

        With `only`, those latents of the group are enough; no more are computed where they do not depend on others.
        """
        if only is not None and not isinstance(self.sae, CrossLayerTranscoder) and self.sae.encodes_alone:
            return Codes(self.sae.encode_some(x, only), only.expand(len(x), -1))
        if x.requires_grad and torch.is_grad_enabled():
            latents = self._latents(group, x)
            _, chosen = active_entries(latents.detach())
            return Codes(latents.gather(1, chosen), chosen)
        step = max(1, _ENTRIES // self.groups[group].size)
        return _joined([self._sparse(group, rows) for rows in x.split(step)] or [self._sparse(group, x)])

    def _latents(self, group: int, x: Tensor) -> Tensor:
        if isinstance(self.sae, CrossLayerTranscoder):
            return self.sae.encode_layer(group, x)
        return self.sae.encode(x)

    def _sparse(self, group: int, x: Tensor) -> Codes:
        if not isinstance(self.sae, CrossLayerTranscoder):
            return Codes(*self.sae.encode_sparse(x))
        return Codes(*active_entries(self.sae.encode_layer(group, x)))

    def decoder(self, group: int, write: int) -> Float[Tensor, "d_sae d_out"] | None:
        """Return what each latent of a group writes to a hook point; None if they do not write there."""
        if isinstance(self.sae, CrossLayerTranscoder):
            return self.sae.get_parameter(f"W_dec_{group}")[:, write - group] if write >= group else None
        return self.sae.W_dec.chunk(len(self.writes), dim=1)[write]

    def bias(self, write: int) -> Float[Tensor, " d_out"]:
        """Return the decoder's bias at a hook point."""
        if isinstance(self.sae, CrossLayerTranscoder):
            return self.sae.get_parameter(f"b_dec_{write}")
        return self.sae.b_dec.chunk(len(self.writes))[write]

    def skip(self, write: int, reads: Mapping[int, Float[Tensor, "rows d"]]) -> Float[Tensor, "rows d_out"] | None:
        """Return what a skip path writes to a hook point, from the rows of what is read, or None if there is none."""
        if isinstance(self.sae, CrossLayerTranscoder):
            return self.sae.skip_layer(write, reads[write])
        if "W_skip" not in self.sae._parameters:
            return None
        x = torch.cat([reads[read] for read in sorted(reads)], dim=1)
        return x.to(self.sae.W_skip.dtype) @ self.sae.W_skip.chunk(len(self.writes), dim=0)[write].T

    def decode(self, codes: Mapping[int, Codes], write: int) -> Float[Tensor, "rows d_out"]:
        """Return what the latents of all groups read so far write to a hook point, with the bias."""
        total: Tensor | None = None
        for group, (values, latents) in codes.items():
            decoder = self.decoder(group, write)
            if decoder is not None:
                part = nn.functional.embedding_bag(latents, decoder, mode="sum", per_sample_weights=values)
                total = part if total is None else total + part
        return self.bias(write) if total is None else total + self.bias(write)

    def reconstruct(
        self, codes: Mapping[int, Codes], write: int, reads: Mapping[int, Float[Tensor, "rows d"]]
    ) -> Float[Tensor, "rows d_out"]:
        """Return `decode`, scaled back where rows were normalised, plus the skip path, if there is one."""
        x_hat, skipped = self.decode(codes, write), self.skip(write, reads)
        if self.sae.rescales_rows:
            x_hat = self.sae.rescaled(x_hat, reads[write])
        return x_hat if skipped is None else x_hat + skipped

    def scale(self, reads: Mapping[int, Float[Tensor, "rows d"]]) -> Float[Tensor, "rows 1"] | None:
        """Return by what an SAE that normalises rows multiplies what its latents write to each, or None for others."""
        statistics = self.sae.row_statistics(reads[0]) if self.sae.rescales_rows else None
        return None if statistics is None else statistics.scale

    def locate(self, latent: int) -> tuple[int, int]:
        """Return the group of a latent and its number in it."""
        size = self.groups[0].size
        return latent // size, latent % size

    def contribution(self, latent: int, write: int) -> Float[Tensor, " d_out"] | None:
        """Return one latent's decoder row for a hook point, or None if it does not write there."""
        group, number = self.locate(latent)
        decoder = self.decoder(group, write)
        return None if decoder is None else decoder[number]


def attach(model: nn.Module, saes: Mapping[str, Sae]) -> list[Attached]:
    """Find the hook points of SAEs in a model.

    Raises:
        HookPointError: the model lacks one, or nothing can be spliced in there.
        SaeError: an SAE was trained at another hook point, is of another width, or has negative latents.
    """
    if not saes:
        return []
    wanted = [name for key, sae in saes.items() for name in (*_reads(key, sae), *_writes(key, sae))]
    found = resolve_hook_points(model, wanted)
    for sae in saes.values():
        sae.check_never_negative("SaeModel")
    attached = [Attached(key, sae, found) for key, sae in saes.items()]
    for one in attached:
        _check_widths(one, type(model).__name__)
        for point in one.writes:
            check_splices(model, point)
        if isinstance(one.sae, CrossLayerTranscoder) and not one.sae.chooses_by_layer:
            raise SaeError(
                f"the transcoder '{one.name}' chooses its {one.sae.config['k']} largest latents over all layers at "
                "once, so no layer's latents are known before the last one ran; expected one that chooses per layer"
            )
    return attached


def sae_key(sae: Sae) -> str:
    """Return the name of an SAE in a model: its hook point, or those of a crosscoder joined by ` + `.

    Raises:
        SaeError: the SAE does not say where it belongs.
    """
    if not sae.hook_point:
        raise SaeError("this SAE names no hook point; give saes = {hook_point: sae}")
    return group_name(canonical_hook_point(name) for name in sae.reads)


def _reads(key: str, sae: Sae) -> Sequence[str]:
    """Return the hook points that an SAE reads under the name `key`, which must be one of them, or all joined."""
    asked = [canonical_hook_point(name) for name in members(key)]
    own = [canonical_hook_point(name) for name in sae.reads if name]
    if not own:
        if len(asked) * _width(sae) != sae.d_in:
            raise SaeError(f"the SAE at '{key}' reads {sae.d_in} channels and names no hook point")
        return asked
    if not set(asked) <= set(own):
        raise SaeError(
            f"the SAE given for '{key}' was trained at {', '.join(own)}; give it under that name, or set its "
            "hook_point if the activations are the same"
        )
    return own


def _width(sae: Sae) -> int:
    return sae.d_in // max(1, len(sae.reads))


def _writes(key: str, sae: Sae) -> Sequence[str]:
    if sae.wiring_kind == "sae":
        return _reads(key, sae)
    return [canonical_hook_point(name) for name in sae.writes]


def _check_widths(one: Attached, model: str) -> None:
    for points, width, verb in ((one.reads, one.sae.d_in, "reads"), (one.writes, one.sae.d_out, "writes")):
        have = sum(point.d_in for point in points)
        if have != width:
            names = ", ".join(f"'{point.name}' of width {point.d_in}" for point in points)
            raise SaeError(f"the SAE '{one.name}' {verb} {width} channels, but {model} has {names}; give its own model")


def _joined(parts: list[Codes]) -> Codes:
    if len(parts) == 1:
        return parts[0]
    m = max(part.values.shape[1] for part in parts)
    pad = [(0, m - part.values.shape[1]) for part in parts]
    values = [nn.functional.pad(part.values, size) for part, size in zip(parts, pad, strict=True)]
    latents = [nn.functional.pad(part.latents, size) for part, size in zip(parts, pad, strict=True)]
    return Codes(torch.cat(values), torch.cat(latents))


def check_latent(one: Attached, latent: int) -> None:
    """Raise `HookPointError` for a latent that an SAE does not have."""
    if not 0 <= latent < one.sae.d_sae:
        raise HookPointError(
            f"no latent {latent} at '{one.name}': its SAE has {one.sae.d_sae:,}, numbered from 0 to {one.sae.d_sae - 1}"
        )
