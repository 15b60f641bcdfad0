"""The harvest's progress bar, with tokens/s, GB written and compression ratio; lines if there is no terminal."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from ..shared.core.terminal.progress import progress

if TYPE_CHECKING:
    from ..shared.store import ActivationStoreWriter


class HarvestProgress:
    """A bar over the tokens of `n_contexts` contexts, of which `n_done` are already stored."""

    def __init__(
        self,
        writer: ActivationStoreWriter,
        context_size: int,
        n_contexts: int,
        n_done: int,
        disable: bool | None = None,
    ) -> None:
        self._writer = writer
        self._context_size = context_size
        self._bar = progress(
            total=n_contexts * context_size,
            initial=n_done * context_size,
            unit="token",
            unit_scale=True,
            desc="harvest",
            disable=disable,
        )

    def update(self, n_contexts: int) -> None:
        """Count contexts that were passed to the writer."""
        self._show(n_contexts, self._writer.bytes_written, self._writer.raw_bytes)

    def _show(self, n_contexts: int, bytes_written: int, raw_bytes: int) -> None:
        if not self._bar.disable:
            ratio = f"{raw_bytes / bytes_written:.2f}" if bytes_written else "?"
            self._bar.set_postfix_str(f"{bytes_written / 1e9:.2f} GB written, ratio {ratio}", refresh=False)
        self._bar.update(n_contexts * self._context_size)

    def __enter__(self) -> Self:
        """Show the bar."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the bar."""
        self._bar.close()
