"""One latent of an evaluated SAE, as text and as the card that notebooks show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ...shared.core.errors import ConfigError
from ...shared.core.paths import user_path
from ..explain.table import read_explanations
from ..features.files import FeatureIndex
from ..features.token_text import TokenTexts
from ..report.write import environment

_AROUND = (10, 6)
"""Tokens before and after the peak that the text form shows."""


@dataclass(frozen=True)
class ContextText:
    """A context in which a latent fires: its tokens' texts and the latent's activation at each.

    `peak` is the index of the strongest token, and `document` names the text that it is from, if that is known.
    """

    texts: list[str]
    activations: list[float]
    peak: int
    document: str | None


@dataclass(frozen=True)
class LatentCard:
    """What an evaluation knows of one latent; notebooks show it as a card, `print` as text.

    `density` is the fraction of rows on which the latent fires, `max_activation` its largest activation. `contexts` are
    those of the strongest activations, strongest first. `promoted` and `suppressed` are tokens with the latent's effect
    on their logits; they are empty without a model. `neighbours` are latents that fire on the same rows, with the
    correlation. `explanations` are (explainer, text, balanced accuracy of detection or None).
    """

    sae: str
    latent: int
    density: float
    mean_activation: float
    max_activation: float
    contexts: list[ContextText]
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]
    neighbours: list[tuple[int, float]]
    explanations: list[tuple[str, str, float | None]]

    def __str__(self) -> str:
        """Return the card as text, each context's strongest token in brackets."""
        lines = [
            f"{self.sae}, latent {self.latent}: fires on {self.density:.2%} of rows, "
            f"mean {self.mean_activation:.3g}, largest {self.max_activation:.3g}"
        ]
        lines += [f"{explainer}: {text}{_score(score)}" for explainer, text, score in self.explanations]
        before, after = _AROUND
        for context in self.contexts:
            texts, peak = context.texts, context.peak
            left = "".join(texts[max(0, peak - before) : peak])
            right = "".join(texts[peak + 1 : peak + 1 + after])
            quoted = f"{left!r} [{texts[peak]!r}] {right!r}"
            lines.append(f"{context.activations[peak]:9.3g}  {quoted}  {context.document or ''}".rstrip())
        for title, effects in (("promotes", self.promoted), ("suppresses", self.suppressed)):
            if effects:
                lines.append(f"{title}: {', '.join(repr(text) for text, _ in effects)}")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the card as HTML that needs no style sheet."""
        template = resources.files(__package__ or __name__).joinpath("latent_card.html").read_text(encoding="utf-8")
        return environment().from_string(template).render(card=self)


def show(sae: str | Path, latent: int, evaluation: str | Path, *, n_contexts: int = 8) -> LatentCard:
    """Return one latent's card: what it fires on, what it promotes, and how it was explained.

    Args:
        sae: name of the SAE in the evaluation, or its folder, whose last part is the name.
        latent: number of the latent.
        evaluation: the output folder of `thresher evaluate`.
        n_contexts: how many contexts to show.

    Raises:
        ConfigError: the evaluation has no index of this SAE, or the SAE no such latent.
        DataError: the index is damaged.
    """
    index = _open_index(user_path(evaluation), Path(sae).name)
    line, texts = index.latent(latent), index.texts
    explained = read_explanations(index).get(latent, [])
    return LatentCard(
        sae=index.name,
        latent=latent,
        density=line["density"],
        mean_activation=line["mean_activation"],
        max_activation=line["max_activation"],
        contexts=[_context(entry, index) for entry in line["top"][:n_contexts]],
        promoted=_effects(line["promoted"], texts),
        suppressed=_effects(line["suppressed"], texts),
        neighbours=[(other["latent"], other["score"]) for other in line["neighbours"]],
        explanations=[
            (each["explainer"], each["explanation"], each["detection"]) for each in explained if not each["is_baseline"]
        ],
    )


def _open_index(evaluation: Path, name: str) -> FeatureIndex:
    folder = evaluation / "features"
    path = folder / f"{name}.parquet"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.parquet")))
        advice = f"it has {known}" if known else "run `thresher evaluate` with feature_rows above 0"
        raise ConfigError(f"no feature index of '{name}' in '{evaluation}'; {advice}")
    return FeatureIndex.open(path)


def _context(entry: Mapping[str, Any], index: FeatureIndex) -> ContextText:
    texts = index.texts.in_context(entry["tokens"])
    return ContextText(texts, list(entry["activations"]), entry["peak"], index.documents.get(entry["document"]))


def _effects(effects: list[Mapping[str, Any]], texts: TokenTexts) -> list[tuple[str, float]]:
    return [(texts.alone(each["token"]), each["effect"]) for each in effects]


def _score(score: float | None) -> str:
    return "" if score is None else f" (detection {score:.2f})"
