"""Which hook points an SAE reads and which it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import ConfigError


@dataclass(frozen=True)
class Wiring:
    """What an SAE reads and what it writes: canonical names of hook points, whose rows lie side by side in this order.

    With `skip` a linear path leads from the rows that are read to those that are written.

    Raises:
        ConfigError: a list is empty or names a hook point twice, or a skip path would copy what it is to reconstruct.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    skip: bool = False

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

    @classmethod
    def of(cls, reads: str | Sequence[str], writes: str | Sequence[str] | None = None, skip: bool = False) -> Wiring:
        """Return the wiring of hook points given one or several; without `writes` those that are read are written."""
        read = (reads,) if isinstance(reads, str) else tuple(reads)
        written = read if writes is None else (writes,) if isinstance(writes, str) else tuple(writes)
        return cls(read, written, skip)

    @property
    def hook_points(self) -> tuple[str, ...]:
        """Return all hook points, each once."""
        return tuple(dict.fromkeys(self.reads + self.writes))

    @property
    def kind(self) -> str:
        """Return `sae` (writes the hook point that it reads), `transcoder` (writes another) or `crosscoder`.

        A crosscoder reads or writes several hook points.
        """
        if len(self.reads) > 1 or len(self.writes) > 1:
            return "crosscoder"
        return "sae" if self.reads == self.writes else "transcoder"
