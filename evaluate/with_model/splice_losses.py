"""What the model loses when an SAE's reconstruction takes the place of the activation.

Cross-entropy and KL divergence from the clean model, against ablation: with the activation set to
zero, and to its mean over the training rows. Masked positions keep their activation when an SAE is
spliced in (ablation replaces them too), and no loss is counted at them. Cross-entropy counts predictions
of text by text: a prediction whose target is a masked token, such as the BOS that packing places before
the next document, is left out. SAELens counts those; the sums named `ce_saelens` do too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from ...shared.core.progress import progress as show_progress
from ...shared.model.capture import reading, splice
from ...shared.model.hook_points import ResolvedHookPoint
from ..metrics.encoding import reconstruct
from ..metrics.held_out import HeldOut
from ..saes.hook_group import joined, places
from ..saes.sae_folders import EvaluatedSae

Activation = Float[Tensor, "batch context d"]
VOCABULARY_ENTRIES = {"cpu": 1 << 21, "cuda": 1 << 27}
"""Log-probabilities held at a time. On a CPU 8 MiB in float32, which its caches serve."""


LOSSES = {"ce": "ce", "ce_saelens": "ce", "kl": "kl", "agree": "agree"}
"""The sums that are kept of each run, and the loss that each adds up; they differ in the positions they count."""


def counted(
    usable: Bool[Tensor, "batch context"], unmasked: Bool[Tensor, "batch context"] | None = None
) -> dict[str, Bool[Tensor, "batch context"]]:
    """Return the positions that each of `LOSSES` counts, from those that may be used.

    A distribution (`kl`, `agree`) counts at every position that may be used. A prediction of the next token (`ce`)
    counts where that token is not masked either, which `unmasked` says where `usable` is limited to some roles;
    `ce_saelens` counts it whatever the token.
    """
    has_next = usable.clone()
    has_next[:, -1] = False
    predicts_text = has_next.clone()
    predicts_text[:, :-1] &= (usable if unmasked is None else unmasked)[:, 1:]
    return {"ce": predicts_text, "ce_saelens": has_next, "kl": usable, "agree": usable}


class LossSums:
    """Float64 sums per document group of one run's losses, named as in `LOSSES`."""

    def __init__(self, n_groups: int, device: str = "cpu"):
        self._sums = {name: torch.zeros(n_groups, dtype=torch.float64, device=device) for name in LOSSES}

    def add(self, losses: Mapping[str, Float[Tensor, "batch context"]], count: Mapping[str, Tensor], group: Tensor):
        """Add the losses of a batch where `count` is true."""
        for name, loss in LOSSES.items():
            where = count[name]
            self._sums[name].index_add_(0, group[where], losses[loss][where].to(torch.float64))

    def sums(self, run: str) -> dict[str, Float[np.ndarray, " groups"]]:
        """Return the sums, named after the run: `ce_zero`, `kl_zero`, `agree_zero`."""
        return {f"{name}_{run}": value.cpu().numpy() for name, value in self._sums.items()}


class CleanRun:
    """The clean model's logits of a batch, with what every other run is compared to computed once."""

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
    """Return, at each position: `ce` of the next token, `kl` KL(clean || logits), and `agree` on the likeliest token.

    In float32, whatever the model's type. `ce` at a context's last position is zero: it has no next token.
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
) -> Iterator[dict[str, Activation]]:
    """Within this context, a pass of the model leaves its activations at some hook points in the dictionary."""
    seen: dict[str, Activation] = {}

    def reader(place: str) -> Callable[[Activation], None]:
        def read(activation: Activation) -> None:
            seen[place] = activation.clone()

        return read

    with ExitStack() as stack:
        for place in where:
            stack.enter_context(reading(model, hook_points[place], reader(place)))
        yield seen


def replacement(
    x_hat: Float[Tensor, "rows d"], usable: Bool[Tensor, "batch context"]
) -> Callable[[Activation], Activation]:
    """Return the replacement of the activation at every usable position by rows of a reconstruction."""

    def replace(activation: Activation) -> Activation:
        replaced = activation.clone()
        replaced[usable] = x_hat.to(activation.dtype)
        return replaced

    return replace


def run_name(sae: EvaluatedSae, place: str) -> str:
    """Return what the losses of an SAE spliced in at a place are called: its name, a crosscoder's with the place."""
    return sae.name if place == sae.target else f"{sae.name} at {place}"


def ablation(value: Float[Tensor, " d"] | float) -> Callable[[Activation], Activation]:
    """Return the replacement of every position's activation by `value`."""
    return lambda activation: torch.zeros_like(activation) + torch.as_tensor(value).to(activation)


@torch.inference_mode()
def accumulate_losses(
    model: PreTrainedModel,
    hook_points: Mapping[str, ResolvedHookPoint],
    saes: Sequence[EvaluatedSae],
    held_out: HeldOut,
    batch_size: int,
) -> dict[str, dict[str, Float[np.ndarray, " groups"]]]:
    """Run the model on the stored tokens: clean, ablated once per target, and with each SAE; return sums by SAE.

    An SAE reads the clean run. A crosscoder is spliced in at each of its hook points in turn, from the clean
    activations of all, and `run_name` says what the sums of each are called.
    """
    device = str(next(model.parameters()).device)
    inputs = list(dict.fromkeys(place for sae in saes for place in places(sae.hook_point)))
    targets = list(dict.fromkeys(place for sae in saes for place in places(sae.target)))
    means = {place: torch.from_numpy(np.asarray(held_out.store.moments(place).mean)) for place in targets}
    ablations = {("zero", place): ablation(0.0) for place in targets}
    ablations |= {("mean", place): ablation(means[place]) for place in targets}
    spliced = {run_name(sae, place): place for sae in saes for place in places(sae.target)}
    runs = [("clean", ""), *ablations, *(("sae", name) for name in spliced)]
    sums = {run: LossSums(held_out.n_groups, device) for run in runs}
    counts = {name: torch.zeros(held_out.n_groups, dtype=torch.float64, device=device) for name in LOSSES}
    total = len(held_out.contexts) * held_out.store.context_size
    with show_progress(total=total, unit="token", unit_scale=True, desc="splice") as progress:
        for cpu_tokens, part in held_out.token_batches(batch_size):
            tokens = cpu_tokens.to(device)
            usable = torch.from_numpy(held_out.usable[part]).to(device)
            group = torch.from_numpy(held_out.group[part]).to(device)
            unmasked = None if held_out.unmasked is None else torch.from_numpy(held_out.unmasked[part]).to(device)
            count = counted(usable, unmasked)
            for name, where in count.items():
                counts[name].index_add_(0, group[where], torch.ones_like(group[where], dtype=torch.float64))
            with read_at(model, hook_points, inputs) as seen:
                logits = _logits(model, tokens)
            clean = CleanRun(logits)
            sums["clean", ""].add(token_losses(logits, clean, tokens), count, group)
            for (kind, place), replace in ablations.items():
                with splice(model, hook_points[place], replace):
                    sums[kind, place].add(token_losses(_logits(model, tokens), clean, tokens), count, group)
            for sae in saes:
                x_hat = reconstruct(sae.sae, joined(seen, sae.hook_point)[usable].float())
                parts = places(sae.target)
                for place, part in zip(parts, x_hat.chunk(len(parts), dim=1), strict=True):
                    with splice(model, hook_points[place], replacement(part, usable)):
                        losses = token_losses(_logits(model, tokens), clean, tokens)
                    sums["sae", run_name(sae, place)].add(losses, count, group)
            progress.update(tokens.numel())
    n = {f"n_{name}": value.cpu().numpy() for name, value in counts.items()}
    return {
        name: n
        | sums["clean", ""].sums("clean")
        | sums["zero", place].sums("zero")
        | sums["mean", place].sums("mean")
        | sums["sae", name].sums("sae")
        for name, place in spliced.items()
    }


def _logits(model: PreTrainedModel, tokens: Int64[Tensor, "batch context"]) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def splice_metrics(sums: Mapping[str, np.ndarray]) -> dict[str, Float[np.ndarray, " resamples"]]:
    """Return the losses and scores from sums over tokens, whose first axis counts resamples (or is length one)."""
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
