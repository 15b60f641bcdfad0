"""Every recipe on rows as real models have them: a channel with a large offset, and one of 50 times the deviation."""

import numpy as np
import pytest
import torch

from thresher.shared import ActivationStore, ActivationStoreWriter, Sae
from thresher.train import TrainConfig, train
from thresher.train.stream import normalization as normalization_module
from thresher.train.stream.normalization import normalization_of, row_scale

D_IN, CONTEXT = 32, 50
MASSIVE = 50
"""Deviations of the other channels in one."""
RECIPES = {
    "topk": {"k": 4},
    "topk-annealed": {"architecture": "topk", "k": 4, "k_anneal_steps": 60},
    "multi-topk": {"architecture": "topk", "k": 4, "multi_topk_coefficient": 0.125},
    "batch_topk": {"k": 4},
    "matryoshka_batch_topk": {"k": 4, "prefix_sizes": [16, 64]},
    "hierarchical_topk": {"k": 4},
    "standard": {"l1_coefficient": 1.0},
    "p-annealed": {"architecture": "standard", "l1_coefficient": 1.0, "p_final": 0.5, "p_anneal_steps": 100},
    "gated": {"l1_coefficient": 0.5},
    "jumprelu": {"l0_coefficient": 0.3, "target_l0": 6.0},
    "tanh-jumprelu": {"architecture": "jumprelu", "l0_coefficient": 0.05, "sparsity_loss": "tanh"},
    "transcoder": {"l1_coefficient": 1.0},
    "skip_transcoder": {"l1_coefficient": 1.0},
    "crosscoder": {"l1_coefficient": 1.0},
}


def sae_table(name: str, keys: dict, hook: str) -> dict:
    table = {"architecture": name, "hook_point": hook, "d_sae": 64, "lr": 3e-3, "name": f"{name}-{hook}"} | keys
    if name.endswith("transcoder"):
        table["hook_point_out"] = f"{hook}-again"
    if name == "crosscoder":
        table["hook_points"] = [hook, f"{hook}-again"]
    return table


@pytest.fixture(scope="module")
def store(tmp_path_factory, sparse_activations):
    """Rows as they are, with an offset of 300 in one channel, and with one channel of 50 times the deviation."""
    rows = sparse_activations.float()
    generator = torch.Generator().manual_seed(1)
    offset, massive = rows.clone(), rows.clone()
    offset[:, 3] += 300
    massive[:, 5] = MASSIVE * rows.std(0).mean() * torch.randn(len(rows), generator=generator)
    arrays = {"plain": rows, "offset": offset, "massive": massive}
    arrays |= {f"{name}-again": -0.5 * array for name, array in arrays.items()}
    path = tmp_path_factory.mktemp("uneven") / "store"
    with ActivationStoreWriter(path, dict.fromkeys(arrays, D_IN), CONTEXT, dtype="float32", codec="none") as writer:
        contexts = {name: array.view(-1, CONTEXT, D_IN) for name, array in arrays.items()}
        writer.append(contexts, held_out=np.arange(len(rows) // CONTEXT) % 6 == 0)
    return path


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    """All recipes on all rows, in one sweep; the folder of the SAEs."""
    output = tmp_path_factory.mktemp("uneven-saes")
    hooks = ("plain", "offset", "massive")
    saes = [sae_table(name, keys, hook) for name, keys in RECIPES.items() for hook in hooks]
    train(TrainConfig(store=str(store), output=str(output), sae=saes, batch_size=250, epochs=10, warmup_steps=10))
    return output


def held_out(store: ActivationStore, hook: str) -> torch.Tensor:
    mask = np.repeat(store.held_out_contexts(), CONTEXT)
    return store.read(hook, 0, store.n_rows).double()[torch.from_numpy(mask)]


def judged(output, store_path, name: str, hook: str) -> tuple[float, float]:
    """Explained variance and L0 of a saved SAE on held-out rows, in float64."""
    store, sae = ActivationStore.open(store_path), Sae.load(output / f"{name}-{hook}").double()
    x = held_out(store, hook)
    if name == "crosscoder":
        x = torch.cat([x, held_out(store, f"{hook}-again")], dim=1)
    target = held_out(store, f"{hook}-again") if name.endswith("transcoder") else x
    error = (sae(x) - target).square().sum(1).mean()
    variance = (target - target.mean(0)).square().sum(1).mean()
    return float(1 - error / variance), float((sae.encode(x) > 0).double().sum(1).mean())


@pytest.mark.parametrize("name", RECIPES)
def test_an_offset_changes_nothing(trained, store, name):
    explained, l0 = judged(trained, store, name, "plain")
    with_offset, l0_with_offset = judged(trained, store, name, "offset")
    assert explained > 0.5
    assert with_offset == pytest.approx(explained, abs=0.02)
    assert l0_with_offset == pytest.approx(l0, rel=0.1)


@pytest.mark.parametrize("name", RECIPES)
def test_a_massive_channel_is_explained(trained, store, name):
    """The channel holds nearly all of the variance, and must not keep the penalties from training."""
    explained, l0 = judged(trained, store, name, "massive")
    assert explained > 0.9
    assert l0 > 0.5


@pytest.mark.parametrize("hook", ["plain", "offset", "massive"])
def test_centred_rows_have_a_mean_norm_of_sqrt_d_in(store, hook):
    store = ActivationStore.open(store)
    rows = store.read(hook, 0, store.n_rows).double().numpy()[~np.repeat(store.held_out_contexts(), CONTEXT)]
    centred = rows - rows.mean(0)
    normalization = normalization_of(store, hook, row_scale(store, hook, "expected_average_only_in", 10.0))
    norms = np.linalg.norm(centred * normalization.scale, axis=1)
    assert norms.mean() == pytest.approx(D_IN**0.5, rel=1e-6)
    assert normalization.total_variance == pytest.approx((centred**2).sum(1).mean() * normalization.scale**2, rel=1e-6)


def test_large_stores_are_sampled_evenly(store, monkeypatch):
    """A tenth of the rows, spread evenly, gives nearly the same scale and reads a tenth of the chunks."""
    store = ActivationStore.open(store)
    exact = row_scale(store, "plain", "expected_average_only_in", 10.0).factor
    monkeypatch.setattr(normalization_module, "_SAMPLE_ROWS", store.n_rows // 10)
    read = []
    read_chunks = ActivationStore.read_chunks
    monkeypatch.setattr(
        ActivationStore,
        "read_chunks",
        lambda self, hook, chunks: read.extend(chunks) or read_chunks(self, hook, chunks),
    )
    sampled = row_scale(store, "plain", "expected_average_only_in", 10.0).factor
    assert sampled == pytest.approx(exact, rel=0.05)
    assert len(read) <= -(-store.n_chunks // 10) + 1
