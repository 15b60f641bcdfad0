"""Run a text through the model and every SAE: the strongest latents of each token, and each latent over the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ....shared.core.errors import InterventionError
from ....shared.intervene.attached import Attached, Codes
from ....shared.model.capture import capture
from ...report.definitions import significant
from .loaded import LoadedModel
from .worker import Job

N_LATENTS = 40


class SaeActivations:
    """The latents of one SAE on one text, `[context, d_sae]` as a sparse tensor, and its error at each token.

    The error is the squared norm that the reconstruction misses, as a share of the activation's.
    """

    def __init__(self, latents: Tensor, error: Float[Tensor, " context"]):
        self.latents, self.error = latents, error

    def dense(self, latents: Sequence[int]) -> Float[Tensor, "context n"]:
        """Return the activations of some latents."""
        index, values = self.latents.indices(), self.latents.values()
        found = torch.zeros(self.latents.shape[0], len(latents))
        for column, latent in enumerate(latents):
            here = index[1] == latent
            found[index[0, here], column] = values[here].float()
        return found

    def maxima(self) -> tuple[Tensor, Tensor]:
        """Return the latents that fire, and the largest activation of each."""
        latents, place = self.latents.indices()[1].unique(return_inverse=True)
        largest = torch.zeros(len(latents)).scatter_reduce_(0, place, self.latents.values().float(), "amax")
        return latents, largest


@torch.inference_mode()
def encode_text(lm: LoadedModel, tokens: Sequence[int], names: Sequence[str], job: Job) -> dict[str, SaeActivations]:
    """Return the latents of some SAEs on a text, from one pass of the model."""
    attached = {name: lm.attached(name) for name in names}
    points = {point.name: point for one in attached.values() for point in (*one.reads, *one.writes)}
    ids = torch.tensor([list(tokens)], device=lm.model.device)
    rows = {name: values[0] for name, values in capture(lm.model, ids, points).items()}
    usable = lm.usable(ids[0])
    found = {}
    for name, one in attached.items():
        job.check()
        found[name] = _encode(one, rows, usable)
    return found


def _encode(one: Attached, rows: Mapping[str, Tensor], usable: Tensor) -> SaeActivations:
    where = usable.nonzero()[:, 0]
    device = one.sae.device
    reads = {at: rows[point.name][usable].to(device).float() for at, point in enumerate(one.reads)}
    codes: dict[int, Codes] = {}
    index, values = [], []
    for number, group in enumerate(one.groups):
        codes[number] = one.encode(number, torch.cat([reads[read] for read in group.reads], dim=1))
        row, column = (codes[number].values != 0).nonzero(as_tuple=True)
        latent = codes[number].latents[row, column] + group.first
        index.append(torch.stack([where.cpu()[row.cpu()], latent.cpu()]))
        values.append(codes[number].values[row, column].float().cpu())
    size = (len(usable), one.sae.d_sae)
    latents = torch.sparse_coo_tensor(torch.cat(index, dim=1), torch.cat(values), size, check_invariants=False)
    missed, total = torch.zeros(len(where)), torch.zeros(len(where))
    for at, point in enumerate(one.writes):
        x = rows[point.name][usable].to(device).float()
        x_hat = one.reconstruct({g: c for g, c in codes.items() if one.decoder(g, at) is not None}, at, reads)
        missed += (x - x_hat.float()).square().sum(dim=1).cpu()
        total += x.square().sum(dim=1).cpu()
    error = torch.zeros(len(usable))
    error[where.cpu()] = missed / total.clamp_min(1e-30)
    return SaeActivations(latents.coalesce(), error)


def text_activations(
    lm: LoadedModel,
    job: Job,
    tokens: Sequence[int],
    names: Sequence[str],
    top: int,
    latents: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """Return the strongest latents of each token by SAE, and the activations of each SAE's strongest latents.

    With `latents`, also the activations of these, by SAE.
    """
    found = encode_text(lm, tokens, names, job)
    said = {"tokens": [{"id": token, "text": text} for token, text in zip(tokens, lm.texts(tokens), strict=True)]}
    return said | {"saes": {name: _of_sae(one, top, latents.get(name, ())) for name, one in found.items()}}


def _of_sae(one: SaeActivations, top: int, asked: Sequence[int]) -> dict[str, Any]:
    n_latents = one.latents.shape[1]
    if asked and max(asked) >= n_latents:
        raise InterventionError(f"latent {max(asked)} was asked for, but the SAE has {n_latents:,}")
    index, values = one.latents.indices(), one.latents.values()
    per_token: list[list[dict[str, Any]]] = [[] for _ in range(one.latents.shape[0])]
    order = values.argsort(descending=True)
    for position, latent, value in zip(
        index[0, order].tolist(), index[1, order].tolist(), values[order].tolist(), strict=True
    ):
        if len(per_token[position]) < top:
            per_token[position].append({"latent": latent, "activation": significant(value, 5)})
    firing, largest = one.maxima()
    best = firing[largest.topk(min(N_LATENTS, len(largest))).indices].tolist()
    shown = list(dict.fromkeys([*asked, *best]))
    dense = one.dense(shown).T.tolist()
    rows = [
        {"latent": latent, "max": significant(max(row), 5), "activations": [significant(value, 5) for value in row]}
        for latent, row in zip(shown, dense, strict=True)
    ]
    l0 = torch.bincount(index[0], minlength=one.latents.shape[0]).tolist()
    return {
        "top": per_token,
        "latents": rows,
        "l0": l0,
        "error": [significant(value, 4) for value in one.error.tolist()],
    }


def contrast_texts(
    lm: LoadedModel, job: Job, a: Sequence[Sequence[int]], b: Sequence[Sequence[int]], names: Sequence[str], limit: int
) -> dict[str, Any]:
    """Return, by SAE, the latents that fire most on the texts of `a` and least on those of `b`: by the difference of
    their largest activations, averaged over each side's texts, as a share of the latent's maximum in the index."""
    rows: list[dict[str, Any]] = []
    sides: list[dict[str, Tensor]] = []
    for texts in (a, b):
        total: dict[str, Tensor] = {name: torch.zeros(lm.shelf.get(name).d_sae) for name in names}
        for tokens in texts:
            for name, one in encode_text(lm, tokens, names, job).items():
                latents, largest = one.maxima()
                total[name][latents] += largest / len(texts)
        sides.append(total)
    for name in names:
        first, second = sides[0][name], sides[1][name]
        known = lm.maxima(name)  # a latent that the index never saw fire has no share
        share = torch.where(known > 0, (first - second) / known.clamp_min(1e-12), 0.0)
        for latent in share.topk(min(limit, len(share))).indices.tolist():
            if share[latent] > 0:
                values = (float(first[latent]), float(second[latent]), float(share[latent]))
                kept = dict(zip(("a", "b", "difference"), (significant(value, 5) for value in values), strict=True))
                rows.append({"sae": name, "latent": latent} | kept)
    rows.sort(key=lambda row: -row["difference"])
    return {"latents": rows[:limit]}
