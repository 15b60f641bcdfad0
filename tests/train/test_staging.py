"""Windows that go by way of the staging buffer are those that the store gives."""

import numpy as np
import pytest
import torch

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.train import ShuffledBatches
from thresher.train.staging import Staging


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "store"
    generator = torch.Generator().manual_seed(0)
    x = {
        name: torch.randn(50, 16, d, generator=generator).bfloat16()
        for name, d in (("blocks.0.resid_post", 8), ("blocks.0.mlp_out", 24))
    }
    with ActivationStoreWriter(path, {name: t.shape[2] for name, t in x.items()}, 16, chunk_bytes=2048) as writer:
        writer.append(x, held_out=np.arange(50) % 7 == 0)
    return ActivationStore.open(path)


@pytest.mark.parametrize("staging_bytes", [1, 5000, 1 << 20])
def test_chunks_arrive_as_they_are(store, staging_bytes):
    staging = Staging(store, torch.device("cpu"), staging_bytes)
    n_chunks = len(store.training_rows_per_chunk())
    assert n_chunks > 5
    for hook_point in store.hook_points:
        for chunks in (np.arange(n_chunks)[::-1], np.array([2]), np.array([1, 4, 3])):
            found = staging.read_chunks(hook_point, chunks)
            assert torch.equal(found, store.read_chunks(hook_point, chunks))


def batches_of(store, device, staged=False):
    with ShuffledBatches(store, batch_size=60, device=device, window_bytes=1 << 13) as batches:
        if staged:
            batches._staging = Staging(store, batches.device, 4000)
        return [{name: rows.cpu() for name, rows in next(batches).items()} for _ in range(30)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_staged_batches_are_the_same(store, device):
    plain, staged = batches_of(store, "cpu"), batches_of(store, device, staged=True)
    for one, other in zip(plain, staged, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
