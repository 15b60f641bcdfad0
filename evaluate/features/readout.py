"""Find how a model turns the residual stream into logits, by measuring a probe instead of reading module names.

The path from the last block's output to the logits is followed backwards from the unembedding: each module's input must
be the output of the one before it, up to a factor. The modules found are then applied to the probe's residual stream,
and the result must be the probe's logits, up to a factor or an order-preserving function.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ...shared.model.hook_points import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE = (2, 5)
MOST_MODULES = 4
"""Largest number of modules between the last block and the unembedding: a final norm, a projection, or a few more."""


class NoReadoutError(Exception):
    """The path from a model's residual stream to its logits could not be determined."""


class Step(NamedTuple):
    """A module on the path from the residual stream to the unembedding, and the factor on its input."""

    name: str
    module: nn.Module
    factor: float


@dataclass(frozen=True)
class Readout:
    """The modules that a model applies to its residual stream, in order, and its unembedding.

    `factor` is the product of the model's factors on the unembedding's input and on the logits, so that effects are in
    logits. `capped` is true if an order-preserving function follows, such as Gemma 2's softcap. `blocks` is the module
    path of the list of blocks.
    """

    path: tuple[Step, ...]
    weight: Float[Tensor, "vocabulary d"]
    factor: float
    capped: bool
    d_model: int
    blocks: str

    @property
    def has_norm(self) -> bool:
        """Whether the path contains a nonlinear module; every norm is nonlinear."""
        return any(not isinstance(step.module, nn.Linear | nn.Dropout | nn.Identity) for step in self.path)

    def through(self, rows: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d"]:
        """Return the unembedding's input, in float32, for these rows of the residual stream."""
        for _, module, factor in self.path:
            dtype = next((parameter.dtype for parameter in module.parameters()), torch.float32)
            rows = module((rows.float() * factor).to(dtype))
        return rows.float()

    def directions(self, rows: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d"]:
        """Map directions of the residual stream through the path, in float32 and without its biases."""
        return self.factor * (self.through(rows) - self.through(torch.zeros_like(rows[:1])))

    def describe(self) -> str:
        """Return the path in words."""
        names = [f"{step.name} ({type(step.module).__name__})" for step in self.path]
        text = ", ".join([*names, "the unembedding"]) + (f", times {self.factor:g}" if self.factor != 1 else "")
        text += ", before a function that keeps the order of the logits" if self.capped else ""
        return text if self.has_norm else f"{text}; the model has no final norm"


class _Call(NamedTuple):
    name: str
    module: nn.Module
    input: Tensor
    output: Tensor


@torch.inference_mode()
def find_readout(model: PreTrainedModel) -> Readout:
    """Find the path from the last block to the logits, and check it on a probe of a few tokens.

    Raises:
        NoReadoutError: the model has no unembedding or blocks, or computes its logits differently.
    """
    unembedding = model.get_output_embeddings()
    weight = getattr(unembedding, "weight", None)
    if not isinstance(unembedding, nn.Module) or not isinstance(weight, Tensor):
        raise NoReadoutError(f"{type(model).__name__} has no unembedding")
    blocks, stream, calls, logits = _probe(model)
    head = next((call for call in calls if call.module is unembedding), None)
    if head is None:
        raise NoReadoutError(f"{type(model).__name__} does not use its unembedding to compute its logits")
    path, inner = _path(stream, head, calls)
    outer = _factor(head.output, logits)
    if outer is None and not _keeps_order(head.output, logits):
        raise NoReadoutError(f"the logits of {type(model).__name__} are not the output of its unembedding")
    bias = getattr(unembedding, "bias", None)
    factor = inner * (1.0 if outer is None else outer)
    readout = Readout(path, weight, factor, outer is None, stream.shape[-1], blocks)
    expected = head.output.float() - (0 if bias is None else bias.float())
    if weight.ndim != 2 or weight.shape[1] != head.input.shape[-1]:
        raise NoReadoutError(f"the unembedding of {type(model).__name__} is not a matrix of the width of its input")
    if not _close(
        inner * readout.through(stream) @ weight.float().T, expected, _tolerance(logits, head.output, weight)
    ):
        raise NoReadoutError(f"{type(model).__name__} computes its logits differently from {readout.describe()}")
    return readout


def _probe(model: PreTrainedModel) -> tuple[str, Tensor, list[_Call], Tensor]:
    """Run the model on a few tokens.

    Return the path of its blocks, the last block's output, the calls of modules without submodules, and the logits.
    """
    calls: list[_Call] = []
    streams: dict[str, list[Tensor]] = {}

    def note(name: str) -> Any:
        def on_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            argument = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if argument is not None and isinstance(output, Tensor) and argument.is_floating_point():
                calls.append(_Call(name, module, _rows(argument), _rows(output)))

        return on_call

    def note_block(path: str) -> Any:
        def on_block(_: nn.Module, __: Any, output: Any) -> None:
            first = output if isinstance(output, Tensor) else output[0]
            streams.setdefault(path, []).append(_rows(first))

        return on_block

    tokens = _probe_tokens(model).to(next(model.parameters()).device)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module):
                stack.callback(module[-1].register_forward_hook(note_block(name)).remove)
            elif name and not any(True for _ in module.children()):
                stack.callback(module.register_forward_hook(note(name), with_kwargs=True).remove)
        output = model(input_ids=tokens, **({"use_cache": False} if hasattr(model.config, "use_cache") else {}))
    found = find_blocks(model)
    path = found[0] if found is not None and found[0] in streams else next(iter(_outermost(streams)), None)
    if path is None or len(streams[path]) != 1:
        raise NoReadoutError(f"{type(model).__name__} has no list of blocks that runs once per forward pass")
    inside = f"{path}."
    outside = [call for call in calls if not call.name.startswith(inside)]
    return path, streams[path][0], outside, _rows(output.logits)


def _outermost(paths: Iterable[str]) -> list[str]:
    """Return the paths that are not inside another one, in order."""
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


def _probe_tokens(model: PreTrainedModel) -> Int64[Tensor, "batch context"]:
    """Return ordinary tokens from the middle of the vocabulary, without those that the configuration names."""
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    size = len(embeddings)
    described = {**model.config.to_dict(), **model.config.get_text_config().to_dict()}
    special = {value for key, value in described.items() if "token" in key and isinstance(value, int)}
    tokens = [token % size for token in range(size // 2, size // 2 + size) if token % size not in special]
    n = PROBE[0] * PROBE[1]
    return torch.tensor((tokens * n)[:n]).reshape(PROBE)


def _path(stream: Tensor, head: _Call, calls: Sequence[_Call]) -> tuple[tuple[Step, ...], float]:
    """Return the modules from the residual stream to the unembedding's input, and the factor after the last one."""
    backwards: list[_Call] = []
    factors: list[float] = []
    wanted, left = head.input, [call for call in calls if call.module is not head.module]
    while (factor := _factor(stream, wanted)) is None:
        last = next((i for i in reversed(range(len(left))) if _factor(left[i].output, wanted) is not None), None)
        if last is None or len(backwards) == MOST_MODULES:
            raise NoReadoutError("the unembedding reads neither the last block's output nor what modules make of it")
        call, left = left[last], left[:last]
        factors.append(_factor(call.output, wanted) or 1.0)
        backwards.append(call)
        wanted = call.input
    factors.append(factor)  # factors[i] multiplies the input of backwards[i - 1], and factors[0] the unembedding's
    steps = [Step(call.name, call.module, factors[i + 1]) for i, call in enumerate(backwards)]
    return tuple(reversed(steps)), factors[0]


def _rows(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().flatten(0, -2)


def _tolerance(*tensors: Tensor) -> float:
    """Return the relative error to expect for tensors of these data types."""
    return 1e-4 if all(tensor.dtype in (torch.float32, torch.float64) for tensor in tensors) else 2e-2


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max())


def _factor(a: Tensor, b: Tensor) -> float | None:
    """Return f such that f * a = b, rounded to the digits that are certain; None if no such f exists."""
    if a.shape != b.shape:
        return None
    tolerance = max(_tolerance(a, b), 1e-3)
    f = float((a.double() * b.double()).sum() / a.double().square().sum().clamp_min(1e-300))
    f = float(f"{f:.4g}") if abs(f - 1) > tolerance else 1.0
    return f if f != 0 and _close(f * a.double(), b, tolerance) else None


def _keeps_order(a: Tensor, b: Tensor) -> bool:
    """Return whether `b` is an increasing function of `a`, entry by entry."""
    values = b.float().flatten()[a.float().flatten().argsort()]
    return bool((values.diff() >= -_tolerance(a, b) * values.abs().max()).all() and values[-1] > values[0])
