"""Windows that go by way of the staging buffer are those that the store gives."""

import numpy as np
import pytest
import torch

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.train import ShuffledBatches
from thresher.train.stream.gpu_windows import Staging


@pytest.fixture(scope="module", params=["none", "int8"])
def store(tmp_path_factory, request):
    path = tmp_path_factory.mktemp("store") / "store"
    generator = torch.Generator().manual_seed(0)
    x = {
        name: torch.randn(50, 16, d, generator=generator).bfloat16()
        for name, d in (("blocks.0.resid_post", 8), ("blocks.0.mlp_out", 24))
    }
    widths = {name: t.shape[2] for name, t in x.items()}
    with ActivationStoreWriter(path, widths, 16, chunk_bytes=2048, codec=request.param) as writer:
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


@pytest.mark.parametrize("staging_bytes", [1, 2000])
def test_an_int8_stores_chunks_arrive_as_they_are_stored(store, staging_bytes):
    if store.codec != "int8":
        pytest.skip("another codec")
    staging = Staging(store, torch.device("cpu"), staging_bytes, quantised=True)
    chunks = np.array([4, 1, 3])
    for hook_point in store.hook_points:
        found = staging.read_chunks(hook_point, chunks)
        assert found.values.dtype == torch.int8
        rows = (found.values.float() * found.scales[:, None]).to(store.dtype)
        assert torch.equal(rows, store.read_chunks(hook_point, chunks))


def batches_of(store, device, staged=False):
    with ShuffledBatches(store, batch_size=60, device=device, window_bytes=1 << 13) as batches:
        if staged:
            batches._staging = Staging(store, batches.device, 4000, store.codec == "int8")
        return [{name: rows.cpu() for name, rows in next(batches).items()} for _ in range(30)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_staged_batches_are_the_same(store, device):
    plain, staged = batches_of(store, "cpu"), batches_of(store, device, staged=True)
    # Triton's interpreter truncates to bfloat16 where a GPU, and the store, round.
    tolerance = 2**-7 if store.codec == "int8" and device == "cpu" else 0
    for one, other in zip(plain, staged, strict=True):
        for name, rows in one.items():
            assert rows.dtype == other[name].dtype
            torch.testing.assert_close(other[name].float(), rows.float(), rtol=tolerance, atol=0)


def test_an_int8_stores_scales_are_read_beside_rows_of_an_odd_size(tmp_path):
    """Bytes of rows that are no multiple of four do not put the scales where no float32 can be."""
    x = torch.randn(9, 5, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    with ActivationStoreWriter(tmp_path / "store", {"x": 7}, 5, chunk_bytes=1, codec="int8") as writer:
        writer.append({"x": x})
    store = ActivationStore.open(tmp_path / "store")
    assert store.chunk_rows * 7 % 4
    found = Staging(store, torch.device("cpu"), 2000, quantised=True).read_chunks("x", np.arange(3))
    rows = (found.values.float() * found.scales[:, None]).to(store.dtype)
    assert torch.equal(rows, store.read_chunks("x", np.arange(3)))
