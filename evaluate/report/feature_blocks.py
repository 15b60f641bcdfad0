"""Pack feature indexes into compressed blocks that the report unpacks one at a time, when they are shown."""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ...shared.core.disk import replacing_folder
from ...shared.core.terminal.progress import progress as show_progress
from ..features.files import FeatureIndex
from ..features.token_text import TokenTexts

BLOCK_LATENTS = 128
N_TOP, N_SAMPLED, N_PEAKS = 8, 6, 4
INLINE_BYTES = 24 << 20
"""Blocks beyond this many bytes in total are written to files beside the report, so that the page opens quickly."""


class Block(NamedTuple):
    """A block's element id and its content: JSON, gzip, Base64."""

    id: str
    text: str


class Packed(NamedTuple):
    """The blocks inside the page, the folder of those beside it, and the catalogue that lists all SAEs."""

    inline: list[Block]
    folder: Path | None
    catalogue: dict[str, Any]


Explanations = Mapping[int, Sequence[Mapping[str, Any]]]
"""What explainers say of an SAE's latents, with scores, by latent: lines of `explanations/NAME.parquet`."""
SHOWN_SCORES = ("detection", "fuzzing", "simulation", "intruder", "balanced_accuracy", "causal")


def pack_features(
    features: Mapping[str, FeatureIndex], report: Path, explanations: Mapping[str, Explanations] | None = None
) -> Packed:
    """Pack indexes for the report at path `report`, and write the blocks that do not fit inside it to files."""
    catalogue: dict[str, Any] = {"saes": {}, "names": "names"}
    tokens: dict[int, str] = {}
    documents: dict[int, str] = {}
    inline: list[Block] = []
    room = INLINE_BYTES
    folder = report.with_name(f"{report.stem}_features")
    total = sum(index.n_latents for index in features.values())
    progress = show_progress(total=total, unit="latent", unit_scale=True, desc="report")
    with replacing_folder(folder) as partial:
        for number, (name, index) in enumerate(features.items()):
            tokens |= index.vocabulary
            documents |= index.documents
            prefix = f"sae{number}"
            catalogue["saes"][name] = {
                "n": index.n_latents,
                "size": BLOCK_LATENTS,
                "rows": index.metadata.get("n_rows"),
                "prefix": prefix,
            }
            for block in _blocks(prefix, index, (explanations or {}).get(name, {})):
                progress.update(min(BLOCK_LATENTS, index.n_latents) if not block.id.endswith("summary") else 0)
                room -= len(block.text)
                if room >= 0 or block.id.endswith("summary"):
                    inline.append(block)
                else:
                    partial.mkdir(parents=True, exist_ok=True)
                    script = f"thresherBlock({json.dumps(block.id)},{json.dumps(block.text)})\n"
                    (partial / f"{block.id}.js").write_text(script, encoding="ascii")
    progress.close()
    inline.append(encode_block("names", {"tokens": tokens, "documents": documents}))
    if not folder.is_dir():
        return Packed(inline, None, catalogue)
    return Packed(inline, folder, catalogue | {"folder": folder.name})


def _blocks(prefix: str, index: FeatureIndex, explanations: Explanations) -> Iterator[Block]:
    """Yield one SAE's blocks of latents, then the summary for its list of latents."""
    summary: dict[str, list[Any]] = {key: [] for key in ("density", "max", "score", "peaks", "promoted")}
    for number, lines in enumerate(index.batches(BLOCK_LATENTS)):
        for line in lines:
            peaks = Counter(entry["tokens"][entry["peak"]] for entry in line["top"])
            summary["density"].append(_short(line["density"]))
            summary["max"].append(_short(line["max_activation"]))
            summary["score"].append(_short(line["interestingness"]))
            summary["peaks"].append([token for token, _ in peaks.most_common(N_PEAKS)])
            summary["promoted"].append([effect["token"] for effect in line["promoted"][:N_PEAKS]])
        yield encode_block(f"{prefix}-{number}", [_latent(line, index.texts, explanations) for line in lines])
    yield encode_block(f"{prefix}-summary", summary)


def _latent(line: Mapping[str, Any], texts: TokenTexts, explanations: Explanations) -> dict[str, Any]:
    shown = {entry["context"] for entry in line["top"][:N_TOP]}
    sampled = [entry for entry in line["sampled"] if entry["context"] not in shown]
    last = max((i for i, count in enumerate(line["histogram"]) if count), default=-1) + 1
    return {
        "firings": line["firings"],
        "mean": _short(line["mean_activation"]),
        "end": _short(line["histogram_end"] * last / max(1, len(line["histogram"]))),
        "histogram": line["histogram"][:last],
        "top": [_context(entry, texts) for entry in line["top"][:N_TOP]],
        "sampled": [_context(entry, texts) for entry in _spread(sampled, N_SAMPLED)],
        "promoted": [[effect["token"], _short(effect["effect"])] for effect in line["promoted"]],
        "suppressed": [[effect["token"], _short(effect["effect"])] for effect in line["suppressed"]],
        "neighbours": [[other["latent"], _short(other["score"])] for other in line["neighbours"]],
        **_explained(explanations.get(line["latent"], ())),
    }


def _explained(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what explainers say of one latent as the page reads it: [explainer, text, scores, baseline?]."""
    if not lines:
        return {}

    def scores(line: Mapping[str, Any]) -> dict[str, list[float | None]]:
        return {
            name: [None if line[key] is None else _short(line[key]) for key in (name, f"{name}_low", f"{name}_high")]
            for name in SHOWN_SCORES
            if line.get(name) is not None
        }

    return {
        "explanations": [[line["explainer"], line["explanation"], scores(line), line["is_baseline"]] for line in lines]
    }


def _spread(entries: Sequence[Any], n: int) -> list[Any]:
    """Return `n` evenly spaced entries of a list: quantiles, if the list is sorted."""
    if len(entries) <= n:
        return list(entries)
    return [entries[round(i * (len(entries) - 1) / (n - 1))] for i in range(n)]


def _context(entry: Mapping[str, Any], texts: TokenTexts) -> list[Any]:
    """Return a context in the page's format; the texts of its tokens are appended if a token splits a character."""
    active = {str(i): _short(value) for i, value in enumerate(entry["activations"]) if value}
    where = [entry["document"], entry["position"], entry["context"]]
    in_context = texts.in_context(entry["tokens"])
    different = [] if in_context == [texts.alone(token) for token in entry["tokens"]] else [in_context]
    return [_short(entry["activation"]), entry["peak"], entry["tokens"], active, *where, *different]


def encode_block(name: str, value: Any) -> Block:
    """Encode a value as a block; the same value always gives the same text."""
    content = msgspec.json.encode(value)
    return Block(name, base64.b64encode(gzip.compress(content, 6, mtime=0)).decode("ascii"))


def _short(value: float) -> float:
    return float(f"{value:.3g}") if math.isfinite(value) else 0.0
