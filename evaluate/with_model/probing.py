"""k-sparse probing without labelled data: can a few latents predict the next token?

A task is to decide whether the next token is one particular frequent token. Its rows are balanced between yes and no,
and no document has rows in both the training and the test split. A logistic regression is fitted on the k latents
whose class means differ most, as in SAEBench (arXiv 2503.09532; k-sparse probing is from 2305.01610). The baseline is
the same regression on the activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ...shared.core.errors import StoreError
from ...shared.core.terminal.progress import progress
from ...shared.model.hook_points import members
from ..config import EvaluateConfig
from ..metrics.bootstrap import Sums, confidence_intervals, point_estimates
from ..metrics.encoding import encode
from ..metrics.held_out import HeldOut
from ..saes.hook_group import concatenate
from ..saes.sae_folders import EvaluatedSae

SPARSITIES = (1, 2, 5, 16)
TEST_SHARE = 5
"""One document group in `TEST_SHARE` is for testing."""
MAX_ROWS_PER_SPLIT = 1000
MIN_ROWS_PER_SPLIT = 20


@dataclass(frozen=True)
class Task:
    """Rows and labels of one task: is the next token `token`? `test_groups` numbers the documents of the test rows."""

    token: int
    train: Int64[Tensor, " n_train"]
    train_labels: Float[Tensor, " n_train"]
    test: Int64[Tensor, " n_test"]
    test_labels: Float[Tensor, " n_test"]
    test_groups: Int64[np.ndarray, " n_test"]


def next_tokens(
    tokens: Int64[np.ndarray, "contexts context"], unmasked: Bool[np.ndarray, "contexts context"]
) -> Int64[np.ndarray, "contexts context"]:
    """Return the token that follows each row; -1 at the end of a context and before a masked row."""
    following = np.full_like(tokens, -1)
    following[:, :-1] = np.where(unmasked[:, 1:], tokens[:, 1:], -1)
    return following


def next_token_tasks(
    following: Int64[np.ndarray, " rows"], group: Int64[np.ndarray, " rows"], n_tasks: int, seed: int
) -> list[Task]:
    """Return up to `n_tasks` balanced tasks for the most frequent next tokens; -1 in `following` means none."""
    rng = np.random.default_rng(seed)
    test = group % TEST_SHARE == 0
    tasks = []
    tokens, counts = np.unique(following[following >= 0], return_counts=True)
    for token in tokens[np.argsort(-counts, kind="stable")]:
        if len(tasks) == n_tasks:
            break
        splits = [_balanced(following, token, rows, rng) for rows in (~test, test)]
        if min(len(labels) for _, labels in splits) >= MIN_ROWS_PER_SPLIT:
            (train_rows, train_labels), (test_rows, test_labels) = splits
            tasks.append(Task(int(token), train_rows, train_labels, test_rows, test_labels, group[test_rows.numpy()]))
    return tasks


def _balanced(following: np.ndarray, token: int, rows: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    yes = np.flatnonzero((following == token) & rows)
    no = np.flatnonzero((following != token) & (following >= 0) & rows)
    n = min(len(yes), len(no), MAX_ROWS_PER_SPLIT // 2)
    chosen = np.concatenate([rng.choice(yes, n, replace=False), rng.choice(no, n, replace=False)])
    return torch.from_numpy(chosen), torch.cat([torch.ones(n), torch.zeros(n)]).double()


def select_latents(latents: Float[Tensor, "rows d_sae"], labels: Float[Tensor, " rows"], k: int) -> Int64[Tensor, " k"]:
    """Return the k latents whose means over the two classes differ most."""
    difference = latents[labels == 1].mean(dim=0) - latents[labels == 0].mean(dim=0)
    return difference.abs().topk(min(k, latents.shape[1])).indices


def fit_logistic(
    x: Float[Tensor, "rows d"], labels: Float[Tensor, " rows"], penalty: float = 1.0, steps: int = 50
) -> tuple[Float[Tensor, " d"], float]:
    """Return the weights and bias that minimise the summed log loss + penalty / 2 * ||weights||^2 (Newton's method).

    The objective is scikit-learn's at `C = 1 / penalty`; the bias is not penalised.
    """
    design = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64, device=x.device)], dim=1)
    ridge = torch.full((design.shape[1],), penalty, dtype=torch.float64, device=x.device)
    ridge[-1] = 0
    solution = torch.zeros_like(ridge)

    def objective(candidate: Tensor) -> Tensor:
        logits = design @ candidate
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        return loss + 0.5 * (ridge * candidate.square()).sum()

    for _ in range(steps):
        probability = (design @ solution).sigmoid()
        gradient = design.T @ (probability - labels) + ridge * solution
        if gradient.abs().max() < 1e-8 * len(x):
            break
        curvature = (probability * (1 - probability)).clamp_min(1e-12)
        hessian = (design * curvature[:, None]).T @ design + torch.diag(ridge.clamp_min(1e-9))
        step = torch.linalg.solve(hessian, gradient)
        size, here = 1.0, objective(solution)
        while objective(solution - size * step) > here and size > 1e-6:
            size /= 2
        solution = solution - size * step
    return solution[:-1], float(solution[-1])


def probe_hits(
    train: Float[Tensor, "n_train d"], train_labels: Tensor, test: Float[Tensor, "n_test d"], test_labels: Tensor
) -> Bool[Tensor, " n_test"]:
    """Fit on the training rows and return which of the test rows are classified rightly."""
    weights, bias = fit_logistic(train, train_labels)
    predicted = test.double() @ weights + bias > 0
    return predicted == (test_labels == 1)


def probe_tasks(rows: HeldOut, config: EvaluateConfig) -> list[Task]:
    """Return the tasks to probe for; none if `config.probe_tasks` is 0. Reads tokens but no activations.

    Raises:
        StoreError: the held-out rows are too few or too uniform for a single task.
    """
    if config.probe_tasks == 0:
        return []
    tokens = torch.cat([batch for batch, _ in rows.token_batches(64)]).numpy()
    following = next_tokens(tokens, rows.usable if rows.unmasked is None else rows.unmasked)
    tasks = next_token_tasks(following[rows.usable], rows.group[rows.usable], config.probe_tasks, config.seed)
    if not tasks:
        raise StoreError(
            f"store '{rows.store.path}' has too few held-out rows to probe: no next token occurs often enough in both "
            "training and test documents; harvest more tokens, or set probe_tasks = 0"
        )
    return tasks


@torch.inference_mode()
def sparse_probing(
    saes: Sequence[EvaluatedSae], rows: HeldOut, config: EvaluateConfig, tasks: Sequence[Task] | None = None
) -> dict[str, dict[str, Any]]:
    """Return each SAE's mean accuracy over the tasks for each k, and that of the baseline on the activations.

    `confidence_95` has their intervals over documents.

    `tasks` defaults to `probe_tasks(rows, config)`, and its errors are raised here. Without tasks the result is empty.
    """
    tasks = probe_tasks(rows, config) if tasks is None else tasks
    if not tasks:
        return {}
    groups = list(dict.fromkeys(sae.hook_point for sae in saes))
    read = list(dict.fromkeys(hook_point for group in groups for hook_point in members(group)))
    parts = [block.activations for block in rows.blocks(read, config.block_rows)]
    x = {group: torch.cat([concatenate(part, group) for part in parts]) for group in groups}
    baseline = {group: [_hits(x[group], task) for task in tasks] for group in groups}
    results: dict[str, dict[str, Any]] = {}
    for sae in progress(saes, unit="SAE", desc="probe"):
        own = x[sae.hook_point]
        found = [
            sparse_hits(dense_latents(sae, own[task.train]), dense_latents(sae, own[task.test]), task) for task in tasks
        ]
        hits = {f"probe_accuracy_k{k}": [one[k] for one in found] for k in SPARSITIES}
        hits["probe_accuracy_activations"] = baseline[sae.hook_point]
        results[sae.name] = {"probe_tasks": len(tasks), **mean_accuracies(tasks, hits, config)}
    return results


def _hits(x: Float[Tensor, "rows d_in"], task: Task) -> Bool[Tensor, " n_test"]:
    return probe_hits(x[task.train], task.train_labels, x[task.test], task.test_labels)


def sparse_hits(
    train: Float[Tensor, "n_train d_sae"], test: Float[Tensor, "n_test d_sae"], task: Task
) -> dict[int, Bool[Tensor, " n_test"]]:
    """Return which of a task's test rows are classified rightly for each k, from the latents of its rows."""
    found = {}
    for k in SPARSITIES:
        chosen = select_latents(train, task.train_labels, k)
        found[k] = probe_hits(train[:, chosen], task.train_labels, test[:, chosen], task.test_labels)
    return found


def mean_accuracies(
    tasks: Sequence[Task], hits: Mapping[str, Sequence[Bool[Tensor, " n_test"]]], config: EvaluateConfig
) -> dict[str, Any]:
    """Return the mean accuracy over tasks under each key of `hits`, and intervals over resampled test documents.

    `hits` says for each task which of its test rows are classified rightly. Intervals do not include the choice of the
    training rows.
    """
    groups = np.unique(np.concatenate([task.test_groups for task in tasks]))
    places = [np.searchsorted(groups, task.test_groups) for task in tasks]

    def by_group(values: Sequence[Tensor]) -> Float[np.ndarray, "groups tasks"]:
        counts = [np.bincount(at, value.numpy(), len(groups)) for at, value in zip(places, values, strict=True)]
        return np.stack(counts, axis=1)

    def accuracies(sums: Sums) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore"):  # a resample may lack all test rows of a task
            return {key: (sums[key] / sums["n"]).mean(axis=-1) for key in hits}

    sums = {"n": by_group([torch.ones_like(task.test_labels) for task in tasks])}
    sums |= {key: by_group([hit.double() for hit in values]) for key, values in hits.items()}
    intervals = confidence_intervals(accuracies, sums, config.bootstrap_samples, config.seed)
    return point_estimates(accuracies, sums) | {"confidence_95": {key: list(both) for key, both in intervals.items()}}


def dense_latents(sae: EvaluatedSae, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_sae"]:
    """Return the latents of rows on the CPU."""
    encoded = encode(sae.sae, x.to(sae.sae.device))
    if encoded.top_indices is None:
        return encoded.latents.cpu()
    return torch.zeros(len(x), sae.sae.d_sae).scatter_add_(1, encoded.top_indices.cpu(), encoded.latents.cpu())
