"""Losses of the model when an SAE's reconstruction replaces the activation.

The losses are the cross-entropy and the KL divergence from the clean model. They are compared with ablation, where the
activation is set to zero or to its mean over the training rows. When an SAE is spliced in, masked positions keep their
activation; ablation replaces them too. No loss is counted at masked positions. The cross-entropy also excludes
predictions of a masked token, such as the BOS that packing puts before the next document. SAELens includes those, and
so do the sums named `ce_saelens`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from ...shared.core.terminal.progress import progress as show_progress
from ...shared.model.capture import reading, splice
from ...shared.model.hook_points import ResolvedHookPoint, members
from ...shared.sae import CrossLayerTranscoder
from ..metrics.bootstrap import point_estimates
from ..metrics.encoding import reconstruct_in_parts
from ..metrics.held_out import HeldOut
from ..saes.hook_group import concatenate
from ..saes.sae_folders import EvaluatedSae
from .cross_layer_splice import Positions, replacing_all

_Activation = Float[Tensor, "batch context d"]
VOCABULARY_ENTRIES = {"cpu": 1 << 21, "cuda": 1 << 27}
"""Log-probabilities held at a time. On a CPU this is 8 MiB in float32, which fits in its caches."""

LOSSES = {"ce": "ce", "ce_saelens": "ce", "kl": "kl", "agree": "agree"}
"""The sums kept for each run, and the loss that each one adds up. `counted` returns the positions of each."""


def counted(
    usable: Bool[np.ndarray, "batch context"], unmasked: Bool[np.ndarray, "batch context"] | None = None
) -> dict[str, Bool[np.ndarray, "batch context"]]:
    """Return the positions that each of `LOSSES` counts.

    `kl` and `agree` count every usable position. `ce` counts usable positions whose next token is not masked;
    `unmasked` gives the unmasked positions where `usable` is limited to some roles. `ce_saelens` counts every usable
    position that has a next token.
    """
    has_next = usable.copy()
    has_next[:, -1] = False
    predicts_text = has_next.copy()
    predicts_text[:, :-1] &= (usable if unmasked is None else unmasked)[:, 1:]
    return {"ce": predicts_text, "ce_saelens": has_next, "kl": usable, "agree": usable}


def positions_of(mask: Bool[np.ndarray, "batch context"], device: str) -> Positions:
    """Return the positions where a mask is true, on a device.

    They index as the mask does, but a GPU is not waited for, because their number is known.
    """
    contexts, places = np.nonzero(mask)
    return torch.from_numpy(contexts).to(device), torch.from_numpy(places).to(device)


class LossSums:
    """Float64 sums per document group of one run's losses, named as in `LOSSES`."""

    def __init__(self, n_groups: int, device: str = "cpu"):
        self._sums = {name: torch.zeros(n_groups, dtype=torch.float64, device=device) for name in LOSSES}

    def add(self, losses: Mapping[str, Float[Tensor, "batch context"]], count: Mapping[str, Positions], group: Tensor):
        """Add a batch's losses at the positions in `count`."""
        for name, loss in LOSSES.items():
            where = count[name]
            self._sums[name].index_add_(0, group[where], losses[loss][where].to(torch.float64))

    def sums(self, run: str) -> dict[str, Float[np.ndarray, " groups"]]:
        """Return the sums, named after the run: `ce_zero`, `kl_zero`, `agree_zero`."""
        return {f"{name}_{run}": value.cpu().numpy() for name, value in self._sums.items()}


class CleanRun:
    """The clean model's logits of a batch, with their log-sum-exp and argmax computed once for all comparisons."""

    def __init__(self, logits: Float[Tensor, "batch context vocabulary"]):
        self.logits = logits.flatten(0, 1)
        rows = _row_slices(self.logits)
        self.normaliser = torch.cat([self.logits[part].float().logsumexp(dim=-1, keepdim=True) for part in rows])
        self.choice = torch.cat([self.logits[part].argmax(dim=-1) for part in rows])


def _row_slices(logits: Float[Tensor, "rows vocabulary"]) -> list[slice]:
    step = max(1, VOCABULARY_ENTRIES[logits.device.type] // logits.shape[1])
    return [slice(start, start + step) for start in range(0, len(logits), step)]


def token_losses(
    logits: Float[Tensor, "batch context vocabulary"],
    clean: CleanRun,
    tokens: Int64[Tensor, "batch context"],
) -> dict[str, Float[Tensor, "batch context"]]:
    """Return the losses at each position, in float32 whatever the model's data type.

    `ce` is the cross-entropy of the next token, zero at a context's last position; `kl` is KL(clean || logits); `agree`
    is one where both runs have the same most likely token.
    """
    batch, context, vocabulary = logits.shape
    targets = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1).reshape(-1, 1)
    parts: dict[str, list[Tensor]] = {"ce": [], "kl": [], "agree": []}
    flat = logits.reshape(-1, vocabulary)
    for rows in _row_slices(flat):
        scores = flat[rows].float()
        log_probs = scores - scores.logsumexp(dim=-1, keepdim=True)
        log_clean = clean.logits[rows].float() - clean.normaliser[rows]
        parts["ce"].append(-log_probs.gather(1, targets[rows])[:, 0])
        parts["agree"].append((scores.argmax(dim=-1) == clean.choice[rows]).float())
        parts["kl"].append(log_probs.neg_().add_(log_clean).mul_(log_clean.exp_()).sum(dim=-1))
    losses = {name: torch.cat(values).reshape(batch, context) for name, values in parts.items()}
    losses["ce"][:, -1] = 0
    return losses


@contextmanager
def read_at(
    model: PreTrainedModel, hook_points: Mapping[str, ResolvedHookPoint], where: Sequence[str]
) -> Iterator[dict[str, _Activation]]:
    """Return a dictionary that a forward pass within this context fills with activations, by hook point."""
    seen: dict[str, _Activation] = {}

    def reader(name: str) -> Callable[[_Activation], None]:
        def read(activation: _Activation) -> None:
            seen[name] = activation.clone()

        return read

    with ExitStack() as stack:
        for name in where:
            stack.enter_context(reading(model, hook_points[name], reader(name)))
        yield seen


def replacement(x_hat: Float[Tensor, "rows d"], usable: Positions) -> Callable[[_Activation], _Activation]:
    """Return a function that replaces the activation at every usable position with the rows of a reconstruction."""

    def replace(activation: _Activation) -> _Activation:
        replaced = activation.clone()
        replaced[usable] = x_hat.to(activation.dtype)
        return replaced

    return replace


def run_name(sae: EvaluatedSae, hook_point: str) -> str:
    """Return the key of an SAE's losses at a hook point: its name, followed by the point for a crosscoder."""
    return sae.name if hook_point == sae.target else f"{sae.name} at {hook_point}"


def ablation(value: Float[Tensor, " d"] | float) -> Callable[[_Activation], _Activation]:
    """Return a function that replaces every position's activation with `value`."""
    return lambda activation: (
        torch.zeros_like(activation) + (value.to(activation) if isinstance(value, Tensor) else value)
    )


@torch.inference_mode()
def accumulate_losses(
    model: PreTrainedModel,
    hook_points: Mapping[str, ResolvedHookPoint],
    saes: Sequence[EvaluatedSae],
    held_out: HeldOut,
    batch_size: int,
) -> dict[str, dict[str, Float[np.ndarray, " groups"]]]:
    """Run the model on the stored tokens: clean, ablated once per target, and with each SAE.

    SAEs read the clean run's activations. A crosscoder is spliced in at each of its hook points in turn. A cross-layer
    transcoder replaces all its targets in one run, in which each layer reads the modified model's activations; it is
    compared with a run that ablates all of them. Returns the sums of the losses per document group, keyed by
    `run_name`.
    """
    device = str(next(model.parameters()).device)
    inputs = list(dict.fromkeys(name for sae in saes for name in members(sae.hook_point)))
    targets = list(dict.fromkeys(name for sae in saes for name in sae.spliced_at))
    points = list(dict.fromkeys(point for target in targets for point in members(target)))
    zeros = {point: ablation(0.0) for point in points}
    mean_of = {point: torch.from_numpy(np.asarray(held_out.store.moments(point).mean)) for point in points}
    means = {point: ablation(mean.to(device)) for point, mean in mean_of.items()}
    ablations = {("zero", target): zeros for target in targets} | {("mean", target): means for target in targets}
    spliced = {run_name(sae, target): target for sae in saes for target in sae.spliced_at}
    runs = [("clean", ""), *ablations, *(("sae", name) for name in spliced)]
    sums = {run: LossSums(held_out.n_groups, device) for run in runs}
    counts = {name: torch.zeros(held_out.n_groups, dtype=torch.float64, device=device) for name in LOSSES}
    total = len(held_out.contexts) * held_out.store.context_size
    with show_progress(total=total, unit="token", unit_scale=True, desc="splice") as progress:
        for cpu_tokens, part in held_out.token_batches(batch_size):
            tokens = cpu_tokens.to(device)
            group = torch.from_numpy(held_out.group[part]).to(device)
            masks = counted(held_out.usable[part], None if held_out.unmasked is None else held_out.unmasked[part])
            count = {name: positions_of(mask, device) for name, mask in masks.items()}
            usable = count["kl"]
            for name, where in count.items():
                counts[name].index_add_(0, group[where], torch.ones_like(group[where], dtype=torch.float64))
            with read_at(model, hook_points, inputs) as seen:
                logits = _logits(model, tokens)
            clean = CleanRun(logits)
            sums["clean", ""].add(token_losses(logits, clean, tokens), count, group)
            for (kind, target), replace in ablations.items():
                with ExitStack() as stack:
                    for point in members(target):
                        stack.enter_context(splice(model, hook_points[point], replace[point]))
                    sums[kind, target].add(token_losses(_logits(model, tokens), clean, tokens), count, group)
            for sae in saes:
                if isinstance(sae.sae, CrossLayerTranscoder):
                    for target in sae.spliced_at:
                        with replacing_all(model, hook_points, sae.sae, usable):
                            losses = token_losses(_logits(model, tokens), clean, tokens)
                        sums["sae", run_name(sae, target)].add(losses, count, group)
                    continue
                x_hat = reconstruct_in_parts(sae.sae, concatenate(seen, sae.hook_point)[usable].float())
                for target, rows in zip(sae.spliced_at, x_hat.chunk(len(sae.spliced_at), dim=1), strict=True):
                    with splice(model, hook_points[target], replacement(rows, usable)):
                        losses = token_losses(_logits(model, tokens), clean, tokens)
                    sums["sae", run_name(sae, target)].add(losses, count, group)
            progress.update(tokens.numel())
    n = {f"n_{name}": value.cpu().numpy() for name, value in counts.items()}
    return {
        name: n
        | sums["clean", ""].sums("clean")
        | sums["zero", target].sums("zero")
        | sums["mean", target].sums("mean")
        | sums["sae", name].sums("sae")
        for name, target in spliced.items()
    }


def _logits(model: PreTrainedModel, tokens: Int64[Tensor, "batch context"]) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def splice_metrics(sums: Mapping[str, np.ndarray]) -> dict[str, Float[np.ndarray, " resamples"]]:
    """Return the losses and scores from sums over tokens; the first axis is the resamples, or has length one."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ce = {run: sums[f"ce_{run}"] / sums["n_ce"] for run in ("clean", "zero", "mean", "sae")}
        saelens = {run: sums[f"ce_saelens_{run}"] / sums["n_ce_saelens"] for run in ("clean", "zero", "sae")}
        kl = {run: sums[f"kl_{run}"] / sums["n_kl"] for run in ("zero", "mean", "sae")}
        scores = {
            "ce_loss_score": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"]),
            "kl_div_score": (kl["zero"] - kl["sae"]) / kl["zero"],
            "ce_loss_score_mean_ablation": (ce["mean"] - ce["sae"]) / (ce["mean"] - ce["clean"]),
            "kl_div_score_mean_ablation": (kl["mean"] - kl["sae"]) / kl["mean"],
        }
        saelens_score = (saelens["zero"] - saelens["sae"]) / (saelens["zero"] - saelens["clean"])
    agreement = {
        f"top1_agreement_{run}" if run != "sae" else "top1_agreement": sums[f"agree_{run}"] / sums["n_kl"]
        for run in ("zero", "mean", "sae")
    }
    losses = {f"ce_{run}": value for run, value in ce.items()} | {f"kl_{run}": value for run, value in kl.items()}
    losses |= {"ce_loss_score_saelens": saelens_score} | {f"ce_{run}_saelens": ce for run, ce in saelens.items()}
    return scores | losses | agreement


def per_hook_losses(sae: EvaluatedSae, losses: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Return a crosscoder's losses, with its reconstruction spliced in at one hook point at a time; otherwise {}."""
    targets = sae.spliced_at
    if len(targets) == 1:
        return {}
    runs = {target: losses[run_name(sae, target)] for target in targets}
    rows = [{"hook_point": target} | point_estimates(splice_metrics, sums) for target, sums in runs.items()]
    return {"per_hook": rows}
