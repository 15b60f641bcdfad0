"""The laws of synthetic activations: how many features there are, and how they fire."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from ..core.errors import ConfigError

PREFIX = "synthetic:"
"""What the name of a synthetic model begins with, as in `synthetic:synth-1k`."""
HOOK_POINT = "features"
"""The one hook point of a synthetic store."""


class SyntheticLaw(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A distribution of rows, each a sum of the directions of the features that fire in it.

    The settings and their meaning are those of SynthSAEBench (arXiv 2602.14687) and of `sae_lens.synthetic`. Firing
    probabilities follow a Zipf law. The first features are a forest: a child fires only where its parent does, and
    among exclusive siblings at most one fires. A low-rank Gaussian copula correlates the features.
    """

    n_features: Annotated[int, Meta(ge=1)]
    d_in: Annotated[int, Meta(ge=1)]
    zipf_exponent: Annotated[float, Meta(gt=0)] = 0.5
    max_probability: Annotated[float, Meta(gt=0, le=1)] = 0.4
    min_probability: Annotated[float, Meta(gt=0, le=1)] = 5e-4
    n_roots: Annotated[int, Meta(ge=0)] = 0
    branching: Annotated[int, Meta(ge=2)] = 4
    depth: Annotated[int, Meta(ge=1)] = 3
    exclusive_siblings: bool = True
    compensate_probabilities: bool = True
    scale_by_parent: bool = True
    correlation_rank: Annotated[int, Meta(ge=1)] = 25
    correlation_scale: Annotated[float, Meta(ge=0)] = 0.1
    first_magnitude: Annotated[float, Meta(gt=0)] = 5.0
    last_magnitude: Annotated[float, Meta(gt=0)] = 4.0
    magnitude_deviation_mean: float = 0.5
    magnitude_deviation_std: Annotated[float, Meta(ge=0)] = 0.5
    orthogonalisation_steps: Annotated[int, Meta(ge=0)] = 100
    orthogonalisation_lr: Annotated[float, Meta(gt=0)] = 3e-4
    bias_norm: Annotated[float, Meta(ge=0)] = 0.5
    seed: Annotated[int, Meta(ge=0)] = 42

    def __post_init__(self) -> None:
        """Check that the probabilities are in order."""
        if self.min_probability >= self.max_probability:
            raise ConfigError(
                f"min_probability {self.min_probability} must be below max_probability {self.max_probability}"
            )


LAWS = {
    "synth-16k": SyntheticLaw(n_features=16_384, d_in=768, n_roots=128),
    "synth-1k": SyntheticLaw(n_features=1_024, d_in=128, n_roots=8),
}
"""The named laws: SynthSAEBench-16k, and a small one of the same kind that suits two CPU cores."""


def is_synthetic(model: str | None) -> bool:
    """Return whether a model's name is that of a law."""
    return model is not None and model.startswith(PREFIX)


def find_law(model: str) -> SyntheticLaw:
    """Return the law that a model such as `synthetic:synth-1k` names; raise `ConfigError` if there is none."""
    name = model.removeprefix(PREFIX)
    if name not in LAWS:
        raise ConfigError(f"no synthetic law '{name}'; expected one of {', '.join(LAWS)}")
    return LAWS[name]
