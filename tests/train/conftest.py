"""Stores in memory for the tests of training."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch


class ArrayStore:
    """The parts of `ActivationStore` that training reads, over arrays."""

    def __init__(self, arrays, context_size=8, chunk_rows=4, held_out=None, masked=None):
        self.path = "memory"
        self.arrays = {name: torch.as_tensor(array) for name, array in arrays.items()}
        first = next(iter(self.arrays.values()))
        self.hook_points = tuple(self.arrays)
        self.n_rows, self.dtype = len(first), first.dtype
        self.context_size, self.chunk_rows = context_size, chunk_rows
        self.n_contexts = self.n_rows // context_size
        self._held_out = np.zeros(self.n_contexts, bool) if held_out is None else np.asarray(held_out)
        self._masked = np.zeros(self.n_rows, bool) if masked is None else np.asarray(masked)
        self.metadata = {"model": "none"}

    def d_in(self, hook):
        return self.arrays[hook].shape[1]

    def training_mask(self, start=0, stop=None):
        return (~np.repeat(self._held_out, self.context_size) & ~self._masked)[start:stop]

    def training_rows_per_chunk(self):
        starts = np.arange(0, self.n_rows, self.chunk_rows)
        return np.add.reduceat(self.training_mask().astype(np.int64), starts)

    def read_chunks(self, hook, chunks, out=None):
        rows = torch.zeros(len(chunks) * self.chunk_rows, self.d_in(hook), dtype=self.dtype)
        for i, chunk in enumerate(chunks):
            part = self.arrays[hook][chunk * self.chunk_rows : (chunk + 1) * self.chunk_rows]
            rows[i * self.chunk_rows : i * self.chunk_rows + len(part)] = part
        return rows

    def place_rows(self, hook, chunks, places, out):
        kept = places >= 0
        out[torch.from_numpy(places[kept])] = self.read_chunks(hook, chunks)[torch.from_numpy(kept)]

    def moments(self, hook):
        rows = self.arrays[hook].double()[torch.from_numpy(self.training_mask())]
        mean, variance = rows.mean(0), rows.var(0, unbiased=False)
        return SimpleNamespace(
            count=len(rows),
            mean=mean.numpy(),
            variance=variance.numpy(),
            total_variance=float(variance.sum()),
            mean_norm=float(rows.norm(dim=1).mean()),
        )


@pytest.fixture
def array_store():
    """The class, since tests cannot import from each other."""
    return ArrayStore


@pytest.fixture(scope="session")
def sparse_activations():
    """Return 6,000 rows of 32 channels that a dictionary of 64 directions explains."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(64, 32, generator=generator)
    codes = torch.rand(6000, 64, generator=generator) * (torch.rand(6000, 64, generator=generator) < 0.05)
    return (codes @ directions + 1).bfloat16()


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program catches it."""


@pytest.fixture
def train_killed(monkeypatch):
    """The function that trains until just after a step, then dies without writing anything more."""
    from thresher.train import run, train

    def train_until(config, at_step):
        prepare, calls = run.prepare_batches, []

        def dying(*arguments):
            calls.append(None)
            if len(calls) > at_step:
                raise Killed
            return prepare(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(run, "prepare_batches", dying)
            with pytest.raises(Killed):
                train(config)

    return train_until


@pytest.fixture
def refusing_waits():
    """The context within which what waits for the GPU is an error, and after which, whatever happens, it is not."""

    @contextmanager
    def refusing():
        with warnings.catch_warnings():
            # PyTorch warns, after it has set the mode, that it is a prototype.
            warnings.filterwarnings("ignore", "Synchronization debug mode")
            try:
                torch.cuda.set_sync_debug_mode("error")
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")

    return refusing
