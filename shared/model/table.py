"""Print the hook points that were measured in a model."""

from __future__ import annotations

from ..core.compute.device import choose_device
from ..core.terminal.results import print_result
from .capture import MODULE_PATHS_NOTE
from .certificate import Findings, measure, measured_in
from .hook_points import KINDS
from .hooks_config import HooksConfig
from .language_model import load_model
from .loading.placement import spread_of
from .probe.finding import Finding

_WIDEST = max(map(len, KINDS))


def print_hook_points(config: HooksConfig) -> None:
    """Load a model, measure its hook points and print them, with equal blocks grouped."""
    model = load_model(
        config.model,
        config.model_dtype,
        choose_device(config.device),
        config.revision,
        adapter=config.adapter,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
        spread=spread_of(config.device_map, config.max_memory, config.offload_folder, config.device),
    )
    blocks, findings = measure(model)
    if blocks is None:
        print_result(
            f"{type(model).__name__} has no list of blocks that all run in a forward pass; {MODULE_PATHS_NOTE}"
        )
        return
    print_result(
        f"{type(model).__name__}: {len(blocks.modules)} blocks in {blocks.path}, measured in {measured_in(model)}"
    )
    for layers, lines in group_blocks(blocks.path, len(blocks.modules), findings):
        print_result("\n".join(["", layers, *(f"  {line}" for line in lines)]))
    print_result(f"\nA hook point is named blocks.N.KIND; {MODULE_PATHS_NOTE}.")


def group_blocks(path: str, n_blocks: int, findings: Findings) -> list[tuple[str, list[str]]]:
    """Return a heading, such as "blocks 0 to 3", and the lines of each group of blocks with the same hook points."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for layer in range(n_blocks):
        lines = (_line(kind, findings[layer, kind]).replace(f"{path}.{layer}", f"{path}.N") for kind in KINDS)
        groups.setdefault(tuple(lines), []).append(layer)
    return [(_heading(layers), list(lines)) for lines, layers in groups.items()]


def _heading(layers: list[int]) -> str:
    """Describe layers by their ranges: "blocks 0 to 3, 5"."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and ranges[-1][-1] == layer - 1:
            ranges[-1] = [ranges[-1][0], layer]
        else:
            ranges.append([layer])
    named = ", ".join(" to ".join(map(str, ends)) for ends in ranges)
    return f"block{'s' if len(layers) > 1 else ''} {named}"


def _line(kind: str, found: Finding) -> str:
    if found.place is None:
        return f"{kind:<{_WIDEST}}  refused: {found.reason}"
    notes = [found.identity]
    if found.derived:
        notes.append(f"taken as {found.derived}")
    if found.clone:
        notes.append("copied, because the model writes into it later")
    if not found.splice:
        notes.append("read-only: nothing can be spliced in")
    side = "input" if found.place.side == "input" else "output"
    return f"{kind:<{_WIDEST}}  {found.d_in:>6}  {found.place.path} ({side})  {'; '.join(notes)}"
