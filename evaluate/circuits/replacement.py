"""The local replacement model of a prompt: transcoders in place of MLPs, with what else is not linear frozen.

On its prompt it computes what the model does: each MLP's output is what its transcoder writes plus an error that is
kept as it was (Anthropic, "Circuit Tracing", March 2025). Token embeddings, latents' decoder rows and errors are its
sources. A latent's pre-activation and a logit are affine functions of the sources, if latents are held as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ...shared.core.errors import ModelError
from ...shared.intervene.attached import Attached
from ...shared.model.capture import reading, splice
from ...shared.model.hook_points import ResolvedHookPoint
from .frozen import Frozen
from .transcoders import Wired, encode_by_group, encoder_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PromptLatents(NamedTuple):
    """The active latents of a prompt, by layer, position and number: one row each."""

    layer: Int64[Tensor, " n"]
    position: Int64[Tensor, " n"]
    number: Int64[Tensor, " n"]
    activation: Float[Tensor, " n"]

    def __len__(self) -> int:
        """Return the number of active latents."""
        return len(self.layer)


class Read(NamedTuple):
    """What a pass gives: the activations that each transcoder reads, and what the unembedding reads."""

    inputs: dict[tuple[int, int], Float[Tensor, "batch context d_in"]]
    final: Float[Tensor, "batch context d_model"]


Held = Literal["latents", "patterns", "nothing"]
_Seed = tuple[int, int, Tensor]
"""A row of the batch, a position, and the direction at it."""


class _Writes(NamedTuple):
    """What latents write to one layer, sorted by position: their columns, positions and vectors."""

    columns: Int64[Tensor, " n"]
    positions: Int64[Tensor, " n"]
    vectors: Float[Tensor, "n d_model"]


class LocalReplacement:
    """A model with transcoders on one prompt, of `context` tokens.

    Attributes:
        latents: the active latents.
        errors: `[n_layers, context, d_model]`, what the transcoders miss; where there is none, the MLP's whole output.
        embeddings: `[context, d_model]`, the token embeddings.
        logits: `[vocabulary]` of the last token, as the model itself computes them.
        clean: what is read on the prompt.
        logit_gap: the largest difference between `logits` and those of this replacement.
        n_backward: backward passes so far.
    """

    def __init__(self, model: PreTrainedModel, wired: Wired, tokens: Int64[Tensor, " context"], skipped: int):
        head = model.get_output_embeddings()
        embedding = model.get_input_embeddings()
        if not isinstance(head, nn.Module) or not isinstance(getattr(head, "weight", None), Tensor):
            raise ModelError(f"{type(model).__name__} has no unembedding matrix; expected a causal language model")
        self.model, self.wired, self.tokens, self.skipped = model, wired, tokens, skipped
        self.head, self.embedding = head, embedding
        self.context, self.n_layers = len(tokens), len(wired.outputs)
        self.dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        self.n_backward = 0
        self._graph: tuple[int, Read, Tensor, list[Tensor]] | None = None
        with torch.no_grad():
            self.logits = model(input_ids=tokens[None], use_cache=False).logits[0, -1]
            self._record()

    def _record(self) -> None:
        """Run the model once as it is, and find latents and errors."""
        self.frozen = Frozen(self.model, self.tokens[None])
        outputs: dict[int, Tensor] = {}
        embeddings: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(self.frozen.recording())
            for layer, point in enumerate(self.wired.outputs):
                stack.enter_context(reading(self.model, point, _keeper(outputs, layer)))
            stack.callback(self.embedding.register_forward_hook(lambda *passed: embeddings.append(passed[-1])).remove)
            read, logits = self._inputs_of(stack, {"input_ids": self.tokens[None]})
        self.logit_gap = float((logits[0, -1] - self.logits).abs().max())
        self.embeddings = embeddings[0][0]
        self._outputs = [outputs[layer][0] for layer in range(self.n_layers)]
        self.clean = read
        self._find_latents()

    def _find_latents(self) -> None:
        """Encode what was read, and set the latents, what they write, the errors and the constant part of outputs."""
        rows: list[tuple[Tensor, ...]] = []
        self._groups: list[tuple[Attached, int, slice]] = []
        parts: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {layer: [] for layer in range(self.n_layers)}
        start = 0
        for site, one in enumerate(self.wired.attached):
            reads = {read: self.clean.inputs[site, read][0] for read in range(len(one.reads))}
            for group, (places, values) in enumerate(encode_by_group(one, reads, self.skipped)):
                n, layer = len(values), self.wired.layer_of(one, group)
                columns = torch.arange(start, start + n, device=values.device)
                rows.append((torch.full_like(places[0], layer), places[0], places[1], values.to(self.dtype)))
                self._groups.append((one, group, slice(start, start + n)))
                start += n
                for write in range(len(one.writes)):
                    decoder = one.decoder(group, write)
                    if decoder is not None:
                        vectors = (values[:, None] * decoder[places[1]]).to(self.dtype)
                        parts[self.wired.target_of(one, write)].append((columns, places[0], vectors))
        device = self.tokens.device
        none = torch.zeros(0, dtype=torch.long, device=device)
        empty = (none, none, none, torch.zeros(0, dtype=self.dtype, device=device))
        self.latents = PromptLatents(*(torch.cat(column) for column in zip(*(rows or [empty]), strict=True)))
        self._writes = {layer: _sorted(some) for layer, some in parts.items() if some}
        self._bias = [torch.zeros_like(output) for output in self._outputs]
        for one in self.wired.attached:
            for write in range(len(one.writes)):
                self._bias[self.wired.target_of(one, write)][self.skipped :] += one.bias(write).to(self.dtype)
        self._fixed = [output.clone() for output in self._outputs]
        for layer, skip in self._skips(self.clean.inputs).items():
            self._fixed[layer] -= skip[0]
        self.errors = torch.stack([fixed - bias for fixed, bias in zip(self._fixed, self._bias, strict=True)])
        for layer, writes in self._writes.items():
            self.errors[layer].index_add_(0, writes.positions, -writes.vectors)

    # Passes

    def _inputs_of(self, stack: ExitStack, arguments: dict[str, Any]) -> tuple[Read, Tensor]:
        """Run the model with the hooks of `stack`, and return what transcoders and the unembedding read, and logits."""
        inputs: dict[tuple[int, int], Tensor] = {}
        final: list[Tensor] = []
        for site, one in enumerate(self.wired.attached):
            for read, point in enumerate(one.reads):
                stack.enter_context(self._reading(point, _keeper(inputs, (site, read))))
        stack.callback(self.head.register_forward_pre_hook(lambda _, args: final.append(args[0])).remove)
        logits = self.model(**arguments, use_cache=False).logits
        return Read(inputs, final[0]), logits

    def _reading(self, point: ResolvedHookPoint, reader: Callable[[Tensor], None]) -> Any:
        """Return a context in which passes call `reader`; a norm's result before its weight is the frozen one."""
        if point.affine is None:
            return reading(self.model, point, reader)
        stack = ExitStack()
        norm = self.model.get_submodule(point.module_path)
        handle = norm.register_forward_hook(lambda *_: reader(self.frozen.normalized[norm]))
        stack.callback(handle.remove)
        return stack

    def _frozen_pass(self, embeddings: Tensor, fixed: Sequence[Tensor]) -> Read:
        """Run copies of the prompt with frozen patterns and scales, with these embeddings and MLP outputs.

        `fixed` are the outputs without skip paths, which are added.
        """
        live: dict[tuple[int, int], Tensor] = {}
        n = len(embeddings)

        def replace(layer: int) -> Callable[[Tensor], Tensor]:
            def new(_: Tensor) -> Tensor:
                return fixed[layer].expand(n, -1, -1) + self._skips(live, layer).get(layer, 0)

            return new

        with ExitStack() as stack:
            stack.enter_context(self.frozen.replaying())
            stack.callback(self.embedding.register_forward_hook(lambda *_: embeddings).remove)
            for site, one in enumerate(self.wired.attached):
                for read, point in enumerate(one.reads):
                    stack.enter_context(self._reading(point, _keeper(live, (site, read))))
            for layer, point in enumerate(self.wired.outputs):
                stack.enter_context(splice(self.model, point, replace(layer)))
            return self._inputs_of(stack, {"input_ids": self.tokens.expand(n, -1)})[0]

    def _skips(
        self, inputs: Mapping[tuple[int, int], Float[Tensor, "batch context d_in"]], only: int | None = None
    ) -> dict[int, Float[Tensor, "batch context d_model"]]:
        """Return what skip paths write to each layer, or to one, from what is read; nothing at skipped tokens."""
        found = {}
        for site, one in enumerate(self.wired.attached):
            for write in range(len(one.writes)):
                layer = self.wired.target_of(one, write)
                if only is not None and layer != only:
                    continue
                reads = {read: x.flatten(0, 1) for (owner, read), x in inputs.items() if owner == site}
                if write in reads and (skip := one.skip(write, reads)) is not None:
                    skip = skip.to(self.dtype).view(-1, self.context, skip.shape[-1]).clone()
                    skip[:, : self.skipped] = 0
                    found[layer] = skip
        return found

    @torch.no_grad()
    def without_sources(self) -> Read:
        """Return what is read if every source is zero: what biases and position embeddings alone give."""
        return self._frozen_pass(torch.zeros_like(self.embeddings)[None], [bias[None] for bias in self._bias])

    @torch.no_grad()
    def respond(self, changes: Mapping[int, Float[Tensor, "batch context d_model"]], held: Held) -> Read:
        """Return what is read if something is added to the outputs of MLPs, by layer, in copies of the prompt.

        `held` says what stays as it was: "latents" (with errors, patterns and norm scales: this is linear), "patterns"
        (and norm scales, while the model's own MLPs run) or "nothing".
        """
        n = len(next(iter(changes.values())))
        if held == "latents":
            fixed = [output[None] + changes.get(layer, 0) for layer, output in enumerate(self._fixed)]
            return self._frozen_pass(self.embeddings.expand(n, -1, -1), fixed)
        with ExitStack() as stack:
            if held == "patterns":
                stack.enter_context(self.frozen.replaying())
            for layer, change in changes.items():
                stack.enter_context(splice(self.model, self.wired.outputs[layer], lambda x, change=change: x + change))
            return self._inputs_of(stack, {"input_ids": self.tokens.expand(n, -1)})[0]

    def change(self, columns: Sequence[int]) -> dict[int, Float[Tensor, "batch context d_model"]]:
        """Return what setting each of these latents to zero adds to the outputs of MLPs, by layer, one copy each."""
        found = {}
        for layer, writes in self._writes.items():
            total = torch.zeros(len(columns), self.context, writes.vectors.shape[1], dtype=self.dtype)
            total = total.to(writes.vectors.device)
            for row, column in enumerate(columns):
                at = writes.columns == column
                total[row, writes.positions[at]] -= writes.vectors[at]
            found[layer] = total
        return found

    def written(self, columns: Sequence[int]) -> Float[Tensor, "latents d_model"]:
        """Return what each of these latents writes, summed over the layers that it writes to."""
        return -torch.stack(list(self.change(columns).values())).sum(dim=(0, 2))

    # Targets and their direct effects

    @property
    def n_sources(self) -> int:
        """Columns of `effects`: latents, then errors by layer and position, then token embeddings."""
        return len(self.latents) + (self.n_layers + 1) * self.context

    def encoder_of(self, column: int) -> tuple[tuple[int, int], Tensor]:
        """Return which input a latent reads, as a key of `Read.inputs`, and its encoder."""
        one, group, _ = next(found for found in self._groups if found[2].start <= column < found[2].stop)
        row = encoder_rows(one, group, self.latents.number[column : column + 1])[0]
        return (self.wired.attached.index(one), one.groups[group].reads[0]), row.to(self.dtype)

    def logit_direction(self, token: int) -> Float[Tensor, " d_model"]:
        """Return the direction of a logit minus the mean of all logits, before any factor or cap on logits."""
        weight = self.head.get_parameter("weight")
        return (weight[token] - weight.mean(dim=0)).to(self.dtype)

    def latent_value(self, read: Read, row: int, column: int) -> float:
        """Return a latent's pre-activation in a row of a pass, without its encoder's bias."""
        key, encoder = self.encoder_of(column)
        return float(read.inputs[key][row, self.latents.position[column]] @ encoder)

    def logit_value(self, read: Read, row: int, token: int) -> float:
        """Return a centred logit of the last token in a row of a pass, without its bias."""
        return float(read.final[row, -1] @ self.logit_direction(token))

    def prepare(self, batch_size: int) -> None:
        """Run the pass that `effects` goes back through, `batch_size` targets at once."""
        embeddings = self.embeddings.expand(batch_size, -1, -1).clone().requires_grad_()
        fixed = [output.expand(batch_size, -1, -1).clone().requires_grad_() for output in self._fixed]
        with torch.enable_grad():
            read = self._frozen_pass(embeddings, fixed)
        self._graph = (batch_size, read, embeddings, fixed)

    def latent_effects(self, columns: Sequence[int]) -> Float[Tensor, "targets sources"]:
        """Return the direct effects of all sources on some latents' pre-activations, from one backward pass."""
        seeds: dict[tuple[int, int] | None, list[_Seed]] = {}
        for row, column in enumerate(columns):
            key, encoder = self.encoder_of(column)
            seeds.setdefault(key, []).append((row, int(self.latents.position[column]), encoder))
        return self._effects(len(columns), seeds)

    def logit_effects(self, tokens: Sequence[int]) -> Float[Tensor, "targets sources"]:
        """Return the direct effects of all sources on some centred logits of the last token."""
        seeds = [(row, self.context - 1, self.logit_direction(token)) for row, token in enumerate(tokens)]
        return self._effects(len(tokens), {None: seeds})

    def _effects(
        self, n: int, seeds: Mapping[tuple[int, int] | None, Sequence[_Seed]]
    ) -> Float[Tensor, "targets sources"]:
        """Go back from directions of what is read, each a row, position and vector; None is the unembedding's input."""
        assert self._graph is not None, "call prepare first"
        batch_size, read, embeddings, fixed = self._graph
        assert n <= batch_size
        outputs, gradients = [], []
        for key, some in seeds.items():
            output = read.final if key is None else read.inputs[key]
            if not output.requires_grad:
                continue
            gradient = torch.zeros_like(output)
            for row, position, vector in some:
                gradient[row, position] = vector
            outputs.append(output)
            gradients.append(gradient)
        found = torch.zeros(n, self.n_sources, dtype=self.dtype, device=embeddings.device)
        if not outputs:
            return found
        leaves = [embeddings, *fixed]
        back = torch.autograd.grad(outputs, leaves, gradients, retain_graph=True, allow_unused=True)
        self.n_backward += 1
        n_latents, context = len(self.latents), self.context
        for layer, gradient in enumerate(back[1:]):
            if gradient is None:
                continue
            gradient = gradient[:n]
            at = n_latents + layer * context
            found[:, at : at + context] = (gradient * self.errors[layer]).sum(dim=-1)
            if layer in self._writes:
                _contract(found, gradient, self._writes[layer])
        if back[0] is not None:
            found[:, n_latents + self.n_layers * context :] = (back[0][:n] * self.embeddings).sum(dim=-1)
        return found


def _keeper(kept: dict[Any, Tensor], key: Any) -> Callable[[Tensor], None]:
    """Return a function that keeps a tensor under a key."""

    def keep(x: Tensor) -> None:
        kept[key] = x

    return keep


def _sorted(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> _Writes:
    columns, positions, vectors = (torch.cat(some) for some in zip(*parts, strict=True))
    order = positions.argsort(stable=True)
    return _Writes(columns[order], positions[order], vectors[order])


def _contract(found: Tensor, gradient: Float[Tensor, "targets context d_model"], writes: _Writes) -> None:
    """Add the products of the gradient at each latent's position with what the latent writes."""
    positions, counts = torch.unique_consecutive(writes.positions, return_counts=True)
    start = 0
    for position, count in zip(positions.tolist(), counts.tolist(), strict=True):
        part = slice(start, start + count)
        found[:, writes.columns[part]] += gradient[:, position] @ writes.vectors[part].T
        start += count
