"""The features behind synthetic rows: directions, magnitudes, forest and firing thresholds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import msgspec
import torch
from jaxtyping import Bool, Float, Int64
from safetensors.torch import load, save
from torch import Tensor

from .law import SyntheticLaw
from .orthogonal import orthogonalise

_LEAST_OWN_VARIANCE = 0.01
TRUTH_FILE = "truth.safetensors"
"""The file beside a synthetic store that holds its features."""


class Forest(NamedTuple):
    """The hierarchy of the features, which is numbered level by level; those of one parent are consecutive.

    `levels` bounds the levels: level i is `range(levels[i], levels[i + 1])`. The features from `levels[-1]` on are in
    no tree. `parent` is -1 for those and for roots.
    """

    levels: tuple[int, ...]
    parent: Int64[Tensor, " n_features"]
    first_child: Int64[Tensor, " n_features"]
    n_children: Int64[Tensor, " n_features"]

    @property
    def in_tree(self) -> int:
        """The number of features in trees."""
        return self.levels[-1]


class Truth(NamedTuple):
    """The features of a law. A feature fires where its Gaussian exceeds `threshold`.

    That Gaussian is `factor @ shared + own_deviation * own`, of unit variance, with `shared` of one row in common.
    Where a feature fires, its magnitude is `relu(N(magnitude, deviation))`.
    """

    law: SyntheticLaw
    vectors: Float[Tensor, "n_features d_in"]
    bias: Float[Tensor, " d_in"]
    threshold: Float[Tensor, " n_features"]
    factor: Float[Tensor, "n_features rank"]
    own_deviation: Float[Tensor, " n_features"]
    magnitude: Float[Tensor, " n_features"]
    deviation: Float[Tensor, " n_features"]

    @property
    def forest(self) -> Forest:
        """The hierarchy of the features."""
        return make_forest(self.law)

    def to(self, device: str | torch.device) -> Self:
        """Return the same features on a device."""
        return type(self)(self.law, *(tensor.to(device) for tensor in self[1:]))

    def to_bytes(self) -> bytes:
        """Return the content of the file that is kept beside a store."""
        tensors: dict[str, Tensor] = dict(zip(self._fields[1:], self[1:], strict=True))
        return save(tensors)


def truth_digest(content: bytes) -> str:
    """Return the digest of the file's content that the metadata of a store keeps."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def read_truth(law: Mapping[str, Any], content: bytes) -> Truth:
    """Return the features of a law from the settings and the file's content that were kept with a store.

    Raises `ConfigError` or `ValueError` if they do not belong together.
    """
    found, tensors = msgspec.convert(law, SyntheticLaw), load(content)
    truth = Truth(found, **tensors)
    if truth.vectors.shape != (found.n_features, found.d_in):
        raise ValueError(f"vectors of shape {list(truth.vectors.shape)}, expected {[found.n_features, found.d_in]}")
    return truth


def make_truth(law: SyntheticLaw) -> Truth:
    """Draw the features of a law, from its seed.

    On a CPU the tensors equal those of `sae_lens.synthetic.SyntheticModel` with the same settings, up to rounding.
    """
    vectors, bias = _directions(law)
    factor = _generator(law.seed + 4, law.n_features, law.correlation_rank) * law.correlation_scale
    shared = factor.square().sum(1)
    capped = shared > 1 - _LEAST_OWN_VARIANCE
    factor[capped] *= ((1 - _LEAST_OWN_VARIANCE) / shared[capped]).sqrt()[:, None]
    deviation = _generator(law.seed + 1, law.n_features) * law.magnitude_deviation_std + law.magnitude_deviation_mean
    return Truth(
        law,
        vectors,
        bias,
        torch.special.ndtri(1 - firing_probabilities(law).double()).float(),
        factor,
        (1 - factor.square().sum(1)).sqrt(),
        torch.linspace(law.first_magnitude, law.last_magnitude, law.n_features),
        deviation.abs(),
    )


def firing_probabilities(law: SyntheticLaw) -> Float[Tensor, " n_features"]:
    """Return with which probability each feature's Gaussian exceeds its threshold.

    With `compensate_probabilities`, those of children are raised, so that what is left after gating by the parent and
    exclusion by siblings is close to the Zipf law.
    """
    zipf = 1 / torch.arange(1, law.n_features + 1, dtype=torch.float64) ** law.zipf_exponent
    spread = (zipf[0] - zipf[-1]).clamp_min(torch.finfo(torch.float64).tiny)
    base = law.min_probability + (law.max_probability - law.min_probability) * (zipf - zipf[-1]) / spread
    if law.n_features == 1:
        base[0] = law.max_probability
    if not law.compensate_probabilities:
        return base
    forest = make_forest(law)
    children = (forest.parent >= 0).nonzero()[:, 0]
    parent = forest.parent[children]
    siblings = torch.zeros_like(base).index_add_(0, parent, base[children])
    wanted = base.clone()
    wanted[children] /= base[parent]
    if law.exclusive_siblings:
        competes = forest.n_children[parent] >= 2
        wanted[children] *= 1 + competes * (siblings[parent] - base[children]).clamp_min(0) / base[parent]
    return wanted.clamp(max=1)


def make_forest(law: SyntheticLaw) -> Forest:
    """Number the trees level by level until the features run out."""
    levels = [0, min(law.n_roots, law.n_features)]
    parent = torch.full((law.n_features,), -1)
    for _ in range(law.depth if law.n_roots else 0):
        first, start = levels[-2], levels[-1]
        stop = min(start + (start - first) * law.branching, law.n_features)
        parent[start:stop] = first + torch.arange(stop - start) // law.branching
        levels.append(stop)
    n_children = torch.zeros_like(parent).index_add_(0, parent[parent >= 0], torch.ones_like(parent[parent >= 0]))
    first_child = levels[1] + n_children.cumsum(0) - n_children
    return Forest(tuple(levels), parent, first_child, n_children)


def exclusive_groups(truth: Truth) -> Bool[Tensor, " n_features"]:
    """Return which features have children of which at most one fires."""
    return (truth.forest.n_children >= 2) & truth.law.exclusive_siblings


def _directions(law: SyntheticLaw) -> tuple[Float[Tensor, "n_features d_in"], Float[Tensor, " d_in"]]:
    generator = torch.Generator().manual_seed(law.seed)
    vectors = torch.randn(law.n_features, law.d_in, generator=generator)
    vectors /= vectors.norm(dim=1, keepdim=True).clamp_min(1e-8)
    bias = torch.zeros(law.d_in)
    if law.bias_norm:
        bias = torch.randn(law.d_in, generator=generator)
        bias *= law.bias_norm / bias.norm().clamp_min(1e-8)
    return orthogonalise(vectors, law.orthogonalisation_steps, law.orthogonalisation_lr), bias


def _generator(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
