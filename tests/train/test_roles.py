"""Training limited to some roles: those rows alone, with their own mean and norm."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
import torch

from thresher.shared import ActivationStore, Sae
from thresher.shared.core.errors import ConfigError, StoreError
from thresher.shared.store import ActivationStoreWriter
from thresher.shared.store.format.roles import ASSISTANT, PLACED
from thresher.train import ShuffledBatches, train
from thresher.train.config import TrainConfig
from thresher.train.stream.normalization import normalization_of, row_scale

CONTEXT, D_IN, N, HOOK = 8, 6, 60, "blocks.0.resid_post"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A store whose assistant rows lie elsewhere than the others; each row has a number of its own in channel 0."""
    path = tmp_path_factory.mktemp("roles") / "store"
    rng = np.random.default_rng(0)
    roles = rng.choice([PLACED, 2, 4, ASSISTANT], (N, CONTEXT))
    rows = rng.normal(size=(N, CONTEXT, D_IN)).astype(np.float32) + np.float32(5) * (roles == ASSISTANT)[..., None]
    rows[..., 0] = np.arange(N * CONTEXT).reshape(N, CONTEXT) / 100
    held_out = np.arange(N) % 4 == 0
    sizes = {"chunk_bytes": 12 * D_IN * 4, "shard_bytes": 100 * D_IN * 4}
    with ActivationStoreWriter(path, {HOOK: D_IN}, CONTEXT, dtype="float32", roles=True, **sizes) as writer:
        writer.append({HOOK: rows}, held_out=held_out, roles=roles)
    wanted = (roles == ASSISTANT) & ~held_out[:, None]
    return path, rows[wanted]


def test_an_epoch_is_every_row_of_the_roles_once(written):
    path, rows = written
    store = ActivationStore.open(path, roles=["assistant"])
    n = len(rows)
    with ShuffledBatches(store, batch_size=1, n_rows=2 * n) as batches:
        assert batches.rows_per_epoch == n
        seen = torch.cat([batch[HOOK].clone() for batch in batches]).numpy()
    for epoch in (seen[:n], seen[n:]):
        assert np.array_equal(epoch[epoch[:, 0].argsort()], rows)


def test_normalisation_is_of_the_roles(written):
    path, rows = written
    store = ActivationStore.open(path, roles=["assistant"])
    found = normalization_of(store, HOOK, row_scale(store, HOOK, "expected_average_only_in", 10.0))
    x = rows.astype(np.float64)
    np.testing.assert_allclose(found.mean.numpy(), x.mean(0), rtol=1e-6)
    norm = np.linalg.norm(x - x.mean(0), axis=1).mean()
    np.testing.assert_allclose(found.scale, D_IN**0.5 / norm, rtol=1e-6)
    np.testing.assert_allclose(found.total_variance, x.var(0).sum() * found.scale**2, rtol=1e-6)


def test_a_run_limited_to_roles(written, tmp_path):
    path, rows = written
    sae = {"architecture": "topk", "hook_point": HOOK, "d_sae": 12, "k": 2}
    config = TrainConfig(
        store=str(path), output=str(tmp_path / "saes"), sae=[sae], roles=["assistant"], batch_size=16, tokens=16
    )
    (folder,) = train(config)
    trained = Sae.load(folder)
    b_dec = trained.b_dec.detach().double().numpy()
    assert np.abs(b_dec - rows.astype(np.float64).mean(0)).max() < 0.2  # of all rows it would be about 2.5 less
    assert json.loads((folder / "cfg.json").read_text())["metadata"]["roles"] == ["assistant"]
    with pytest.raises(ConfigError, match="roles"):
        train(msgspec.structs.replace(config, roles=["user"]))


def test_refusals(written, tmp_path):
    path, _ = written
    sae = {"architecture": "topk", "hook_point": HOOK, "d_sae": 12, "k": 2}
    with pytest.raises(StoreError, match="no training rows"):
        train(TrainConfig(store=str(path), output=str(tmp_path / "saes"), sae=[sae], roles=["system"]))
    with pytest.raises(ConfigError, match="roles"):
        TrainConfig(store=str(path), output=str(tmp_path / "saes"), sae=[sae], roles=["asistant"])
