"""Measure the identities of one block in several forward passes.

The block's input is fixed, so that many blocks can be measured in the same passes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import NonFiniteError
from .candidates import attention_candidates, attention_projections, mlp_candidates, mlp_inputs
from .finding import Finding
from .norms import affine_of
from .probe import Place, ProbeEdit, Record
from .scales import explain_scale, fit, same, tolerance

Stages = Generator[list[ProbeEdit], Record, None]

PRE_ATTN_MID = "resid_pre + attn_out = resid_mid"
MID_MLP_POST = "resid_mid + mlp_out = resid_post"
PARALLEL = "resid_pre + attn_out + mlp_out = resid_post"
_MIN_SCALE = 1e-4
"""A part with a smaller fitted scale is not added by the block."""
POST_NORM = "norm(stream + attn_out or mlp_out) = stream"


class BlockProbe:
    """One block, the findings so far, and the noise that replaces its activations."""

    kinds = (
        "resid_pre",
        "resid_mid",
        "resid_post",
        "attn_out",
        "attn_z",
        "mlp_branch",
        "mlp_in_normalized",
        "mlp_in",
        "mlp_out",
    )

    def __init__(self, layer: int, path: str, block: nn.Module, config: Any, natural: Record):
        self.layer = layer
        self.path = path
        self.block = block
        self.config = config
        self.findings: dict[str, Finding] = {}
        self.natural_pre = natural.values[Place(path, "input")]
        self.natural_post = natural.values[Place(path, "output")]
        self.repeated = natural.repeated
        clean = self.natural_pre.nan_to_num(0, 0, 0)
        self.pre = clean + self.noise(0, clean)
        self.other_pre = clean + self.noise(1, clean)
        self.modules = dict(block.named_modules())
        self.parallel = False
        self.post_norm = False
        self.reads_stream = False
        self.tried: dict[str, list[Place]] = {}
        self.gaps: dict[str, str] = {}

    def noise(self, number: int, like: Tensor) -> Tensor:
        """Return noise of the same magnitude as `like`, which depends only on the block and the number."""
        generator = torch.Generator().manual_seed(self.layer * 64 + number)
        size = like.float().nan_to_num(0, 0, 0).square().mean().sqrt().clamp_min(1e-3)
        return (torch.randn(like.shape, generator=generator).to(like.device) * size).to(like.dtype)

    def stages(self) -> Stages:
        """Yield the edits of each pass, receive its record, and fill `findings`."""
        start = ProbeEdit(Place(self.path, "input"), self.pre)
        plain = yield [start]
        if not bool(plain.values[Place(self.path, "output")].isfinite().all()):
            raise NonFiniteError(
                f"{self.path} returns NaN or infinity for ordinary tokens; check the weights, "
                "or set model_dtype = 'float32'"
            )
        yield from self._find_parts(plain, start)
        yield from self._find_inner(plain, start)
        yield from self._check_mid(plain, start)
        self._complete()

    # What the parts add

    def _find_parts(self, plain: Record, start: ProbeEdit) -> Stages:
        """Find the modules whose outputs attention and MLP add to the stream, by trying the candidates in turn."""
        attention = self._candidates(attention_candidates(self.block), plain)
        mlp = self._candidates(mlp_candidates(self.block), plain)
        self.tried = {"attn_out": attention, "mlp_out": mlp}
        noises = {"attn_out": self.noise(2, self.pre), "mlp_out": self.noise(3, self.pre)}
        for pair in _pairs(attention, mlp):
            places: dict[str, Place] = {kind: place for kind, place in zip(noises, pair, strict=True) if place}
            known = {kind: found.place for kind, found in self.findings.items() if kind in noises}
            if all(kind in known for kind in places):
                break
            if any(places.get(kind, place) != place for kind, place in known.items()):
                continue  # keep the part that was found, and try the other part's candidates with it
            record = yield [start, *(ProbeEdit(place, noises[kind]) for kind, place in places.items())]
            self._try_parts(record, places, noises)

    def _candidates(self, paths: Iterable[str], plain: Record) -> list[Place]:
        places = [Place(f"{self.path}.{path}", "output") for path in paths]
        return [p for p in places if p in plain.values and plain.values[p].shape == self.pre.shape]

    def _try_parts(self, record: Record, places: dict[str, Place], noises: dict[str, Tensor]) -> None:
        post = record.values[Place(self.path, "output")]
        attn, mlp = places.get("attn_out"), places.get("mlp_out")
        streams = {
            place: value
            for place, value in record.values.items()
            if place.side == "input"
            and place.path != self.path
            and value.shape == self.pre.shape
            and not same(value, self.pre)
        }
        mid = None
        if attn is not None:
            for place, value in streams.items():
                if _within(place.path, attn.path):
                    continue
                if self._adds("attn_out", attn, value, self.pre, noises["attn_out"], PRE_ATTN_MID):
                    mid = place
                    break
        if mlp is not None:
            for place in [mid] if mid is not None else list(streams):
                if _within(place.path, mlp.path) and place != Place(mlp.path, "input"):
                    continue
                if self._adds("mlp_out", mlp, post, streams[place], noises["mlp_out"], MID_MLP_POST):
                    mid = place
                    break
        if mid is not None:
            self._offer_mid(mid)
        if attn is not None and mlp is not None and mid is None:
            self._try_parallel(attn, mlp, post, noises)
        if mid is not None and mlp is not None and "mlp_out" not in self.findings:
            self._try_post_norm(mid, mlp, record, post, noises["mlp_out"])

    def _adds(self, kind: str, part: Place, after: Tensor, before: Tensor, noise: Tensor, identity: str) -> bool:
        """Return whether `after - before` is the noise that replaced a part, times a scale that a setting explains."""
        found = fit(after.double() - before.double(), [noise])
        if found.residual > tolerance(noise) or abs(found.scales[0]) < _MIN_SCALE:
            return False
        if kind in self.findings:
            return True
        exact = explain_scale(found.scales[0], noise.dtype, self.config, self._owners(part))
        if exact is None:
            self.gaps.setdefault(kind, f"the block adds {found.scales[0]:.4g} times the output of {part.path}")
            return False
        scale, name = exact
        self.findings[kind] = Finding(part, identity, _times(part, scale, name), scale, self.pre.shape[-1])
        return True

    def _try_parallel(self, attn: Place, mlp: Place, post: Tensor, noises: dict[str, Tensor]) -> None:
        found = fit(post.double() - self.pre.double(), [noises["attn_out"], noises["mlp_out"]])
        if found.residual > tolerance(self.pre):
            return
        exact = [
            explain_scale(scale, self.pre.dtype, self.config, self._owners(part))
            for scale, part in zip(found.scales, (attn, mlp), strict=True)
        ]
        for kind, part, scale, explained in zip(noises, (attn, mlp), found.scales, exact, strict=True):
            if explained is None and abs(scale) > _MIN_SCALE:
                self.gaps.setdefault(kind, f"the block adds {scale:.4g} times the output of {part.path}")
        if exact[0] is None or exact[1] is None:
            return
        for kind, part, explained in zip(noises, (attn, mlp), exact, strict=True):
            assert explained is not None
            self.findings[kind] = Finding(part, PARALLEL, _times(part, *explained), explained[0], self.pre.shape[-1])
        self.parallel = True

    def _try_post_norm(self, mid: Place, mlp: Place, record: Record, post: Tensor, noise: Tensor) -> None:
        """Recognise a post-norm block: the sum with each part passes through a norm, whose result is the stream."""
        stream = record.values.get(Place(mid.path, "output"))
        if stream is None:
            return
        for place, value in record.values.items():
            if place.side != "input" or value.shape != noise.shape:
                continue
            result = record.values.get(Place(place.path, "output"))
            if result is None or not same(result, post):
                continue
            if self._adds("mlp_out", mlp, value, stream, noise, POST_NORM):
                self.post_norm = True
                self.findings["attn_out"] = _with_identity(self.findings["attn_out"], POST_NORM)
                self.findings["resid_mid"] = Finding(
                    reason=f"the block is post-norm: the sum of resid_pre and attn_out passes through {mid.path}, "
                    "and the result of that norm is the stream"
                )
                return

    def _offer_mid(self, mid: Place) -> None:
        holds = [k for k, i in (("attn_out", PRE_ATTN_MID), ("mlp_out", MID_MLP_POST)) if k in self.findings]
        identity = "; ".join({"attn_out": PRE_ATTN_MID, "mlp_out": MID_MLP_POST}[kind] for kind in holds)
        self.findings["resid_mid"] = Finding(mid, identity, d_in=self.pre.shape[-1], splice="write")

    def _owners(self, part: Place) -> list[nn.Module]:
        inside = part.path.removeprefix(f"{self.path}.")
        return [self.block, self.modules[inside]] if inside in self.modules else [self.block]

    # What the parts read

    def _find_inner(self, plain: Record, start: ProbeEdit) -> Stages:
        """Find the MLP's input and attention's heads. Each part's output must depend on nothing else."""
        mlp_in = self._mlp_input(plain)
        z = self._first_input(attention_projections(self.block), plain)
        edits = []
        if z is not None:
            edits.append(ProbeEdit(z, self.noise(4, plain.values[z])))
        if mlp_in is not None:
            edits.append(ProbeEdit(mlp_in, self.noise(5, plain.values[mlp_in])))
        if not edits:
            return
        one = yield [start, *edits]
        two = yield [ProbeEdit(start.place, self.other_pre), *edits]
        for kind, place, part in (("attn_z", z, "attn_out"), ("mlp_in", mlp_in, "mlp_out")):
            whole = self.findings.get(part)
            if place is None or whole is None or whole.place is None:
                continue
            a, b = one.values[whole.place], two.values[whole.place]
            if not same(a, b) or same(a, plain.values[whole.place]):
                self.findings[kind] = Finding(reason=f"{part} is not a function of the input of {place.path} alone")
                continue
            self.findings[kind] = Finding(
                place, f"{part} is a function of it alone", d_in=plain.values[place].shape[-1]
            )

    def _mlp_input(self, plain: Record) -> Place | None:
        """Return where the MLP reads its input: after the norm, if the MLP's module begins with a norm."""
        place = self._first_input(mlp_inputs(self.block), plain)
        if place is None or not same(plain.values[place], self._stream(plain)):
            return place
        for result, value in plain.values.items():
            source = plain.values.get(Place(result.path, "input"))
            if result.side == "output" and source is not None and result.path.startswith(f"{place.path}."):
                norm = same(source, plain.values[place]) and affine_of(self._module(result.path), source, value)
                if norm:
                    return result
        return place

    def _stream(self, plain: Record) -> Tensor:
        """Return the residual stream that the MLP reads: `resid_mid`, or `resid_pre` in a parallel block."""
        mid = self.findings.get("resid_mid")
        return plain.values[mid.place] if mid is not None and mid.place is not None else self.pre

    def _first_input(self, paths: Iterable[str], plain: Record) -> Place | None:
        places = (Place(f"{self.path}.{path}", "input") for path in paths)
        return next((place for place in places if place in plain.values), None)

    # Splicing between the parts

    def _check_mid(self, plain: Record, start: ProbeEdit) -> Stages:
        """Check that writing into `resid_mid` replaces it for everything downstream; find the MLP's branch."""
        mid, mlp_in, mlp_out = (self.findings.get(kind) for kind in ("resid_mid", "mlp_in", "mlp_out"))
        norm = self._norm_before(mlp_in, plain) if not self.post_norm else None
        value = self.noise(6, self.pre)
        if mid is not None and mid.place is not None:
            one = yield [start, ProbeEdit(mid.place, value, in_place=True)]
            two = yield [ProbeEdit(start.place, self.other_pre), ProbeEdit(mid.place, value, in_place=True)]
            posts = [record.values[Place(self.path, "output")] for record in (one, two)]
            post_of_plain = plain.values[Place(self.path, "output")]
            if not same(*posts) or same(posts[0], post_of_plain):
                self.findings["resid_mid"] = _with_splice(mid, "")
        if mlp_in is None or mlp_in.place is None or mlp_out is None or mlp_out.place is None:
            return
        self.reads_stream = same(plain.values[mlp_in.place], self._stream(plain))
        if norm is None:
            return
        source, result = Place(norm, "input"), Place(norm, "output")
        branch = yield [start, ProbeEdit(source, value)]
        others = [f.place for k, f in self.findings.items() if k in ("attn_out", "attn_z") and f.place is not None]
        apart = all(same(branch.values[place], plain.values[place]) for place in others)
        alone = apart and self._only_mlp(branch, plain)
        width = self.pre.shape[-1]
        self.findings["mlp_branch"] = (
            Finding(source, "the stream as the MLP alone reads it", d_in=width)
            if alone
            else Finding(reason=f"attention or the stream also reads the result of {norm}, not only the MLP")
        )
        affine = affine_of(self._module(norm), plain.values[source], plain.values[result])
        if affine is None:
            self.findings["mlp_in_normalized"] = Finding(
                reason=f"{norm} is not a LayerNorm or RMSNorm with a readable weight and bias"
            )
            return
        weight = "(1 + weight)" if affine.offset else "weight"
        self.findings["mlp_in_normalized"] = Finding(
            result,
            f"mlp_in_normalized * {weight} + bias = mlp_in",
            d_in=width,
            affine=affine,
            splice="replace" if alone else "",
        )

    def _only_mlp(self, record: Record, plain: Record) -> bool:
        """Return whether the block's output changed by exactly the change in the MLP's output."""
        mlp_out = self.findings["mlp_out"]
        assert mlp_out.place is not None
        out, post = mlp_out.place, Place(self.path, "output")
        added = (record.values[out].double() - plain.values[out].double()) * mlp_out.scale
        found = fit(record.values[post].double() - plain.values[post].double(), [added])
        return found.residual <= tolerance(self.pre) * 2 and abs(found.scales[0] - 1) <= 2 * tolerance(self.pre)

    def _norm_before(self, mlp_in: Finding | None, plain: Record) -> str | None:
        """Return the path of the norm that maps the stream to the MLP's input."""
        if mlp_in is None or mlp_in.place is None:
            return None
        wanted = plain.values[mlp_in.place]
        stream = self._stream(plain)
        for place, value in plain.values.items():
            if (
                place.side != "output"
                or value.shape != wanted.shape
                or (_within(mlp_in.place.path, place.path) and place != mlp_in.place)
            ):
                continue
            source = plain.values.get(Place(place.path, "input"))
            if source is not None and same(value, wanted) and same(source, stream) and not same(value, source):
                return place.path
        return None

    def _module(self, path: str) -> nn.Module:
        return self.modules[path.removeprefix(f"{self.path}.")]

    def _complete(self) -> None:
        """Add the stream at both ends, and a reason for every kind that was not found."""
        width = self.pre.shape[-1]
        self.findings["resid_pre"] = Finding(Place(self.path, "input"), "resid_post of the block before", d_in=width)
        self.findings["resid_post"] = Finding(Place(self.path, "output"), "resid_pre of the next block", d_in=width)
        for kind in self.kinds:
            if kind not in self.findings:
                self.findings[kind] = Finding(reason=self._reason_missing(kind))

    def _reason_missing(self, kind: str) -> str:
        children = ", ".join(name for name, _ in self.block.named_children())
        if kind in ("attn_out", "mlp_out"):
            part = "attention" if kind == "attn_out" else "MLP"
            if kind in self.gaps:
                return f"{self.gaps[kind]}, which no setting of the model explains"
            if not self.tried[kind]:
                return f"the block has no {part} with a known name; its modules are {children}"
            tried = ", ".join(place.path.removeprefix(f"{self.path}.") for place in self.tried[kind])
            return f"the block does not add the output of its {part} to the stream (tried {tried})"
        if kind == "resid_mid":
            if self.parallel:
                return "attention and MLP are parallel: both read resid_pre, and there is no stream between them"
            return "no module reads a sum of resid_pre and what attention or MLP add"
        if kind == "attn_z":
            return "attn_out was not found, or its output projection has no known name"
        if self.post_norm:
            return "the block is post-norm: its norms come after the sums, and the MLP reads a norm's result"
        if self.reads_stream:
            return "the MLP reads the stream itself, without a norm before it"
        return "mlp_out was not found, or no module maps the stream to the MLP's input"


def _pairs(first: list[Place], second: list[Place]) -> list[tuple[Place | None, Place | None]]:
    """Return all pairs of candidates, the most likely first."""
    numbered = [(i + j, i, j) for i in range(max(1, len(first))) for j in range(max(1, len(second)))]
    return [(first[i] if first else None, second[j] if second else None) for _, i, j in sorted(numbered)]


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _times(part: Place, scale: float, name: str) -> str:
    return "" if scale == 1 else f"{part.path} times {name}"


def _with_identity(found: Finding, identity: str) -> Finding:
    return replace(found, identity=identity)


def _with_splice(found: Finding, splice: str) -> Finding:
    return replace(found, splice=splice)  # pyright: ignore[reportArgumentType]
