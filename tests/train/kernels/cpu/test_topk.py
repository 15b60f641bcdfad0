"""The CPU's selection against a full sort, over shapes that group evenly, unevenly and not at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from thresher.train.kernels import cpu, reference
from thresher.train.kernels.cpu import encode
from thresher.train.kernels.cpu import topk as cpu_topk
from thresher.train.kernels.cpu.topk import n_parts, topk_of_parts, topk_of_rows


def rows(batch, n, dtype, positive):
    """Return random rows of which about the given fraction is positive."""
    noise = np.random.default_rng(n).normal(size=(batch, n)) - np.quantile(
        np.random.default_rng(0).normal(size=9999), 1 - positive
    )
    return torch.from_numpy(noise).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "k"),
    [(1, 1), (7, 7), (97, 3), (512, 32), (3072, 32), (3071, 32), (6007, 5), (1024, 384), (70_001, 2), (9001, 500)],
)
@pytest.mark.parametrize("positive", [0.5, 0.01])
def test_values_are_a_sorts_and_columns_are_theirs(n, k, dtype, positive):
    pre_acts = rows(3, n, dtype, positive)
    values, columns = topk_of_rows(pre_acts, k)
    expected = np.sort(pre_acts.double().numpy(), axis=1)[:, n - k :]
    assert np.array_equal(np.sort(values.double().relu().numpy(), axis=1), np.maximum(expected, 0))
    assert torch.equal(pre_acts.gather(1, columns), values)
    assert all(len(set(row)) == k for row in columns.tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "k", "parts"), [(388, 32, 4), (3072, 32, 8), (12288, 64, 8), (9000, 500, 4)])
@pytest.mark.parametrize("positive", [0.5, 0.001])
def test_rows_in_parts_have_a_sorts_values_too(n, k, parts, dtype, positive):
    assert n_parts(dtype, n, k) == parts
    pre_acts = rows(3, n, dtype, positive)
    pre_acts[1] = pre_acts[1, 0].abs()  # all tie
    values, columns = topk_of_parts(pre_acts.chunk(parts, dim=1), k)
    expected = np.sort(pre_acts.double().numpy(), axis=1)[:, n - k :]
    assert np.array_equal(np.sort(values.double().relu().numpy(), axis=1), np.maximum(expected, 0))
    assert torch.equal(pre_acts.gather(1, columns), values)
    assert all(len(set(row)) == k for row in columns.tolist())


def test_rows_that_do_not_divide_or_are_short_are_not_parted():
    sizes = [(torch.bfloat16, 3071), (torch.bfloat16, 300), (torch.float64, 3072)]
    assert [n_parts(dtype, n, 32) for dtype, n in sizes] == [1, 1, 1]


def test_weights_laid_out_for_the_product_choose_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, W, bias = (torch.randn(size, generator=generator).bfloat16() for size in ((1100, 40), (1600, 40), (1600,)))
    plain = cpu.select_topk(x, W, bias, 12)
    monkeypatch.setattr(encode, "_WORTH_PACKING", 0)
    packed = encode._packed(W.chunk(8), 512)
    assert all(part.is_mkldnn for part in packed) or not encode._multiplies_bfloat16()
    for found, expected in zip(cpu.select_topk(x, W, bias, 12), plain, strict=True):
        assert torch.equal(found, expected)


def test_rows_are_grouped_where_that_pays():
    assert [cpu_topk._group_size(n, 32) for n in (300, 384, 385, 2047, 2048, 12288)] == [1, 1, 4, 4, 8, 8]
    assert cpu_topk._group_size(65536, 256) == 4


def test_ties_infinities_and_zeros_are_chosen_as_values():
    pre_acts = torch.zeros(2, 4000).bfloat16()
    pre_acts[0, 1717] = torch.inf
    pre_acts[0, 5::7] = 1.0
    pre_acts[1] = -torch.inf
    pre_acts[1, [3, 3999]] = torch.tensor([2.0, 0.5]).bfloat16()
    values, columns = topk_of_rows(pre_acts, 5)
    assert sorted(values[0].tolist()) == [1, 1, 1, 1, torch.inf]
    assert sorted(values[1].relu().tolist()) == [0, 0, 0, 0.5, 2.0]
    assert torch.equal(pre_acts.gather(1, columns), values)


@pytest.mark.parametrize("batch", [1, 1025])
def test_selection_in_blocks_of_rows_is_the_references(batch):
    generator = torch.Generator().manual_seed(0)
    x, W_enc, b_enc = (torch.randn(*shape, generator=generator) for shape in ((batch, 16), (900, 16), (900,)))
    acts, indices = cpu.select_topk(x, W_enc, b_enc, 9)
    expected, _ = reference.select_topk(x, W_enc, b_enc, 9)
    torch.testing.assert_close(acts.sort(1, descending=True).values, expected)
    torch.testing.assert_close(acts, reference.pre_activations(x, W_enc, b_enc).relu().gather(1, indices))


@pytest.mark.parametrize("shape", [(1, 8, 5), (300, 64, 257), (1025, 31, 96)])
def test_the_bias_that_is_added_as_the_product_goes_gives_equal_bits(shape):
    n, d_in, d_sae = shape
    generator = torch.Generator().manual_seed(0)
    x, W, bias = (torch.randn(size, generator=generator).bfloat16() for size in ((n, d_in), (d_sae, d_in), (d_sae,)))
    acts, top = cpu.select_topk(x, W, bias, 3)
    exact = (x.double() @ W.double().T + bias.double()).relu()
    rounded = exact.gather(1, top).bfloat16()
    assert (acts.double() - rounded.double()).abs().max() <= 2**-7 * exact.max()
    assert torch.equal(cpu.pre_activations(x, W, bias).relu().gather(1, top), acts)
