"""A language model with SAEs at its hook points: run it, and edit its latents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..core.errors import HookPointError, InterventionError, ModelError
from ..model.capture import check_splices, resolve_hook_points
from ..model.hook_points import canonical_hook_point, group_name, members
from ..model.language_model import is_encoder, load_model, load_tokenizer
from ..model.loading.context_limit import context_limit
from ..model.loading.placement import input_device, spread_of
from ..sae import Sae
from .attached import Attached, attach, check_latent, sae_key
from .edits import Edit, Fires
from .run import Run
from .splicer import DirectionEdit, ErrorTerm, LatentEdit, Splicer, Texts
from .texts import Prompts, first_token, pad, token_lists

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Target = tuple[str, "int | Tensor"]
"""What is edited: a hook point, and a latent of its SAE or a direction `[d]`."""


class Pass(NamedTuple):
    """One forward pass: its logits, and the hooks that it ran through."""

    logits: Float[Tensor, "batch context vocabulary"]
    splicer: Splicer


class SplicedModel:
    """A causal language model with any number of SAEs, transcoders and crosscoders at its hook points.

    Without edits it computes what the model alone does, bit by bit, unless it was opened with `error="drop"`.
    `SaeModel` lists its attributes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        saes: Mapping[str, Sae],
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        error: ErrorTerm = "keep",
        skip_first_token: bool = True,
    ):
        if error not in ("keep", "drop"):
            raise InterventionError(f"error is '{error}'; expected keep or drop")
        if is_encoder(model.config):
            raise ModelError(f"{type(model).__name__} predicts no next token; expected a causal language model")
        self.model, self.tokenizer = model, tokenizer
        self.error: ErrorTerm = error
        self.attached = attach(model, {_key(name): sae for name, sae in saes.items()})
        self.saes = {one.name: one.sae for one in self.attached}
        self.maxima: dict[str, Float[Tensor, " d_sae"]] = {}
        self._first = first_token(tokenizer)
        self.skipped = self._first if skip_first_token else None
        self._edits: list[LatentEdit] = []
        self._directions: list[DirectionEdit] = []

    @classmethod
    def open(
        cls,
        model: str | Path | PreTrainedModel,
        saes: Mapping[str, Sae | str | Path] | Iterable[Sae | str | Path] = (),
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        error: ErrorTerm = "keep",
        skip_first_token: bool = True,
        dtype: str = "float32",
        device: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        device_map: str | None = None,
        max_memory: Mapping[str, str] | None = None,
        offload_folder: str | None = None,
    ) -> Self:
        """Load a model, unless it is one already, and put SAEs at its hook points.

        SAEs are given by hook point, or as a list of those that say where they belong; a path is read with `Sae.load`.
        A crosscoder's name is that of its hook points joined by ` + `. With `error="drop"`, reconstructions replace
        the activations, and a transcoder its MLP; by default the difference is kept. SAEs leave alone the token that
        begins a text (BOS), which they were not trained on, unless `skip_first_token` is false.
        The model is loaded in float32: bfloat16 rounds logits so coarsely that small effects vanish. With `device_map`,
        accelerate spreads it over several GPUs, the host's memory and the disk, with at most `max_memory` on each
        (docs/large-models.md).

        Raises:
            HookPointError: the model lacks a hook point, or nothing can be spliced in there.
            SaeError: an SAE is of another width, or was trained at another hook point.
            ModelError: the model cannot be loaded, or predicts no next token.
        """
        if isinstance(model, (str, Path)):
            name = str(model)
            spread = spread_of(device_map, max_memory, offload_folder, device)
            loaded = load_model(name, dtype, device, revision, trust_remote_code=trust_remote_code, spread=spread)
            tokenizer = tokenizer or load_tokenizer(name, revision, trust_remote_code=trust_remote_code)
        else:
            loaded = model
        if isinstance(saes, Mapping):
            given = {str(key): _loaded(sae) for key, sae in saes.items()}
        else:
            listed = [_loaded(sae) for sae in saes]
            given = {sae_key(sae): sae for sae in listed}
            if len(given) < len(listed):
                raise InterventionError(f"two SAEs are of the same hook point ({', '.join(given)}); give one for each")
        for sae in given.values():
            sae.to(input_device(loaded))
        return cls(loaded, given, tokenizer, error=error, skip_first_token=skip_first_token)

    @property
    def device(self) -> torch.device:
        """The device that the model reads its tokens on, where the SAEs are."""
        return input_device(self.model)

    def tokens(self, prompts: Prompts) -> list[list[int]]:
        """Return the token ids of prompts, as `run` reads them: texts begin with the BOS token, if there is one."""
        return token_lists(prompts, self.tokenizer, self._first, context_limit(self.model))

    @torch.no_grad()
    def run(self, prompts: Prompts, continuation: Prompts | None = None) -> Run:
        """Run one text or a batch through the model, with the edits of the `steer` that it is within.

        Args:
            prompts: texts, or token ids.
            continuation: what follows all prompts, or each: texts or token ids, whose probability `LogProbability`
                measures.

        Raises:
            InterventionError: a text is empty, or longer than the model's context.
        """
        lists = self.tokens(prompts)
        prompt_lengths = None
        if continuation is not None:
            prompt_lengths = torch.tensor([len(ids) for ids in lists])
            lists = self._continued(lists, continuation)
        tokens, lengths = pad(lists, self._padding)
        tokens = tokens.to(self.device)
        logits, splicer = self.forward(tokens, lengths, record=True)
        return Run(
            tokens, lengths, logits, splicer.usable, self.attached, splicer.sites, prompt_lengths, self.tokenizer
        )

    def _continued(self, lists: list[list[int]], continuation: Prompts) -> list[list[int]]:
        following = token_lists(continuation, self.tokenizer, None, None)
        following = following * len(lists) if len(following) == 1 else following
        if len(following) != len(lists):
            raise InterventionError(f"{len(following)} continuations were given for {len(lists)} texts; give as many")
        return self.tokens([ids + more for ids, more in zip(lists, following, strict=True)])

    def forward(
        self,
        tokens: Int64[Tensor, "batch context"],
        lengths: Int64[Tensor, " batch"],
        *,
        record: bool = False,
        leaves: bool = False,
        additions: Mapping[tuple[int, int], Tensor] | None = None,
    ) -> Pass:
        """Run tokens that are padded on the right, with the current edits, and with gradients where they are enabled.

        `record`, `leaves` and `additions` are those of `Splicer`.
        """
        splicer = self.splicer()
        splicer.record, splicer.leaves, splicer.additions = record, {} if leaves else None, additions or {}
        options: dict[str, Any] = {"use_cache": False}
        if bool((lengths < tokens.shape[1]).any()):
            columns = torch.arange(tokens.shape[1])
            options["attention_mask"] = (columns < lengths[:, None].cpu()).to(tokens.device, torch.long)
        texts = Texts(torch.zeros_like(lengths), lengths, skipped=self.skipped)
        with splicer.hooked(texts):
            logits = self.model(input_ids=tokens, **options).logits
        return Pass(logits, splicer)

    def splicer(self) -> Splicer:
        """Return the hooks of the model with its SAEs and the current edits."""
        return Splicer(self.model, self.attached, self._edits, self._directions, self.error)

    @contextmanager
    def steer(self, edits: Mapping[Target, Edit]) -> Iterator[Self]:
        """Within this context, edit latents, or directions `[d]`, in every run, generation and attribution.

        `edits` maps a hook point and a latent (or a direction's vector) to an edit. A direction's activation is its
        projection on the unit vector. Contexts nest; of two edits of one latent the inner one counts.

        Raises:
            HookPointError: there is no SAE at a hook point, or it has no such latent.
            InterventionError: an edit is in multiples of a maximum that is not known, or does not fit.
        """
        before = self._edits, self._directions
        latents, directions = list(before[0]), list(before[1])
        for (name, target), edit in edits.items():
            if isinstance(edit.where, Fires):
                check_latent(self.at(edit.where.hook_point), edit.where.latent)
            if isinstance(target, Tensor):
                directions.append(self._direction(name, target, edit))
            else:
                new = self.latent_edit(name, int(target), edit)
                latents = [old for old in latents if old[:2] != new[:2]] + [new]
        self._edits, self._directions = latents, directions
        try:
            yield self
        finally:
            self._edits, self._directions = before

    def at(self, name: str) -> Attached:
        """Return the SAE at a hook point, or raise `HookPointError` with those that there are."""
        for one in self.attached:
            if one.name == _key(name):
                return one
        known = ", ".join(f"'{one.name}'" for one in self.attached) or "none"
        raise HookPointError(f"there is no SAE at '{name}'; the model has SAEs at: {known}")

    def latent_edit(self, name: str, latent: int, edit: Edit) -> LatentEdit:
        """Return an edit with its SAE and the size of its unit; raises the errors of `steer`."""
        one = self.at(name)
        check_latent(one, latent)
        return LatentEdit(self.attached.index(one), latent, edit, self._unit(one, latent, edit))

    def _unit(self, one: Attached, latent: int, edit: Edit) -> float:
        if edit.unit == "activation":
            return 1.0
        if one.name not in self.maxima:
            raise InterventionError(
                f"the maxima of the latents at '{one.name}' are not known; call measure_maxima(texts), set "
                "maxima[hook_point], or give strengths as activations"
            )
        maximum = float(self.maxima[one.name][latent])
        if maximum <= 0:
            raise InterventionError(
                f"latent {latent} at '{one.name}' never fired on the texts that maxima were measured on, so multiples "
                "of its maximum are zero; measure them on others, or give strengths as activations"
            )
        return maximum

    def _direction(self, name: str, direction: Tensor, edit: Edit) -> DirectionEdit:
        (point,) = resolve_hook_points(self.model, [name]).values()
        check_splices(self.model, point)
        if direction.shape != (point.d_in,) or not bool(direction.any()) or not bool(direction.isfinite().all()):
            raise InterventionError(
                f"a direction at '{name}' must be a vector [{point.d_in}] of finite numbers, not all zero; got "
                f"{list(direction.shape)}"
            )
        if edit.unit == "max" or edit.where == "active":
            raise InterventionError(
                "a direction has no maximum and never is inactive; use unit and where of another kind"
            )
        wide = direction.detach().to(self.device)
        wide = wide if wide.dtype == torch.float64 else wide.float()
        return DirectionEdit(point, wide / wide.norm(), edit)

    @torch.no_grad()
    def measure_maxima(self, prompts: Prompts, batch_size: int = 8) -> None:
        """Keep the largest activation of each latent over some texts, without edits, in `maxima`."""
        edits, directions = self._edits, self._directions
        self._edits, self._directions = [], []
        try:
            lists = self.tokens(prompts)
            for start in range(0, len(lists), batch_size):
                run = self.run(lists[start : start + batch_size])
                for name, latents in run.latents.items():
                    found = self.maxima.setdefault(name, torch.zeros(latents.shape[2], device=latents.device))
                    values = latents.values().to(found.dtype)
                    found.scatter_reduce_(0, latents.indices()[2], values, "amax")
        finally:
            self._edits, self._directions = edits, directions

    @property
    def _padding(self) -> int:
        padding = getattr(self.tokenizer, "pad_token_id", None)
        return padding if isinstance(padding, int) else self._first if self._first is not None else 0


def _key(name: str) -> str:
    return group_name(canonical_hook_point(part) for part in members(name))


def _loaded(sae: Sae | str | Path) -> Sae:
    return Sae.load(sae) if isinstance(sae, (str, Path)) else sae
