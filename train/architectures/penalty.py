"""What architectures with a sparsity penalty share: its weight, its growth, and a target L0."""

from __future__ import annotations

from typing import Annotated, ClassVar, TypeVar

from msgspec import Meta

from ...shared.core.errors import ConfigError
from ..config import SaeConfig
from .base import Architecture, check_number_of_latents
from .contract import L0Target

P = TypeVar("P", bound="PenaltyConfig")


class PenaltyConfig(SaeConfig, frozen=True, kw_only=True):
    """Configuration of an architecture that penalises active latents."""

    target_l0: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="L0 to reach: a controller then sets the weight of the sparsity penalty."),
    ] = None
    sparsity_warmup_steps: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(
            description="Steps over which the sparsity penalty grows; if not given, a twentieth of the run, or all of "
            "it with tanh."
        ),
    ] = None

    coefficient_key: ClassVar[str | None] = None
    """The key that gives the penalty's weight, if `target_l0` may stand in its place."""

    def __post_init__(self) -> None:
        """Check that the penalty has a weight, or a target that determines it."""
        super().__post_init__()
        check_number_of_latents(self, "target_l0", self.target_l0)
        if self.coefficient_key is not None and self.target_l0 is None and self.coefficient is None:
            raise ConfigError(
                f"architecture '{self.architecture}' needs '{self.coefficient_key}', the weight of its sparsity "
                "penalty, or 'target_l0'; give one in the [[sae]] table"
            )

    @property
    def coefficient(self) -> float | None:
        """Return the weight of the penalty, if it is given."""
        return getattr(self, self.coefficient_key) if self.coefficient_key else None

    @property
    def name_ending(self) -> str:
        """The end of the default name."""
        if self.coefficient_key is None:
            return ""
        return "-l0-{target_l0}" if self.target_l0 is not None else "-l1-{l1_coefficient}"


class PenaltyArchitecture(Architecture[P]):
    """Base of the architectures with a sparsity penalty, which is multiplied by a step's `sparsity_scale`.

    With `target_l0`, a controller sets the penalty's weight, which `sparsity_scale` then is.
    """

    sparsity_warmup_fraction: ClassVar[float] = 1 / 20
    first_coefficient: ClassVar[float] = 1.0
    """The penalty's weight at the first step where a controller sets it and none is given."""
    resolved = (*Architecture.resolved, "sparsity_warmup_fraction")

    def sparsity_warmup_steps(self, n_steps: int) -> int:
        """Return the number of steps over which the penalty grows to its full weight."""
        given = self.config.sparsity_warmup_steps
        fraction = 0.0 if self.l0_target else self.sparsity_warmup_fraction
        return int(n_steps * fraction) if given is None else given

    @property
    def l0_target(self) -> L0Target | None:
        """The target L0, if one is given."""
        if self.config.target_l0 is None:
            return None
        first = 1.0 if self.config.coefficient_key is None else self.config.coefficient or self.first_coefficient
        return L0Target(self.config.target_l0, first)

    @property
    def penalty_weight(self) -> float:
        """Return the penalty's weight before it is multiplied by `sparsity_scale`."""
        return 1.0 if self.l0_target else self.config.coefficient or 0.0

    @property
    def schedules(self) -> dict[str, tuple[int | None, str]]:
        """The penalty's growth."""
        return {
            "sparsity_warmup_steps": (
                self.config.sparsity_warmup_steps,
                "the sparsity penalty would not reach its weight",
            )
        }
