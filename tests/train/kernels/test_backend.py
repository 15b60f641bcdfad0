"""Every backend keeps the contract, and those of plain PyTorch need no Triton."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch

from thresher.train.kernels import kernels_for
from thresher.train.kernels.backend import Backend
from thresher.train.kernels.cpu import Cpu
from thresher.train.kernels.entries import DenseEntries
from thresher.train.kernels.reference import Reference
from thresher.train.kernels.triton import Triton

BACKENDS = [Reference(), Cpu(), Triton()]
PRIMITIVES = [name for name, member in vars(Backend).items() if isinstance(member, staticmethod)]
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from thresher.train.kernels import kernels_for
from thresher.train.stream import batches
x, W = torch.randn(3, 4), torch.randn(8, 4)
for name in ("reference", "cpu"):
    kernels = kernels_for("cpu", name)
    acts, latents = kernels.select_topk(x, W, torch.zeros(8), 2)
    offsets = torch.arange(0, 7, 2)
    print(kernels.name, kernels.decode(acts.view(-1), latents.view(-1), offsets, W).shape)
"""


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_a_backend_has_every_primitive_with_the_contracts_parameters(backend):
    for name in PRIMITIVES:
        expected = list(inspect.signature(getattr(Backend, name)).parameters)
        own = inspect.signature(getattr(type(backend), name))
        assert getattr(type(backend), name) is not getattr(Backend, name), name
        assert list(own.parameters)[: len(expected)] == expected, name
        assert all(p.default is not p.empty for p in list(own.parameters.values())[len(expected) :]), name


def test_plain_backends_work_without_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[:2] == ["reference torch.Size([3, 4])", "cpu torch.Size([3, 4])"]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_entries_above_are_listed_if_few_and_else_all_given(backend):
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(20, 16, generator=generator), torch.randn(64, 16, generator=generator)
    bias, threshold = torch.randn(64, generator=generator), torch.rand(64, generator=generator)
    exact = x.double() @ W.double().T + bias
    few = backend.entries_above(x, W, bias - 8, threshold, 0.2)
    rows = torch.repeat_interleave(torch.arange(20), few.offsets.diff())
    found = torch.zeros(20, 64, dtype=torch.bool).index_put((rows, few.indices.long()), torch.tensor(True))
    assert torch.equal(found, exact - 8 > threshold)
    assert 0 < len(few.indices) == int(found.sum())
    many = backend.entries_above(x, W, bias + 8, threshold, 0.2)
    assert isinstance(many, DenseEntries)
    assert many.n_chosen == int((exact + 8 > threshold).sum())
    torch.testing.assert_close(many.pre_acts.double(), exact + 8, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_the_largest_of_a_batch_are_a_sorts(backend):
    pre_acts = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    found = backend.largest_of_batch(pre_acts, 40)
    rows = torch.repeat_interleave(torch.arange(16), found.offsets.diff())
    expected = pre_acts.flatten().sort(descending=True).indices[:40]
    assert sorted((rows * 64 + found.indices).tolist()) == sorted(expected.tolist())
    assert len(backend.largest_of_batch(-pre_acts.abs(), 40).indices) == 0


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_normalised_rows_are_the_formulas(name):
    generator = torch.Generator().manual_seed(0)
    rows, mean = torch.randn(5, 6, generator=generator).bfloat16(), torch.randn(6, generator=generator)
    for factor in (0.3, torch.rand(6, generator=generator)):
        x, x_compute = kernels_for("cpu", name).normalise(rows, mean, factor)
        torch.testing.assert_close(x.double(), (rows.double() - mean) * factor, rtol=1e-6, atol=1e-6)
        assert torch.equal(x_compute, x.bfloat16())
