"""Forward passes of a model with SAEs in it: their latents are read, edited, and written back as a difference.

With the error kept, an activation becomes `y + decode(edited) - decode(clean)`. What both have in common cancels, so
only rows in which a latent changes are computed, and an edit that changes nothing leaves every bit alone. Without the
error, `y` becomes `decode(edited)` at every token that the SAEs read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from ..core.errors import InterventionError
from ..model.capture import reading, splice
from ..model.hook_points import ResolvedHookPoint
from .attached import Attached, Codes
from .edits import Edit, Fires, places

ErrorTerm = Literal["keep", "drop"]
ActivationRows = Float[Tensor, "rows d"]


class LatentEdit(NamedTuple):
    """An edit of a latent of the SAE `site`; `one` is the size of its unit."""

    site: int
    latent: int
    edit: Edit
    one: float


class DirectionEdit(NamedTuple):
    """An edit of the activation's projection on a unit vector at a hook point."""

    point: ResolvedHookPoint
    unit_vector: Float[Tensor, " d"]
    edit: Edit


@dataclass
class Texts:
    """Where the texts of a batch are in its tokens: after `starts` tokens of padding, `lengths` tokens of prompt.

    With `grows`, what follows the prompts is generated, and otherwise padding. SAEs leave `skipped` tokens alone.
    """

    starts: Int64[Tensor, " batch"]
    lengths: Int64[Tensor, " batch"]
    grows: bool = False
    skipped: int | None = None

    def positions(self, offset: int, tokens: Int64[Tensor, "batch context"]) -> Int64[Tensor, "batch context"]:
        """Return each token's position in its text, or a negative number for padding."""
        columns = torch.arange(offset, offset + tokens.shape[1], device=tokens.device)
        position = columns[None] - self.starts.to(tokens.device)[:, None]
        if self.grows:
            return position
        return torch.where(position < self.lengths.to(tokens.device)[:, None], position, -1)


@dataclass
class Recorded:
    """What one SAE did in a pass, at the rows that it read.

    `codes` are its latents by group, as edited, `clean` before; `reads` and `writes` the activations that it read, and
    those that stood at the hook points that it writes before it wrote there.
    """

    clean: dict[int, Codes] = field(default_factory=dict)
    codes: dict[int, Codes] = field(default_factory=dict)
    reads: dict[int, ActivationRows] = field(default_factory=dict)
    writes: dict[int, ActivationRows] = field(default_factory=dict)


class Splicer:
    """The hooks of a model with SAEs in it, for several passes one after another.

    Set `texts` before a pass. After it, `usable` says which tokens the SAEs read, and with `record`, `sites` what they
    did. `additions` are added to what an SAE writes, by its number and that of the hook point. With `leaves`, zeros
    that require gradients are added there too, and kept.
    """

    def __init__(
        self,
        model: nn.Module,
        attached: Sequence[Attached],
        edits: Sequence[LatentEdit] = (),
        directions: Sequence[DirectionEdit] = (),
        error: ErrorTerm = "keep",
    ):
        self.model, self.attached, self.error = model, attached, error
        self.edits, self.directions = edits, directions
        self.texts: Texts | None = None
        self.record = False
        self.leaves: dict[tuple[int, int], Tensor] | None = None
        self.additions: Mapping[tuple[int, int], Float[Tensor, "batch context d"]] = {}
        self.sites: list[Recorded] = []
        self.usable: Bool[Tensor, "batch context"] = torch.zeros(0, 0, dtype=torch.bool)
        self._passes = 0
        self._clean_only = False
        self._acts: dict[int, Bool[Tensor, "batch context"]] = {}
        self._needed: set[int] = set()
        self._all_edits = [*(edit.edit for edit in edits), *(direction.edit for direction in directions)]
        conditions = [edit.where for edit in self._all_edits if isinstance(edit.where, Fires)]
        self._conditions = [(self._site_named(where.hook_point), where.latent) for where in conditions]
        self._watched = {site for site, _ in self._conditions}
        self._width = 0

    @property
    def runs_twice(self) -> bool:
        """Whether a pass needs another before it: latents that depend on several hook points change the first."""
        changed = {edit.site for edit in self.edits} | self._watched
        if self.error == "drop":
            changed |= set(range(len(self.attached)))
        return any(self.attached[site].reads_several for site in changed)

    @contextmanager
    def hooked(self, texts: Texts) -> Iterator[None]:
        """Within this context, the model's passes are those of the model with its SAEs, over one batch of texts."""
        self.texts, self._passes = texts, 0
        with ExitStack() as stack:
            handle = self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
            stack.callback(handle.remove)
            for site, one in enumerate(self.attached):
                if one.same:
                    for at, point in enumerate(one.writes):
                        stack.enter_context(splice(self.model, point, self._reader_writer(site, at)))
                    continue
                for at, point in enumerate(one.reads):
                    stack.enter_context(reading(self.model, point, self._reader(site, at)))
                for at, point in enumerate(one.writes):
                    stack.enter_context(splice(self.model, point, self._writer(site, at)))
            for number, direction in enumerate(self.directions):
                stack.enter_context(splice(self.model, direction.point, self._along(number, direction)))
            yield
        self.texts = None

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out, at the start of a pass, which tokens it is of and which edits act on any of them."""
        if self._clean_only:
            return
        assert self.texts is not None
        tokens: Tensor = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        total = self._width + self._passes if self._passes else tokens.shape[1]
        if not self._passes:
            self._width = total
        offset = total - tokens.shape[1]  # one token more than in the pass before, whether or not a cache holds them
        self._passes += 1
        position = self.texts.positions(offset, tokens)
        self.usable = position >= 0
        if self.texts.skipped is not None:
            self.usable = self.usable & (tokens != self.texts.skipped)
        n_prompt = self.texts.lengths.to(tokens.device)
        masks = [places(edit.where, position, n_prompt) & self.usable for edit in self._all_edits]
        self._acts = dict(enumerate(masks))
        self._needed = {edit.site for number, edit in enumerate(self.edits) if bool(masks[number].any())}
        if any(bool(mask.any()) for mask in masks):
            self._needed |= self._watched
        if self.record or self.error == "drop":
            self._needed = set(range(len(self.attached)))
        self.sites = [Recorded() for _ in self.attached]
        if self.leaves is not None:
            self.leaves = {}
        if self.runs_twice and self._needed:
            self._read_clean(args, kwargs)

    def _read_clean(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the model without any edit for the latents that depend on several hook points."""
        options = {name: value for name, value in kwargs.items() if name != "past_key_values"}
        if "use_cache" in options:
            options["use_cache"] = False
        self._clean_only = True
        try:
            with torch.no_grad():
                self.model(*args, **options)
        finally:
            self._clean_only = False
        for site, one in enumerate(self.attached):
            if not one.reads_several:
                self.sites[site] = Recorded()
            else:
                self.sites[site].reads.clear()

    def _reader_writer(self, site: int, at: int) -> Callable[[Tensor], Tensor]:
        read, write = self._reader(site, at), self._writer(site, at)

        def both(activation: Tensor) -> Tensor:
            read(activation)
            return write(activation)

        return both

    def _reader(self, site: int, at: int) -> Callable[[Tensor], None]:
        one = self.attached[site]

        def read(activation: Tensor) -> None:
            if site not in self._needed:
                return
            recorded = self.sites[site]
            recorded.reads[at] = activation[self.usable.to(activation.device)].to(one.sae.device)
            for number, group in enumerate(one.groups):
                if at in group.reads and number not in recorded.clean and recorded.reads.keys() >= set(group.reads):
                    parts = [recorded.reads[read] for read in group.reads]
                    x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
                    recorded.clean[number] = one.encode(number, x, self._only(site, number))

        return read

    def _only(self, site: int, group: int) -> Int64[Tensor, " n"] | None:
        """Return the latents of a group that edits depend on, or None if all are asked for."""
        if self.record or self.error == "drop":
            return None
        wanted = {edit.latent for edit in self.edits if edit.site == site}
        wanted |= {latent for where, latent in self._conditions if where == site}
        numbers = sorted(number for which, number in map(self.attached[site].locate, wanted) if which == group)
        return torch.tensor(numbers, dtype=torch.long, device=self.attached[site].sae.device)

    def _edited(self, site: int, group: int, codes: Codes) -> Codes:
        """Return a group's latents after the edits of them."""
        one = self.attached[site]
        mine = [
            (number, edit)
            for number, edit in enumerate(self.edits)
            if edit.site == site and one.locate(edit.latent)[0] == group
        ]
        if not mine:
            return codes
        numbers = torch.tensor([one.locate(edit.latent)[1] for _, edit in mine], device=codes.latents.device)
        values = codes.of(numbers)
        new = torch.stack([self._new(number, edit, values[:, i]) for i, (number, edit) in enumerate(mine)], dim=1)
        kept = (codes.latents[:, :, None] != numbers).all(dim=2)
        return Codes(
            torch.cat([codes.values * kept, new], dim=1),
            torch.cat([codes.latents, numbers.expand(len(new), -1)], dim=1),
        )

    def _new(self, number: int, edit: LatentEdit, values: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Return one latent's activations after an edit of it."""
        if edit.edit.projects:
            return values
        return torch.where(self._mask(number, edit.edit, values), edit.edit.value(values, edit.one), values)

    def _mask(self, number: int, edit: Edit, values: Tensor | None) -> Bool[Tensor, " rows"]:
        """Return at which of the rows that SAEs read an edit acts."""
        where = edit.where
        mask = self._acts[number][self.usable]
        if where == "active" and values is not None:
            return mask.to(values.device) & (values.detach() != 0)
        if isinstance(where, Fires):
            site = self._site_named(where.hook_point)
            group, latent = self.attached[site].locate(where.latent)
            codes = self.sites[site].clean.get(group)
            if codes is None:
                raise InterventionError(
                    f"an edit waits for latent {where.latent} at '{where.hook_point}', which the model reaches only "
                    "after the edit; expected a hook point that is reached before it"
                )
            fires = codes.of(torch.tensor([latent], device=codes.latents.device))[:, 0].detach() > where.above
            return mask & fires.to(mask.device)
        return mask

    def _site_named(self, name: str) -> int:
        for site, one in enumerate(self.attached):
            if one.name == name:
                return site
        known = ", ".join(f"'{one.name}'" for one in self.attached) or "none"
        raise InterventionError(f"there is no SAE at '{name}'; the model has SAEs at: {known}")

    def _writer(self, site: int, at: int) -> Callable[[Tensor], Tensor]:
        one = self.attached[site]

        def write(activation: Tensor) -> Tensor:
            if self._clean_only:
                return activation
            new = activation
            if site in self._needed:
                recorded = self.sites[site]
                for group, codes in recorded.clean.items():
                    if group not in recorded.codes:
                        recorded.codes[group] = self._edited(site, group, codes)
                if self.record:
                    recorded.writes[at] = activation[self.usable.to(activation.device)].to(one.sae.device)
                new = self._without_error(site, at, new) if self.error == "drop" else self._difference(site, at, new)
                new = self._projected(site, at, new)
            if (addition := self.additions.get((site, at))) is not None:
                new = _added(new, addition)
            if self.leaves is not None:
                leaf = torch.zeros(new.shape, dtype=_wide(new, one), device=new.device, requires_grad=True)
                self.leaves[site, at] = leaf
                new = (new + leaf).to(new.dtype)
            return new

        return write

    def _difference(self, site: int, at: int, activation: Tensor) -> Tensor:
        """Return the activation with what the edits change of what the latents write there."""
        one, recorded = self.attached[site], self.sites[site]
        total: Tensor | None = None
        for group, clean in recorded.clean.items():
            decoder, edited = one.decoder(group, at), recorded.codes[group]
            if edited is clean or decoder is None:
                continue
            n_edited = edited.values.shape[1] - clean.values.shape[1]
            numbers = edited.latents[0, -n_edited:] if len(edited.latents) else edited.latents.new_zeros(n_edited)
            change = (edited.values[:, -n_edited:] - clean.of(numbers)) @ decoder[numbers]
            total = change if total is None else total + change
        if total is not None and (scale := one.scale(recorded.reads)) is not None:
            total = total * scale
        return activation if total is None else self._at_rows(activation, total, (total.detach() != 0).any(dim=1), one)

    def _without_error(self, site: int, at: int, activation: Tensor) -> Tensor:
        """Return the activation with the reconstruction in its place at every token that the SAE reads."""
        one, recorded = self.attached[site], self.sites[site]
        x_hat = one.reconstruct(recorded.codes, at, recorded.reads)
        new = activation.clone()
        new[self.usable.to(new.device)] = x_hat.to(new)
        return new

    def _projected(self, site: int, at: int, activation: Tensor) -> Tensor:
        """Return the activation after the edits of its projections on decoder rows."""
        one = self.attached[site]
        for number, edit in enumerate(self.edits):
            if edit.site != site or not edit.edit.projects:
                continue
            row = one.contribution(edit.latent, at)
            if row is None or not bool(row.any()):
                continue
            group, latent = one.locate(edit.latent)
            codes = self.sites[site].clean[group]
            values = codes.of(torch.tensor([latent], device=codes.latents.device))[:, 0]
            mask = self._mask(number, edit.edit, values)
            activation = self._along_vector(activation, row / row.norm(), edit.edit, edit.one, mask)
        return activation

    def _along(self, number: int, direction: DirectionEdit) -> Callable[[Tensor], Tensor]:
        def change(activation: Tensor) -> Tensor:
            number_of_all = len(self.edits) + number
            if self._clean_only or not bool(self._acts[number_of_all].any()):
                return activation
            vector, edit = direction.unit_vector, direction.edit
            mask = self._mask(number_of_all, edit, None)
            return self._along_vector(activation, vector, edit, 1.0, mask)

        return change

    def _along_vector(self, activation: Tensor, vector: Tensor, edit: Edit, one: float, mask: Tensor) -> Tensor:
        usable = self.usable.to(activation.device)
        vector = vector.to(activation.device)
        rows = activation[usable].to(torch.promote_types(activation.dtype, vector.dtype))
        projection = rows @ vector.to(rows.dtype)
        change = torch.where(mask.to(rows.device), edit.value(projection, one) - projection, 0.0)
        total = change[:, None] * vector.to(rows.dtype)
        return self._at_rows(activation, total, change.detach() != 0, None)

    def _at_rows(self, activation: Tensor, change: ActivationRows, touched: Tensor, one: Attached | None) -> Tensor:
        """Return the activation with a change added to some of the rows that SAEs read; others keep their bits."""
        touched = touched.to(activation.device)
        if not bool(touched.any()):
            return activation
        where = self.usable.to(activation.device).nonzero()[touched]
        wide = torch.promote_types(activation.dtype, change.dtype)
        rows = activation[where[:, 0], where[:, 1]].to(wide) + change.to(activation.device)[touched].to(wide)
        new = activation.clone()
        new[where[:, 0], where[:, 1]] = rows.to(activation.dtype)
        return new


def _wide(activation: Tensor, one: Attached) -> torch.dtype:
    return torch.promote_types(activation.dtype, next(one.sae.parameters()).dtype)


def _added(activation: Tensor, addition: Float[Tensor, "batch context d"]) -> Tensor:
    """Return the activation plus an addition, in the wider type, with the bits of rows to which nothing is added."""
    wide = torch.promote_types(activation.dtype, addition.dtype)
    new = (activation.to(wide) + addition.to(activation.device)).to(activation.dtype)
    if activation.dtype == wide:
        return new
    return torch.where((addition != 0).any(dim=-1, keepdim=True).to(new.device), new, activation)
