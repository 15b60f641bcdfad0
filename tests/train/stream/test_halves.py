"""Half of the documents: the two halves of the training rows are disjoint, by whole documents, and complete."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from thresher.shared import ActivationStore, Sae
from thresher.shared.core.errors import ConfigError, StoreError
from thresher.shared.store import ActivationStoreWriter
from thresher.train import ShuffledBatches, train
from thresher.train.stream.row_mask import TrainingRowMask

CONTEXT, D_IN, N, HOOK = 8, 4, 61, "blocks.0.resid_post"


@pytest.fixture(scope="module", params=[True, False], ids=["documents", "unknown documents"])
def written(request, tmp_path_factory):
    """A store with a number of its own in each row, and the document of each row: of several in a context, or none."""
    path = tmp_path_factory.mktemp("halves") / "store"
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(N, CONTEXT, D_IN)).astype(np.float32)
    rows[..., 0] = np.arange(N * CONTEXT).reshape(N, CONTEXT)
    held_out = np.arange(N) % 5 == 0
    documents = np.cumsum(rng.random(N * CONTEXT) < 0.1).reshape(N, CONTEXT)
    documents[held_out] += 1000
    known = {"documents": documents} if request.param else {}
    sizes = {"chunk_bytes": 12 * D_IN * 4, "shard_bytes": 100 * D_IN * 4}
    with ActivationStoreWriter(path, {HOOK: D_IN}, CONTEXT, dtype="float32", **sizes) as writer:
        writer.append({HOOK: rows}, held_out=held_out, **known)
    if not request.param:
        documents = np.repeat(np.arange(N)[:, None] + 1, CONTEXT, axis=1)  # context 0 is the document -1, an odd one
    return path, documents.reshape(-1), np.repeat(~held_out, CONTEXT)


@pytest.mark.parametrize(("half", "remainder"), [("even", 0), ("odd", 1)])
def test_an_epoch_is_every_training_row_of_the_half_once(written, half, remainder):
    path, documents, training = written
    expected = np.flatnonzero(training & (documents % 2 == remainder))
    store = ActivationStore.open(path)
    assert TrainingRowMask(store, half).rows_per_chunk().sum() == len(expected)
    with ShuffledBatches(store, batch_size=1, n_rows=2 * len(expected), documents=half) as batches:
        assert batches.rows_per_epoch == len(expected)
        seen = torch.cat([batch[HOOK][:, 0].clone() for batch in batches]).numpy()
    for epoch in np.split(seen, 2):
        assert np.array_equal(np.sort(epoch), expected)


def test_a_run_says_which_half_it_trained_on_and_resumes_only_with_it(written, tmp_path):
    path, documents, training = written
    keys = {"store": str(path), "output": str(tmp_path / "odd"), "batch_size": 32, "warmup_steps": 1}
    table = {"hook_point": HOOK, "d_sae": 8, "k": 2}
    folder = train(sae=[table], documents="odd", **keys)[0]
    assert Sae.load(folder).metadata["documents"] == "odd"
    n_rows = int((training & (documents % 2 == 1)).sum())
    assert len((folder / "metrics.jsonl").read_bytes().splitlines()) == -(-n_rows // 32)
    with pytest.raises(ConfigError, match="documents"):
        train(sae=[table], documents="even", **keys)


def test_a_store_of_one_document_has_no_other_half(tmp_path):
    with ActivationStoreWriter(tmp_path / "store", {HOOK: D_IN}, CONTEXT) as writer:
        writer.append({HOOK: torch.randn(4, CONTEXT, D_IN)}, documents=np.zeros((4, CONTEXT), dtype=np.int64))
    with pytest.raises(StoreError, match="in documents of odd number"):
        ShuffledBatches(ActivationStore.open(tmp_path / "store"), documents="odd")
