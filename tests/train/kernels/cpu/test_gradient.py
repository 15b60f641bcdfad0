"""A weight's gradient by blocks of latents against the reference's, of all latents at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from thresher.train.kernels import cpu, reference
from thresher.train.kernels.across import Across
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


class Threads(Across):
    """Ranks that are threads of this process and share the rows of a batch."""

    def __init__(self, rank, n, meeting, given):
        self.rank, self.n, self.meeting, self.given = rank, n, meeting, given

    def rows(self, n_rows):
        return n_rows * self.n

    def rows_before(self, n_rows):
        return n_rows * self.rank

    def all_rows(self, *values):
        self.meeting.wait()
        self.given[self.rank] = [value.clone() for value in values]
        self.meeting.wait()
        return tuple(torch.cat(parts) for parts in zip(*self.given, strict=True))

    def all_values(self, values):
        return self.all_rows(values)[0]

    def over_rows(self, *totals):
        self.meeting.wait()
        self.given[self.rank] = [total.clone() for total in totals]
        self.meeting.wait()
        for total, parts in zip(totals, zip(*self.given, strict=True), strict=True):
            total.copy_(torch.stack(parts).sum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [2, 4])
def test_the_mean_of_ranks_gradients_is_that_of_the_whole_batch_in_every_bit(n, dtype):
    """Of a number of ranks that is a power of two, for a mean over fewer rows is then an exact multiple."""
    values, indices, offsets, g = entries(40, 23, 5)
    values, g, other = values.float(), g.to(dtype), torch.randn(40, 5).to(dtype)
    csc = cpu.to_csc(indices, offsets, 23)
    expected = [cpu.WeightGradient(csc, values * part, source)[:] for part, source in ((1, g), (2, other))]
    meeting, given, size = Barrier(n, timeout=30), [None] * n, 40 // n
    latents, rows, by_bias = torch.tensor([3, 22]), torch.rand(n, 2, 5), torch.rand(n, 23)
    direction = torch.rand(5)

    def mean_on(rank):
        start, stop = offsets[rank * size].item(), offsets[(rank + 1) * size].item()
        own = offsets[rank * size : (rank + 1) * size + 1] - start
        here = cpu.to_csc(indices[start:stop], own, 23)
        parts = [
            cpu.WeightGradient(here, n * part * values[start:stop], source[rank * size : (rank + 1) * size])
            for part, source in ((1, g), (2, other))
        ]
        with_more = cpu.WeightGradient(here, n * values[start:stop], g[rank * size : (rank + 1) * size])
        with_more.add_outer(by_bias[rank].clone(), direction, alpha=-1)
        with_more.add_rows(latents, rows[rank].clone())
        means = parts[0].means_of_ranks([parts[1], with_more], Threads(rank, n, meeting, given))
        return [mean[:] for mean in means]

    with ThreadPoolExecutor(n) as pool:
        found = list(pool.map(mean_on, range(n)))
    more = expected[0] - torch.outer(by_bias.mean(0), direction)
    more[latents] += rows.mean(0)
    for means in found:
        assert torch.equal(means[0], expected[0])
        assert torch.equal(means[1], expected[1])
        torch.testing.assert_close(means[2], more)


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
