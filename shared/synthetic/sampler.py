"""Draw synthetic rows, at a cost that follows what fires rather than how many features there are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from .truth import Truth, exclusive_groups

_BLOCK = 64
_ROWS = 512


class Firing(NamedTuple):
    """The features that fire in a batch, ordered by row and feature: each one's row, number and magnitude."""

    row: Int64[Tensor, " n_firing"]
    feature: Int64[Tensor, " n_firing"]
    magnitude: Float[Tensor, " n_firing"]


class Sampler:
    """Draw rows of a law's distribution, exactly, on the device of its features.

    Roots are drawn one by one, and children only where their parent fires. Features outside the trees fire rarely, so
    they are drawn by thinning: in each block of them, arrivals of a Poisson process at the rate of the block's most
    probable feature fall on features at random and are kept with the ratio of the rates. A feature fires if at least
    one arrival is kept, which has its probability given the row's shared Gaussian.
    """

    def __init__(self, truth: Truth):
        self.truth = truth
        self._slope = truth.factor / truth.own_deviation[:, None]
        self._level = truth.threshold / truth.own_deviation
        self._exclusive = exclusive_groups(truth)
        self._forest = truth.forest
        device = truth.vectors.device
        self._first_child, self._n_children = self._forest.first_child.to(device), self._forest.n_children.to(device)
        self._exclusive = self._exclusive.to(device)
        in_tree = self._forest.in_tree
        n_padded = -(truth.law.n_features - in_tree) % _BLOCK
        self._free_slope = torch.nn.functional.pad(self._slope[in_tree:], (0, 0, 0, n_padded)).T.contiguous()
        self._free_level = torch.nn.functional.pad(self._level[in_tree:], (0, n_padded), value=torch.inf)

    def rows(self, n: int, seed: int) -> Float[Tensor, "n d_in"]:
        """Return `n` rows: the bias, and the directions of the features that fire times their magnitudes."""
        return self.activations(self.fire(n, seed), n)

    def activations(self, firing: Firing, n: int) -> Float[Tensor, "n d_in"]:
        """Return the rows of a batch of `n` in which these features fire."""
        starts = torch.searchsorted(firing.row, torch.arange(n, device=firing.row.device))
        summed = torch.nn.functional.embedding_bag(
            firing.feature, self.truth.vectors, starts, mode="sum", per_sample_weights=firing.magnitude
        )
        return summed + self.truth.bias

    def fire(self, n: int, seed: int) -> Firing:
        """Draw which features fire in `n` rows, and how strongly. A seed gives the same on the same device."""
        device = self.truth.vectors.device
        generator = torch.Generator(device).manual_seed(seed)
        shared = torch.randn(n, self.truth.factor.shape[1], generator=generator, device=device)
        parts = [*self._trees(shared, generator), self._free(shared, generator)]
        row, feature, magnitude = (torch.cat(column) for column in zip(*parts, strict=True))
        order = (row * self.truth.law.n_features + feature).argsort()
        return Firing(row[order], feature[order], magnitude[order])

    def _trees(self, shared: Float[Tensor, "n rank"], generator: torch.Generator) -> list[Firing]:
        """Draw the roots, then level by level the children of what fires."""
        n_roots = self._forest.levels[1]
        if not n_roots:
            return []
        bound = torch.addmm(-self._level[:n_roots], shared, self._slope[:n_roots].T)
        own = torch.randn(bound.shape, generator=generator, device=bound.device)
        row, feature = (own < bound).nonzero(as_tuple=True)
        found = [self._fired(row, feature, self._magnitudes(feature, generator))]
        for _ in self._forest.levels[2:]:
            found.append(self._children(found[-1], shared, generator))
        return found

    def _children(self, parents: Firing, shared: Float[Tensor, "n rank"], generator: torch.Generator) -> Firing:
        """Draw which children of these parents fire: where siblings are exclusive, one of those that would."""
        has_children = self._n_children[parents.feature] > 0
        parents = Firing(*(column[has_children] for column in parents))
        place = torch.arange(self.truth.law.branching, device=shared.device)
        feature = self._first_child[parents.feature, None] + place
        exists = place < self._n_children[parents.feature, None]
        feature = torch.where(exists, feature, 0)
        # A gathered dot product for each pair; only a few hundred of a row's thousands of features are candidates.
        bound = torch.einsum("pbr,pr->pb", self._slope[feature], shared[parents.row]) - self._level[feature]
        own = torch.randn(bound.shape, generator=generator, device=bound.device)
        magnitude = self._magnitudes(feature, generator)
        fires = (own < bound) & exists & (magnitude > 0)
        priority = torch.rand(bound.shape, generator=generator, device=bound.device).masked_fill_(~fires, -1)
        chosen = place == priority.argmax(1, keepdim=True)
        fires &= chosen | ~self._exclusive[parents.feature, None]
        if self.truth.law.scale_by_parent:
            magnitude = magnitude * (parents.magnitude / self.truth.magnitude[parents.feature])[:, None]
        parent, child = fires.nonzero(as_tuple=True)
        return self._fired(parents.row[parent], feature[parent, child], magnitude[parent, child])

    def _free(self, shared: Float[Tensor, "n rank"], generator: torch.Generator) -> Firing:
        """Draw the features outside the trees, by thinning; `_ROWS` rows at a time, which fit in a core's cache."""
        keys = [
            self._free_rows(shared[start : start + _ROWS], start, generator) for start in range(0, len(shared), _ROWS)
        ]
        key = torch.cat(keys).unique()
        row, feature = key // self.truth.law.n_features, key % self.truth.law.n_features
        return self._fired(row, feature, self._magnitudes(feature, generator))

    def _free_rows(
        self, shared: Float[Tensor, "n rank"], first_row: int, generator: torch.Generator
    ) -> Int64[Tensor, " n_kept"]:
        """Return `row * n_features + feature` of the arrivals that are kept, with repetitions."""
        bound = torch.addmm(-self._free_level, shared, self._free_slope)
        most = _rate(bound.view(len(shared), -1, _BLOCK).amax(2))
        arrivals = torch.poisson(most * _BLOCK, generator=generator).long().view(-1)
        block = torch.arange(len(arrivals), device=bound.device).repeat_interleave(arrivals)
        place = torch.randint(_BLOCK, block.shape, generator=generator, device=bound.device)
        accepted = torch.rand(block.shape, generator=generator, device=bound.device)
        index = block * _BLOCK + place
        kept = index[accepted * most.view(-1)[block] < _rate(bound.view(-1)[index])]
        width = bound.shape[1]
        return (first_row + kept // width) * self.truth.law.n_features + self._forest.in_tree + kept % width

    def _magnitudes(self, feature: Int64[Tensor, " ..."], generator: torch.Generator) -> Float[Tensor, " ..."]:
        noise = torch.randn(feature.shape, generator=generator, device=feature.device)
        return (self.truth.magnitude[feature] + self.truth.deviation[feature] * noise).relu()

    @staticmethod
    def _fired(row: Tensor, feature: Tensor, magnitude: Tensor) -> Firing:
        """Return the entries whose magnitude is not zero; a feature of magnitude zero does not fire."""
        fires = magnitude > 0
        return Firing(row[fires], feature[fires], magnitude[fires])


def _rate(bound: Tensor) -> Tensor:
    """Return the rate of a Poisson process that has an arrival with the probability that `N(0, 1) < bound`."""
    return -torch.special.log_ndtr(-bound)
