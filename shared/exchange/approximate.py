"""Replace thresholds by the k largest latents or the reverse, and measure what that loses on rows of a store."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import HookPointError, SaeError
from ..sae import Sae
from ..sae.formats import SaeParts
from ..sae.formats.folding import as_jumprelu, split_signs
from ..sae.formats.kinds import REFINED_SELECTIONS, Kind, find_kind
from ..store import ActivationStore

_ROWS_AT_A_TIME = 1024


def approximated(sae: Sae, store: str, n_rows: int) -> tuple[Sae, str]:
    """Return the SAE with its latents chosen the other way, and in words what that changes.

    k is the mean number of latents that fire; a threshold for all latents is the value above which as many fire as
    before, as for BatchTopK (arXiv 2412.06410).

    Raises:
        HookPointError: the store lacks what the SAE reads or writes.
        SaeError: no approximation of this kind is known, or the store has no rows.
    """
    kind = find_kind(sae.architecture) if sae.wiring_kind != "cross_layer" else None
    if kind is None or kind.wiring == "crosscoder" or kind.is_tied or kind.selection in REFINED_SELECTIONS:
        raise SaeError(
            f"no approximation of a {sae.architecture} is known; expected an autoencoder or transcoder whose latents "
            "are chosen at once"
        )
    sae = _of(split_signs(sae.parts()))
    kind = find_kind(sae.architecture)
    x, y = _rows(sae, store, n_rows)
    before = _measured(sae, x, y)
    other = _with_threshold(sae, kind, x) if kind.selection == "topk" else _with_k(sae, kind, before[1])
    after = _measured(other, x, y)
    how = f"k = {other.config['k']}" if other.selection == "topk" else f"threshold {float(other.threshold[0]):.4g}"
    return other, (
        f"approximated with {how}: explained variance {before[0]:.4f} before, {after[0]:.4f} after; L0 {before[1]:.1f} "
        f"before, {after[1]:.1f} after, on {len(x):,} held-out rows of '{store}'"
    )


def _rows(sae: Sae, location: str, n_rows: int) -> tuple[Float[Tensor, "rows d_in"], Float[Tensor, "rows d_out"]]:
    """Return held-out rows that are not masked, or any where the store holds none out, of what is read and written."""
    store = ActivationStore.open(location)
    ends = (*sae.reads, *sae.writes)
    for name in ends:
        if name not in store.hook_points:
            raise HookPointError(
                f"the SAE's hook point '{name}' is not in the store, expected one of: {', '.join(store.hook_points)}"
            )
    size = store.context_size
    held = store.held_out_contexts().nonzero()[0]
    contexts = held if len(held) else range(store.n_contexts)
    taken: list[list[Tensor]] = [[], []]
    n = 0
    for context in contexts:
        start, stop = int(context) * size, (int(context) + 1) * size
        usable = torch.from_numpy(store.row_mask(start, stop))
        for rows, name in zip(taken, (sae.reads[0], sae.writes[0]), strict=True):
            rows.append(store.read(name, start, stop)[usable].float())
        n += int(usable.sum())
        if n >= n_rows:
            break
    if n < 2:
        raise SaeError(f"the store '{location}' has {n} usable rows, expected at least 2 to measure the loss on")
    x, y = (torch.cat(rows)[:n_rows] for rows in taken)
    if x.shape[1] != sae.d_in or y.shape[1] != sae.d_out:
        raise SaeError(f"the SAE reads rows of {sae.d_in} channels, and the store has {x.shape[1]} there")
    return x, y


@torch.no_grad()
def _measured(sae: Sae, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the explained variance, `1 - |y - y_hat|^2 / |y - mean y|^2` over all rows, and the mean L0."""
    error, n_active = 0.0, 0
    for rows, target in zip(x.split(_ROWS_AT_A_TIME), y.split(_ROWS_AT_A_TIME), strict=True):
        latents = sae.encode(rows)
        n_active += int((latents > 0).sum())
        y_hat, skipped = sae.decode(latents, rows), sae.skip_path(rows)
        y_hat = y_hat if skipped is None else y_hat + skipped
        error += float((target - y_hat).double().square().sum())
    y = y.double()
    variance = float((y - y.mean(0)).square().sum())
    return 1 - error / variance if variance else float("nan"), n_active / len(x)


def _with_k(sae: Sae, kind: Kind, l0: float) -> Sae:
    parts = as_jumprelu(sae.parts(), "this format")
    tensors = {name: tensor for name, tensor in parts.tensors.items() if name != "threshold"}
    name = Kind("topk", kind.wiring, kind.skip).name
    config = parts.config | {"k": max(1, min(sae.d_sae, round(l0)))}
    return _of(replace(parts, architecture=name, tensors=tensors, config=config))


@torch.no_grad()
def _with_threshold(sae: Sae, kind: Kind, x: Tensor) -> Sae:
    k = int(sae.config["k"])
    blocks = x.split(_ROWS_AT_A_TIME)
    largest = torch.cat([sae.pre_activations(rows).relu().topk(k).values for rows in blocks])
    # As many pre-activations of all rows are to fire as fire now. The threshold is found by halving an interval, and
    # then put between two values, so that rounding moves none across it.
    wanted, low, high = int((largest > 0).sum()), 0.0, float(largest.max())
    for _ in range(30):
        middle = (low + high) / 2
        n = sum(int((sae.pre_activations(rows) > middle).sum()) for rows in blocks)
        low, high = (middle, high) if n > wanted else (low, middle)
    above = [pre_acts[pre_acts > high] for pre_acts in map(sae.pre_activations, blocks)]
    nearest = min((float(values.min()) for values in above if len(values)), default=high)
    threshold = (high + nearest) / 2
    parts = sae.parts()
    tensors = dict(parts.tensors) | {"threshold": torch.full((sae.d_sae,), threshold)}
    config = {key: value for key, value in parts.config.items() if key != "k"}
    name = Kind("jumprelu", kind.wiring, kind.skip).name
    return _of(replace(parts, architecture=name, tensors=tensors, config=config))


def _of(parts: SaeParts) -> Sae:
    return Sae(
        parts.architecture, parts.tensors, hook_point=parts.hook_point, config=parts.config, metadata=parts.metadata
    )
