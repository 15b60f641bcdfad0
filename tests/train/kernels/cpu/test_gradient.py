"""A weight's gradient by blocks of latents against the reference's, of all latents at once."""

from __future__ import annotations

import pytest
import torch

from thresher.train.kernels import cpu, reference
from thresher.train.kernels.cpu import sparse_ops


def entries(batch, d_sae, d_in, seed=0):
    """Return ragged latents, some in no row, and rows to sum; row 1 has none."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 6, (batch,), generator=generator)
    counts[1] = 0
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    indices = torch.cat([torch.randperm(d_sae - 3, generator=generator)[:n] for n in counts.tolist()])
    values = torch.randn(len(indices), generator=generator, dtype=torch.float64)
    return values, indices, offsets, torch.randn(batch, d_in, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("block", [1, 7, 100])
def test_blocks_make_up_the_whole_gradient(block):
    values, indices, offsets, g = entries(40, 23, 5)
    gradient = cpu.WeightGradient(cpu.to_csc(indices, offsets, 23), values, g)
    by_bias, direction = torch.rand(23).double(), torch.rand(5).double()
    gradient.add_outer(by_bias, direction, alpha=-1)
    direction_then = direction.clone()
    direction.zero_()
    latents, rows = torch.tensor([0, 6, 7, 22]), torch.rand(4, 5).double()
    gradient.add_rows(latents, rows)
    expected = reference.grad_weights(values, indices, offsets, g, 23) - torch.outer(by_bias, direction_then)
    expected[latents] += rows
    blocks = [gradient[slice(start, start + block)] for start in range(0, 23, block)]
    torch.testing.assert_close(torch.cat(blocks), expected)
    assert torch.equal(gradient[:], torch.cat(blocks))
    assert gradient.shape == expected.shape
    blocks[0].zero_()
    torch.testing.assert_close(gradient[:], expected)


def test_terms_in_bfloat16_are_added_up_in_float32():
    """A latent that 4,000 rows fire: sums in bfloat16 would stop at 256."""
    g = torch.ones(4000, 3, dtype=torch.bfloat16)
    offsets, indices = torch.arange(4001), torch.zeros(4000, dtype=torch.int64)
    gradient = cpu.WeightGradient(cpu.to_csc(indices, offsets, 2), torch.ones(4000), g)[:]
    assert gradient.dtype == torch.float32
    assert gradient.tolist() == [[4000.0] * 3, [0.0] * 3]


@pytest.mark.parametrize("cache", [0, 1 << 30])
@pytest.mark.parametrize(("batch", "d_sae"), [(40, 23), (12, 30), (3, 200)])
def test_gradients_of_values_are_the_references_from_either_side(monkeypatch, batch, d_sae, cache):
    """Through either of the two matrices in order; entries of the memory they are written to do not matter."""
    monkeypatch.setattr(sparse_ops, "_CACHE_BYTES", cache)
    _, indices, offsets, g = entries(batch, d_sae, 5)
    W_dec = torch.randn(d_sae, 5, dtype=torch.float64)
    expected = reference.grad_values(g, W_dec, indices, offsets)
    torch.testing.assert_close(cpu.grad_values(g, W_dec, indices, offsets), expected)
    csc = cpu.to_csc(indices, offsets, d_sae)
    torch.testing.assert_close(cpu.grad_values(g, W_dec, indices, offsets, csc), expected)
    none = torch.zeros(batch + 1, dtype=torch.int64)
    assert cpu.grad_values(g, W_dec, indices[:0], none).shape == (0,)
