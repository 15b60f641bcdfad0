"""What can be searched of each latent: its explanations, the tokens that it promotes and fires on, and its contexts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ...features.files import FeatureIndex
from ..data.latents import LatentTables

N_CONTEXTS, N_TOKENS, BESIDE = 3, 10, 10
READ_AT_ONCE = 8192
_SQL = f"""
    SELECT latent, list_transform("top"[1:{N_CONTEXTS}], lambda entry: entry.tokens) AS contexts,
           list_transform("top", lambda entry: entry.peak) AS places,
           list_transform("top", lambda entry: entry.tokens[entry.peak + 1]) AS peaks,
           list_transform(promoted, lambda effect: effect.token) AS promoted
    FROM read_parquet(?) WHERE firings > 0 AND latent >= ? AND latent < ? ORDER BY latent
"""


class LatentText(NamedTuple):
    """The words of one latent; `contexts` are its strongest ones."""

    latent: int
    explanation: str
    tokens: str
    contexts: list[str]
    near: list[str]

    @property
    def for_meaning(self) -> str:
        """What is embedded: the explanation first, then the tokens, then what stands around the peaks."""
        parts = [self.explanation, self.tokens, *self.near]
        return ". ".join(" ".join(part.split()) for part in parts if part.strip())


def latent_texts(tables: LatentTables, name: str) -> Iterator[LatentText]:
    """Yield the words of each latent of an SAE that fires, in order."""
    index = tables.index(name)
    for start in range(0, index.n_latents, READ_AT_ONCE):
        rows = tables.rows(_SQL, [str(index.path.absolute()), start, start + READ_AT_ONCE])
        said = tables.explanations(name, [row["latent"] for row in rows])
        for row in rows:
            yield _text(index, row, said.get(row["latent"], ()))


def _text(index: FeatureIndex, row: Mapping[str, Any], said: Sequence[Mapping[str, Any]]) -> LatentText:
    texts = index.texts
    whole = [texts.in_context(tokens) for tokens in row["contexts"]]
    near = [
        "".join(some[max(0, place - BESIDE) : place + BESIDE // 2])
        for some, place in zip(whole, row["places"], strict=False)
    ]
    tokens = dict.fromkeys([*row["peaks"], *row["promoted"][:N_TOKENS]])
    return LatentText(
        row["latent"],
        ". ".join(dict.fromkeys(line["explanation"] for line in said if not line["is_baseline"])),
        " ".join(dict.fromkeys(texts.alone(token).strip() for token in tokens)),
        ["".join(some) for some in whole],
        near,
    )
