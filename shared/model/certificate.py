"""Measure in a model's own forward pass which canonical hook points its blocks have, and where.

A few tokens run through the model while random activations are put in place of what attention and MLP return, so that
what a block adds to the residual stream is seen whatever the weights are. Each kind of hook point is offered only where
its identity holds (`Finding.identity`), and otherwise refused with what the tensor there is (`Finding.reason`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..hook_points import ResolvedHookPoint
from .block_probe import BlockProbe
from .blocks import Blocks, block_lists, text_config
from .finding import Finding
from .probe import Edit, Place, Record, run
from .scales import same

FLOAT32_COPY_PARAMETERS = 1 << 28
"""Largest model that is measured as a copy in float32 too: 1 GiB of it."""

Findings = dict[tuple[int, str], Finding]


def measure(model: nn.Module, layers: Iterable[int] | None = None) -> tuple[Blocks | None, Findings]:
    """Return the text model's blocks, and what was found of each kind of hook point in the blocks of these layers.

    Identities are measured in float32: in a copy, where the model is of another type and has at most
    `FLOAT32_COPY_PARAMETERS`. What the model writes into, and what a splice replaces, is measured in the model itself.
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
    """Return what was measured of these hook points, for a store's metadata: strings and truth values alone.

    Numbers would differ between machines, and the metadata of one harvest must not.
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
    """Tell whether a copy of the model in float32 is small enough, and possible: no weights are quantised or away."""
    parameters = list(model.parameters())
    plain = all(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in parameters)
    return (
        plain
        and not any(p.is_meta for p in parameters)
        and sum(map(torch.Tensor.numel, parameters)) <= FLOAT32_COPY_PARAMETERS
    )


def _in_float32(model: nn.Module) -> nn.Module | None:
    return copy.deepcopy(model).float() if _copies(model) else None


def _both(found: Finding, exact: Finding) -> Finding:
    """Return a finding that holds in both measurements: the model's own, of which the exact one agrees."""
    if found.place is None:
        return found
    if exact.place is None:
        return exact
    if found.place != exact.place or found.scale != exact.scale:
        return Finding(reason=f"{found.place.path} holds it in {exact.place.path}'s place as rounded")
    return replace(found, splice=found.splice if exact.splice else "")


def running_blocks(model: nn.Module) -> Blocks | None:
    """Return the first list of blocks, by name and size, all of which a pass over tokens runs through."""
    lists = list(block_lists(model))
    ran: set[nn.Module] = set()
    with ExitStack() as stack:
        for block in {block for found in lists for block in found.modules}:
            stack.callback(block.register_forward_hook(lambda module, *_: ran.add(module)).remove)
        run(model, [])
    return next((found for found in lists if ran.issuperset(found.modules)), None)


def _measure(model: nn.Module, blocks: Blocks, layers: list[int]) -> Findings:
    """Measure the blocks of these layers in one precision."""
    listed = list(blocks.modules)
    last = len(listed) - 1
    inside = [
        (f"{blocks.path}.{layer}" + (f".{path}" if path else ""), module)
        for layer in layers
        for path, module in listed[layer].named_modules()
    ]
    around = [(f"{blocks.path}.{layer}", block) for layer, block in enumerate(listed) if layer not in layers]
    natural = _natural_pass(model, [*inside, *around, *_outside(model, blocks)])
    probes: list[BlockProbe] = []
    findings: Findings = {}
    for layer in layers:
        path = f"{blocks.path}.{layer}"
        if Place(path, "input") not in natural.values or Place(path, "output") not in natural.values:
            findings |= {(layer, kind): Finding(reason=_NOT_ONE) for kind in BlockProbe.kinds}
            continue
        probes.append(BlockProbe(layer, path, listed[layer], text_config(model), natural))
    stop = listed[layers[-1] + 1] if layers and layers[-1] < last else None

    def together(edits: Iterable[Edit]) -> Record:
        return run(model, inside, list(edits), stop)

    stages = [probe.stages() for probe in probes]
    pending = [(stage, next(stage)) for stage in stages]
    while pending:  # each pass serves one stage of every block: their inputs are fixed, so blocks do not mix
        record = together(edit for _, edits in pending for edit in edits)
        advanced = []
        for stage, _ in pending:
            try:
                advanced.append((stage, stage.send(record)))
            except StopIteration:
                pass
        pending = advanced
    for probe in probes:
        findings |= {(probe.layer, kind): found for kind, found in probe.findings.items()}
    _check_stream(model, blocks, probes, natural, findings)
    changed = natural.changed()
    return {key: _readable(found, natural, changed) for key, found in findings.items()}


def _readable(found: Finding, natural: Record, changed: set[Place]) -> Finding:
    """Return a finding with what reading it takes, or refuse it where a hook would not read one activation a pass."""
    if found.place is None:
        return found
    if found.place in natural.flat:
        return Finding(reason=f"{found.place.path} holds its tokens in one row, without the batch's dimension")
    if found.place in natural.repeated:
        return Finding(reason=f"{found.place.path} runs more than once in a pass")
    return replace(found, clone=found.place in changed)


_ENDS = {"resid_pre": "input", "resid_post": "output"}
_NOT_ONE = "the block does not read and return one activation of shape [batch, context, d] for each token"


def _natural_pass(model: nn.Module, recorded: list[tuple[str, nn.Module]]) -> Record:
    """Run the model as it is, with its own hidden states where it gives them."""
    try:
        return run(model, recorded, output_hidden_states=True)
    except (TypeError, ValueError, NotImplementedError):
        return run(model, recorded)


def _outside(model: nn.Module, blocks: Blocks) -> list[tuple[str, nn.Module]]:
    """Return the modules that neither are in the blocks nor hold them."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if not path.startswith(f"{blocks.path}.") and not blocks.path.startswith(path) and not list(module.children())
    ]


def _check_stream(
    model: nn.Module, blocks: Blocks, probes: list[BlockProbe], natural: Record, findings: Findings
) -> None:
    """Check that a block's output is the next one's input, also when replaced, and the library's hidden state."""
    last = len(blocks.modules) - 1
    hidden: Any = getattr(natural.output, "hidden_states", None)
    hidden = hidden if isinstance(hidden, (tuple, list)) and len(hidden) == last + 2 else None
    if any(_foreign_hooks(block) for block in blocks.modules):
        hidden = None  # the library may list what blocks return before the caller's own hooks change it
    if hidden is not None and all(same(hidden[probe.layer], probe.natural_post) for probe in probes):
        hidden = None  # Mamba and RWKV list what their blocks return, not what they read
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
    _check_replaced_post(model, blocks, probes, natural, findings)


def _foreign_hooks(block: nn.Module) -> bool:
    """Tell whether a block has hooks beside those by which transformers itself lists hidden states."""
    hooks = [*block._forward_hooks.values(), *block._forward_pre_hooks.values()]
    return any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


def _holds(record: Record, place: Place, value: torch.Tensor) -> bool:
    """Tell whether this is what was recorded at a place."""
    return place in record.values and same(record.values[place], value)


def _is_hidden(hidden: Any, probe: BlockProbe, is_last: bool, natural: Record) -> bool:
    """Tell whether a block's output is the library's hidden state, which of the last block is after the final norm."""
    state = hidden[probe.layer + 1]
    if same(state, probe.natural_post):
        return True
    if not is_last:
        return False
    readers = [p.path for p, value in natural.values.items() if p.side == "input" and same(value, probe.natural_post)]
    results = [natural.values.get(Place(path, "output")) for path in readers]
    return any(result is not None and same(state, result) for result in results)


def _check_replaced_post(
    model: nn.Module, blocks: Blocks, probes: list[BlockProbe], natural: Record, findings: Findings
) -> None:
    """Put noise in place of the blocks' outputs and check that what comes after reads it."""
    last = len(blocks.modules) - 1
    edits = {probe.layer: Edit(Place(probe.path, "output"), probe.noise(9, probe.natural_post)) for probe in probes}
    after = [(f"{blocks.path}.{layer + 1}", blocks.modules[layer + 1]) for layer in edits if layer < last]
    outside = _outside(model, blocks) if last in edits else []
    record = run(model, [*after, *outside], list(edits.values()))
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
