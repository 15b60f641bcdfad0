"""Freeze what is not linear between a model's MLPs: attention patterns and the scales of norms.

A pass over a prompt records the result of every softmax and the scale of every norm. Later passes use them again, so
that the residual stream is an affine function of the token embeddings and of the MLPs' outputs. Nothing is known of
model families: norms are recognised by what they compute, and patterns by the softmax that makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...shared.core.errors import ModelError
from ...shared.model.probe.arguments import input_argument
from ...shared.model.probe.norms import Affine, affine_of, parameters_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SOFTMAX = (torch.softmax, torch.Tensor.softmax, nn.functional.softmax)
_PATTERN_DIMENSIONS = 3


class Frozen:
    """A model's attention patterns and norm scales on one prompt, to be recorded and then replayed.

    Attributes:
        norms: the model's norms, and what each computes.
        normalized: in a pass, each norm's result before its weight and bias.
    """

    def __init__(self, model: PreTrainedModel, tokens: Int64[Tensor, "1 context"]):
        self.model = model
        self.norms = find_norms(model, tokens)
        self.normalized: dict[nn.Module, Tensor] = {}
        self._patterns: list[Tensor] = []
        self._scales: dict[nn.Module, list[Tensor]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within this context, one pass over one prompt is recorded."""
        self._patterns.clear()
        self._scales = {norm: [] for norm in self.norms}

        def pattern(found: Tensor) -> Tensor:
            self._patterns.append(found.detach())
            return found

        def scale(norm: nn.Module, found: Tensor) -> Tensor:
            self._scales[norm].append(found.detach())
            return found

        with self._hooks(pattern, scale):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Within this context, one pass over copies of the prompt uses what was recorded."""
        patterns = iter(self._patterns)
        scales = {norm: iter(some) for norm, some in self._scales.items()}

        def pattern(found: Tensor) -> Tensor:
            return next(patterns).expand_as(found)

        with self._hooks(pattern, lambda norm, _: next(scales[norm])):
            yield

    @contextmanager
    def _hooks(
        self, pattern: Callable[[Tensor], Tensor], scale: Callable[[nn.Module, Tensor], Tensor]
    ) -> Iterator[None]:
        self.normalized.clear()

        def on_norm(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            affine, x = self.norms[norm], _only_input(args, kwargs)
            centred = x - x.mean(dim=-1, keepdim=True) if affine.centres else x
            normalized = centred * scale(norm, (centred.square().mean(dim=-1, keepdim=True) + affine.eps).rsqrt())
            self.normalized[norm] = normalized
            weight, bias = parameters_of(norm)
            new = normalized if weight is None else normalized * (affine.offset + weight)
            return new if bias is None else new + bias

        with ExitStack() as stack:
            for norm in self.norms:
                stack.callback(norm.register_forward_hook(on_norm, with_kwargs=True).remove)
            stack.enter_context(eager_attention(self.model))
            stack.enter_context(_EachPattern(pattern))
            yield


class _EachPattern(TorchFunctionMode):
    """Pass the result of each softmax over more than a row per token through a function."""

    def __init__(self, change: Callable[[Tensor], Tensor]):
        super().__init__()
        self.change = change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and change its result if it is a softmax."""
        result = func(*args, **(kwargs or {}))
        if func in _SOFTMAX and result.ndim >= _PATTERN_DIMENSIONS:
            return self.change(result)
        return result


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within this context, attention is computed step by step, with a softmax that can be seen."""
    before = model.config._attn_implementation
    if before is None or before == "eager":
        yield
        return
    try:
        model.set_attn_implementation("eager")
    except ValueError as error:
        raise ModelError(f"the attention of {type(model).__name__} cannot be frozen: {error}") from None
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def find_norms(model: PreTrainedModel, tokens: Int64[Tensor, "1 context"]) -> dict[nn.Module, Affine]:
    """Return the modules that normalise their input, measured in a pass over some tokens."""
    found: dict[nn.Module, Affine] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        argument = input_argument(args, kwargs)
        if module in found or argument is None or not isinstance(output, Tensor):
            return
        x: Tensor = kwargs[argument] if isinstance(argument, str) else args[argument]
        if x.shape != output.shape or not x.is_floating_point() or torch.equal(x, output):
            return
        affine = affine_of(module, x, output)
        if affine is not None:
            found[module] = affine

    with ExitStack() as stack, torch.no_grad():
        for module in model.modules():
            if next(module.children(), None) is None:
                stack.callback(module.register_forward_hook(look, with_kwargs=True).remove)
        model(input_ids=tokens, use_cache=False)
    return found


def _only_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Float[Tensor, "*batch d"]:
    argument = input_argument(args, kwargs)
    assert argument is not None
    return kwargs[argument] if isinstance(argument, str) else args[argument]
