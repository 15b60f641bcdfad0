"""The hook points that an SAE reads and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import ConfigError


@dataclass(frozen=True)
class Wiring:
    """The canonical names of the hook points that an SAE reads and writes; their rows are concatenated in this order.

    With `skip`, a linear map from the rows read is added to the rows written. With `cross_layer`, the i-th hook point
    read is paired with the i-th one written, and its latents write to that one and to all later ones.

    Raises:
        ConfigError: a list is empty or names a hook point twice, a skip path would copy what it should reconstruct, or
            the layers of a cross-layer transcoder do not pair up.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    skip: bool = False
    cross_layer: bool = False

    def __post_init__(self) -> None:
        """Check the names."""
        for what, names in (("reads", self.reads), ("writes", self.writes)):
            if not names:
                raise ConfigError(f"{what} is empty, expected at least one hook point")
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ConfigError(f"{what} has '{twice}' twice, expected each hook point once")
        both = [name for name in self.reads if name in self.writes]
        if self.skip and both:
            raise ConfigError(
                f"'{both[0]}' is both read and written, so a skip path would copy it; leave skip out, or write "
                "other hook points"
            )

        if self.cross_layer and (len(self.reads) != len(self.writes) or len(self.reads) < 2):
            raise ConfigError(
                f"cross_layer = true with {len(self.reads)} hook points to read and {len(self.writes)} to write; "
                "expected the same number of both, at least two, in the order of the model's layers"
            )
        if self.cross_layer and self.skip:
            raise ConfigError("a cross-layer transcoder has no skip path; leave skip or cross_layer out")

    @classmethod
    def of(
        cls,
        reads: str | Sequence[str],
        writes: str | Sequence[str] | None = None,
        skip: bool = False,
        cross_layer: bool = False,
    ) -> Wiring:
        """Return the wiring for one or several hook points; by default, `writes` is the same as `reads`."""
        read = (reads,) if isinstance(reads, str) else tuple(reads)
        written = read if writes is None else (writes,) if isinstance(writes, str) else tuple(writes)
        return cls(read, written, skip, cross_layer)

    @property
    def hook_points(self) -> tuple[str, ...]:
        """All hook points, without duplicates."""
        return tuple(dict.fromkeys(self.reads + self.writes))

    @property
    def kind(self) -> str:
        """The kind of SAE that these hook points make.

        `sae` writes the hook point that it reads, `transcoder` another one; `crosscoder` reads or writes several;
        `cross_layer` pairs them by layer.
        """
        if self.cross_layer:
            return "cross_layer"
        if len(self.reads) > 1 or len(self.writes) > 1:
            return "crosscoder"
        return "sae" if self.reads == self.writes else "transcoder"
