"""Check that the residual stream runs from block to block: each block reads what the one before it returned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .block_probe import BlockProbe
from .finding import Finding, Findings
from .passes import Passes
from .probe import Place, ProbeEdit, Record
from .scales import same

_ENDS = {"resid_pre": "input", "resid_post": "output"}


def check_stream(passes: Passes, probes: list[BlockProbe], findings: Findings) -> None:
    """Check that each block's output, also when replaced, is the next block's input and the library's hidden state.

    Fills in the identities of `resid_pre` and `resid_post`, or the reasons why they are refused.
    """
    natural, blocks, last = passes.natural, passes.blocks, passes.last
    hidden: Any = getattr(natural.output, "hidden_states", None)
    hidden = hidden if isinstance(hidden, (tuple, list)) and len(hidden) == last + 2 else None
    if any(_foreign_hooks(block) for block in blocks.modules):
        hidden = None  # the library may collect a block's output before the caller's own hooks change it
    if hidden is not None and all(same(hidden[probe.layer], probe.natural_post) for probe in probes):
        hidden = None  # Mamba and RWKV collect their blocks' outputs, not their inputs
    for probe in probes:
        layer = probe.layer
        before, after = Place(f"{blocks.path}.{layer - 1}", "output"), Place(f"{blocks.path}.{layer + 1}", "input")
        follows = layer == 0 or _holds(natural, before, probe.natural_pre)
        leads = layer == last or _holds(natural, after, probe.natural_post)
        listed = hidden is None or same(hidden[layer], probe.natural_pre)
        ends = hidden is None or _is_hidden(hidden, probe, layer == last, natural)
        for kind, linked, of_library, link, at in (
            ("resid_pre", follows, listed, "resid_post of block N - 1, if any", "N"),
            ("resid_post", leads, ends, "resid_pre of block N + 1, if any", "N + 1"),
        ):
            library = "" if hidden is None else f"the library's hidden_states[{at}]"
            if not linked:
                findings[layer, kind] = Finding(reason=f"the block's {_ENDS[kind]} is not {link}, with N = {layer}")
            elif not of_library:
                findings[layer, kind] = Finding(reason=f"the block's {_ENDS[kind]} is not {library}, with N = {layer}")
            else:
                identity = "; ".join(filter(None, (link, library)))
                findings[layer, kind] = replace(findings[layer, kind], identity=identity)
    _check_replaced_post(passes, probes, findings)


def _foreign_hooks(block: nn.Module) -> bool:
    """Return whether a block has hooks other than those with which transformers collects hidden states."""
    hooks = [*block._forward_hooks.values(), *block._forward_pre_hooks.values()]
    return any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


def _holds(record: Record, place: Place, value: torch.Tensor) -> bool:
    """Return whether the value recorded at a place equals this one."""
    return place in record.values and same(record.values[place], value)


def _is_hidden(hidden: Any, probe: BlockProbe, is_last: bool, natural: Record) -> bool:
    """Return whether a block's output is the library's hidden state; the last one may be after the final norm."""
    state = hidden[probe.layer + 1]
    if same(state, probe.natural_post):
        return True
    if not is_last:
        return False
    readers = [p.path for p, value in natural.values.items() if p.side == "input" and same(value, probe.natural_post)]
    results = [natural.values.get(Place(path, "output")) for path in readers]
    return any(result is not None and same(state, result) for result in results)


def _check_replaced_post(passes: Passes, probes: list[BlockProbe], findings: Findings) -> None:
    """Replace the blocks' outputs by noise, and check that the modules downstream read it."""
    blocks, last = passes.blocks, passes.last
    edits = {
        probe.layer: ProbeEdit(Place(probe.path, "output"), probe.noise(9, probe.natural_post)) for probe in probes
    }
    record = passes.run_after(list(edits.values()))
    for layer, edit in edits.items():
        found = findings[layer, "resid_post"]
        if found.place is None:
            continue
        if layer < last:
            value = record.values.get(Place(f"{blocks.path}.{layer + 1}", "input"))
            follows = value is not None and same(value, edit.value)
        else:
            final = getattr(record.output, "last_hidden_state", None)
            values = [v for p, v in record.values.items() if p.side == "input"] + ([final] if final is not None else [])
            follows = any(same(value, edit.value) for value in values)
        if not follows:
            findings[layer, "resid_post"] = replace(found, splice="")
