"""Measure in a model's own forward pass which canonical hook points its blocks have, and where.

The model runs on a few tokens while random activations replace the outputs of attention and MLP. This shows what a
block adds to the residual stream, independently of the weights. A kind of hook point is only offered if its identity
holds (`Finding.identity`); otherwise it is refused with a reason (`Finding.reason`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .hook_points import ResolvedHookPoint
from .loading.placement import is_divided, is_spread
from .probe.block_probe import BlockProbe
from .probe.blocks import Blocks, block_lists, text_config
from .probe.finding import Finding, Findings
from .probe.passes import Passes
from .probe.probe import Place, Record, run_recorded
from .probe.stream import check_stream

FLOAT32_COPY_PARAMETERS = 1 << 28
"""Largest model that is also measured as a float32 copy, of 1 GiB."""


def measure(model: nn.Module, layers: Iterable[int] | None = None) -> tuple[Blocks | None, Findings]:
    """Return the text model's blocks, and the finding for each kind of hook point in the blocks of these layers.

    Identities are measured in float32: in a float32 copy, if the model has another data type and at most
    `FLOAT32_COPY_PARAMETERS` parameters. Which tensors the model writes into, and what a splice replaces, is measured
    in the model itself.
    """
    blocks = running_blocks(model)
    if blocks is None:
        return None, {}
    wanted = sorted(set(range(len(blocks.modules)) if layers is None else layers))
    wanted = [layer for layer in wanted if layer < len(blocks.modules)]
    findings = _measure(model, blocks, wanted)
    if (exact := _in_float32(model)) is not None:
        listed = exact.get_submodule(blocks.path)
        assert isinstance(listed, nn.ModuleList)
        sharper = _measure(exact, Blocks(blocks.path, listed), wanted)
        findings = {key: _both(found, sharper[key]) for key, found in findings.items()}
    return blocks, findings


def certificate(model: nn.Module, hook_points: Mapping[str, ResolvedHookPoint]) -> dict[str, Any]:
    """Return the measurements of these hook points for a store's metadata, as strings and booleans only.

    Measured numbers differ between machines, and the metadata of a harvest must not depend on the machine.
    """
    return {
        "measured_in": measured_in(model),
        "hook_points": {
            name: {
                "module": hook_point.module_path,
                "side": hook_point.kind,
                "identity": hook_point.identity or "the module's own output",
                "derived": hook_point.derived,
                "cloned": hook_point.clone,
                "splice": bool(hook_point.splice),
            }
            for name, hook_point in hook_points.items()
        },
    }


def measured_in(model: nn.Module) -> str:
    """Return the data type that the identities of a model are measured in."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return "float32" if _copies(model) else str(dtype).removeprefix("torch.")


def _copies(model: nn.Module) -> bool:
    """Return whether a float32 copy is possible and small enough: no weights are quantised, spread or divided."""
    parameters = list(model.parameters())
    if is_spread(model) or is_divided(model) or any(parameter.is_meta for parameter in parameters):
        return False
    plain = all(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in parameters)
    return plain and sum(map(torch.Tensor.numel, parameters)) <= FLOAT32_COPY_PARAMETERS


def _in_float32(model: nn.Module) -> nn.Module | None:
    return copy.deepcopy(model).float() if _copies(model) else None


def _both(found: Finding, exact: Finding) -> Finding:
    """Combine the findings in the model's own data type and in float32: return one that holds in both."""
    if found.place is None:
        return found
    if exact.place is None:
        return exact
    if found.place != exact.place or found.scale != exact.scale:
        return Finding(
            reason=f"in the model's own data type it is {found.scale:.6g} times the activation at {found.place.path}, "
            f"in float32 {exact.scale:.6g} times the activation at {exact.place.path}"
        )
    return replace(found, splice=found.splice if exact.splice else "")


def running_blocks(model: nn.Module) -> Blocks | None:
    """Return the likeliest list of blocks, by name and size, whose blocks all run in a forward pass."""
    lists = list(block_lists(model))
    ran: set[nn.Module] = set()
    with ExitStack() as stack:
        for block in {block for found in lists for block in found.modules}:
            stack.callback(block.register_forward_hook(lambda module, *_: ran.add(module)).remove)
        run_recorded(model, [])
    return next((found for found in lists if ran.issuperset(found.modules)), None)


def _measure(model: nn.Module, blocks: Blocks, layers: list[int]) -> Findings:
    """Measure the blocks of these layers in one precision."""
    passes = Passes(model, blocks, layers)
    probes: list[BlockProbe] = []
    findings: Findings = {}
    for layer in layers:
        path = f"{blocks.path}.{layer}"
        if Place(path, "input") not in passes.natural.values or Place(path, "output") not in passes.natural.values:
            findings |= {(layer, kind): Finding(reason=_NOT_ONE) for kind in BlockProbe.kinds}
            continue
        probes.append(BlockProbe(layer, path, blocks.modules[layer], text_config(model), passes.natural))
    stages = [probe.stages() for probe in probes]
    pending = [(stage, next(stage)) for stage in stages]
    while pending:  # each pass runs one stage of every block; their inputs are fixed, so blocks do not interfere
        record = passes.run([edit for _, edits in pending for edit in edits])
        advanced = []
        for stage, _ in pending:
            try:
                advanced.append((stage, stage.send(record)))
            except StopIteration:
                pass
        pending = advanced
    for probe in probes:
        findings |= {(probe.layer, kind): found for kind, found in probe.findings.items()}
    check_stream(passes, probes, findings)
    changed = passes.natural.changed()
    return {key: _readable(found, passes.natural, changed) for key, found in findings.items()}


def _readable(found: Finding, natural: Record, changed: set[Place]) -> Finding:
    """Set whether a finding must be copied; refuse it if a hook would not read one activation per pass."""
    if found.place is None:
        return found
    if found.place in natural.flat:
        return Finding(
            reason=f"the activation of {found.place.path} has no batch dimension: it is [batch * context, d]"
        )
    if found.place in natural.repeated:
        return Finding(reason=f"{found.place.path} runs more than once per forward pass")
    return replace(found, clone=found.place in changed)


_NOT_ONE = "the block does not read and return one activation of shape [batch, context, d] for each token"
