"""The model card of a sweep: what was trained on what, how it was measured, and how to load it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..core.config import read_toml
from ..core.errors import MissingFileError, SaeError, ThresherError
from ..core.version import thresher_version
from ..sae import Sae
from ..sae.formats.files import WEIGHTS_NAME
from ..sae.formats.saelens_keys import SAELENS_ARCHITECTURES
from ..store import ActivationStore
from .describe import selection, sizes_in_words

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TAGS = ["saelens", "sparse-autoencoder", "mechanistic-interpretability", "sae", "thresher"]
_FIGURES = (
    ("explained_variance", "explained variance", 4),
    ("l0", "L0", 1),
    ("ce_loss_score", "CE score", 4),
    ("kl_div_score", "KL score", 4),
    ("dead_fraction", "dead", 4),
)


class CardSae(NamedTuple):
    """An SAE of the sweep: its folder's name, its path, and the SAE."""

    name: str
    path: Path
    sae: Sae


def measured_rows(evaluation: Path, required: bool) -> dict[str, dict[str, Any]]:
    """Return the rows of an evaluation's `metrics.json` by SAE; none where there is no evaluation.

    Raises:
        MissingFileError: it is required and not there.
        SaeError: it is damaged.
    """
    path = evaluation / "metrics.json"
    if not path.is_file():
        if required:
            raise MissingFileError(f"no metrics.json in '{evaluation}'; give the output folder of `thresher evaluate`")
        return {}
    try:
        rows = json.loads(path.read_bytes())
        return {str(row["name"]): row for row in rows if not row.get("error")}
    except (ValueError, TypeError, KeyError) as error:
        raise SaeError(f"'{path}' is damaged: {error}; evaluate the SAEs again") from None


def model_card(
    repository: str, saes: Sequence[CardSae], rows: Mapping[str, Mapping[str, Any]], license_name: str
) -> str:
    """Return a sweep's `README.md`, with the front matter that the Hub reads."""
    said = saes[0].sae.config | saes[0].sae.metadata
    model, dataset = said.get("model_name"), said.get("dataset_path")
    front: dict[str, Any] = {"library_name": "saelens", "license": license_name, "tags": _TAGS}
    if isinstance(model, str) and _is_hub_name(model):
        front["base_model"] = model
    if isinstance(dataset, str) and "/" in dataset and _is_hub_name(dataset):
        front["datasets"] = [dataset]
    stored = _harvest_of(saes, rows)
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {repository.partition('/')[2]}",
        f"{len(saes)} sparse autoencoders{f' of {_named(model)}' if model else ''}"
        f"{f', trained on text of {_named(dataset)}' if dataset else ''}, made with Thresher {thresher_version()}.",
        "## SAEs\n\n" + _table(saes, rows),
        _measured_how(saes, rows),
        "## Use\n\n" + _snippets(repository, saes[0]),
        "## Training\n\n" + _origin(said, stored) + "\n\n" + _configurations(saes),
        "## Checksums\n\n" + _checksums(saes),
        "## Citation\n\n" + _citation(repository),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _is_hub_name(name: str) -> bool:
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def _named(name: object) -> str:
    return f"`{name}`"


def _table(saes: Sequence[CardSae], rows: Mapping[str, Mapping[str, Any]]) -> str:
    figures = [figure for figure in _FIGURES if any(row.get(figure[0]) is not None for row in rows.values())]
    header = ["folder", "kind", "reads", "writes", "sizes", "latents", *(title for _, title, _ in figures)]
    lines = [header, ["---"] * len(header)]
    for name, _, sae in saes:
        row = rows.get(name, {})
        writes = ", ".join(sae.writes) if sae.reads != _writes(sae) else "the same"
        cells = [_named(name), sae.architecture, ", ".join(sae.reads), writes, sizes_in_words(sae), selection(sae)]
        lines.append([*cells, *(_figure(row, key, decimals) for key, _, decimals in figures)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _writes(sae: Sae) -> tuple[str, ...]:
    try:
        return sae.writes
    except SaeError:
        return ()


def _figure(row: Mapping[str, Any], key: str, decimals: int) -> str:
    value = row.get(key)
    if value is None:
        return "not measured"
    interval = (row.get("confidence_95") or {}).get(key)
    spread = f" ({interval[0]:.{decimals}f} to {interval[1]:.{decimals}f})" if interval else ""
    return f"{value:.{decimals}f}{spread}"


def _measured_how(saes: Sequence[CardSae], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Say on what the figures rest, or that there are none."""
    known = [rows[name] for name, *_ in saes if name in rows]
    if not known:
        return "These SAEs were not evaluated: no figures are given."
    first = known[0]
    facts = [
        f"{first[key]:,} {words}" for key, words in (("n_rows", "rows"), ("n_documents", "documents")) if first.get(key)
    ]
    mask = f"; {first['mask']}" if first.get("mask") else ""
    scores = (
        "The CE and KL scores compare the model with the SAE spliced in with the model itself (1) and with the "
        "activation set to zero (0). "
        if any(row.get("ce_loss_score") is not None for row in known)
        else ""
    )
    return (
        f"Measured by `thresher evaluate` on {' of '.join(facts) or 'rows'} that were held out: whole documents, on "
        f"which no SAE was trained{mask}. In brackets: 95% intervals of a bootstrap over documents. "
        f"{scores}`metrics.json` has every figure."
    )


def _snippets(repository: str, first: CardSae) -> str:
    thresher = f'from thresher import Sae\n\nsae = Sae.load("hf://{repository}/{first.name}")\nlatents = sae.encode(x)'
    text = f"```python\n{thresher}  # x: [rows, {first.sae.d_in}], activations as the model computes them\n```"
    if first.sae.architecture in SAELENS_ARCHITECTURES:
        text += (
            f'\n\n```python\nfrom sae_lens import SAE\n\nsae = SAE.from_pretrained("{repository}", "{first.name}")\n```'
        )
    return text


def _origin(said: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    """Return what is known of the model and the data, from the SAEs and from the store where it is at hand."""
    facts = {
        "model": said.get("model_name"),
        "model's revision": stored.get("revision"),
        "model's files": said.get("model_content"),
        "data set": said.get("dataset_path"),
        "data set's revision": stored.get("dataset_revision"),
        "tokens per context": said.get("context_size"),
        "begins with BOS": said.get("prepend_bos"),
        "tokens harvested": stored.get("tokens"),
        "held out": _percent(stored.get("holdout_fraction")),
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value is not None)


def _percent(fraction: object) -> str | None:
    return f"{fraction:.4g} of the documents" if isinstance(fraction, int | float) else None


def _harvest_of(saes: Sequence[CardSae], rows: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the settings of the harvest that made the store, from the store if it is a folder on this machine."""
    named = [row["store"] for row in rows.values() if row.get("store")]
    for _, path, _ in saes:
        file = path / "config.toml"
        named += [read_toml(str(file)).get("store")] if file.is_file() else []
    store = next((str(name) for name in named if name and Path(str(name)).is_dir()), None)
    try:
        return dict(ActivationStore.open(store).metadata.get("harvest") or {}) if store else {}
    except ThresherError:
        return {}


def _configurations(saes: Sequence[CardSae]) -> str:
    """Return each SAE's own settings; the whole configuration is in `config.toml` beside it."""
    blocks = []
    for name, path, sae in saes:
        whole = f", all of it in `{name}/config.toml`" if (path / "config.toml").is_file() else ""
        settings = json.dumps(sae.config, default=str)
        blocks.append(f"- `{name}`: `{settings}`{whole}")
    return "\n".join(blocks)


def _checksums(saes: Sequence[CardSae]) -> str:
    lines = []
    for name, path, _ in saes:
        with (path / WEIGHTS_NAME).open("rb") as file:
            lines.append(f"- `{name}/{WEIGHTS_NAME}`: SHA-256 `{hashlib.file_digest(file, 'sha256').hexdigest()}`")
    return "\n".join(lines)


def _citation(repository: str) -> str:
    user, _, name = repository.partition("/")
    key = re.sub(r"\W", "", name.lower())
    return (
        f"```bibtex\n@misc{{{key},\n  title = {{{name}}},\n  author = {{{user}}},\n"
        f"  howpublished = {{\\url{{https://huggingface.co/{repository}}}}},\n"
        "  note = {Trained with Thresher}\n}\n```"
    )
