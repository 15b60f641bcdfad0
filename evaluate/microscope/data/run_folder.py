"""Find what the pipeline wrote: an evaluation with its feature indexes, and the SAEs and the model that it names."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....shared.core.config import load_config
from ....shared.core.errors import ConfigError, DataError, MissingFileError, ThresherError
from ....shared.core.paths import user_path
from ....shared.store import ActivationStore
from ...config import EvaluateConfig
from ...features.files import FeatureIndex
from ...results.output import latents_path, loss_curve
from ...saes.sae_folders import sae_folders, unique_names
from ...with_model.store_model import chosen_adapter, harvested_revision, model_name, open_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelSource:
    """What to load as the model, and why there is none, if so.

    `tokenizer` loads the tokenizer that the store's tokens were made with; without it, the model's is meant. `bos` is
    the token that begins the store's texts, and `masked` are those that SAEs were not trained on.
    """

    name: str | None
    revision: str | None = None
    adapter: str | None = None
    missing: str = ""
    tokenizer: Callable[[], PreTrainedTokenizerBase | None] | None = None
    bos: int | None = None
    masked: tuple[int, ...] = ()


@dataclass(frozen=True)
class OpenRun:
    """An evaluation on disk.

    Attributes:
        folder: the output folder of `thresher evaluate`.
        config: its settings.
        metrics: the rows of metrics.json of SAEs that were evaluated.
        indexes: the feature indexes by SAE name, in the order of the metrics.
        saes: the folders of SAEs that are still there, by name.
        model: the language model.
        store: the store that was evaluated on, if it is still there.
    """

    folder: Path
    config: EvaluateConfig
    metrics: list[dict[str, Any]]
    indexes: dict[str, FeatureIndex]
    saes: dict[str, Path]
    model: ModelSource
    store: ActivationStore | None = None

    def row(self, name: str) -> dict[str, Any]:
        """Return the metrics of an SAE; empty if it has none."""
        return next((row for row in self.metrics if row["name"] == name), {})

    @property
    def transcoders(self) -> list[str]:
        """The transcoders with weights: SAEs that reconstruct another hook point than they read."""
        rows = {row["name"]: row for row in self.metrics}
        found = [rows[name] for name in self.saes if name in rows]
        return [row["name"] for row in found if row.get("target_hook_point", row["hook_point"]) != row["hook_point"]]

    def latents_file(self, name: str) -> Path:
        """Return the path of an SAE's `latents` file, which holds decoder neighbours."""
        return latents_path(self.folder, self.indexes[name].path.stem)

    def loss_curves(self) -> dict[str, list[dict[str, Any]]]:
        """Return the lines that training logged, by SAE name."""
        return {name: loss_curve(path) for name, path in self.saes.items()}


def find_evaluation(run: str | Path) -> Path:
    """Return the evaluation in a run's folder, which may be the folder itself.

    Raises:
        MissingFileError: there is none.
        ConfigError: there are several.
    """
    folder = user_path(run)
    if not folder.is_dir():
        raise MissingFileError(f"no folder '{run}'; expected that of a run, such as runs/demo")
    if _is_evaluation(folder):
        return folder
    found = sorted(entry for entry in folder.iterdir() if entry.is_dir() and _is_evaluation(entry))
    named = [entry for entry in found if entry.name == "evaluation"]
    if named or len(found) == 1:
        return (named or found)[0]
    if found:
        raise ConfigError(f"'{run}' has several evaluations; give one of them: {', '.join(map(str, found))}")
    raise MissingFileError(f"no evaluation in '{run}'; expected a folder that `thresher evaluate` wrote")


def _is_evaluation(folder: Path) -> bool:
    return (folder / "metrics.json").is_file() and (folder / "config.toml").is_file()


def open_run(run: str | Path, model: str | bool | None = None) -> OpenRun:
    """Open the evaluation of a run; `model` is in place of the one that it names, `False` for none.

    Raises:
        MissingFileError: there is no evaluation, or it has no feature index.
        ConfigError: there are several evaluations.
        DataError: metrics.json is damaged.
    """
    folder = find_evaluation(run)
    config = load_config(EvaluateConfig, folder / "config.toml", [])
    try:
        metrics = [row for row in json.loads((folder / "metrics.json").read_bytes()) if row.get("hook_point")]
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"'{folder / 'metrics.json'}' cannot be read: {error}; evaluate the run again") from None
    found = [FeatureIndex.open(path) for path in sorted((folder / "features").glob("*.parquet"))]
    if not found:
        raise MissingFileError(
            f"the evaluation '{folder}' has no feature index; run `thresher evaluate` with feature_rows above 0"
        )
    order = {row["name"]: i for i, row in enumerate(metrics)}
    found.sort(key=lambda index: order.get(index.name, len(order)))
    indexes = {index.name: index for index in found}
    store = _store(config, folder)
    source = _model(config, folder, metrics, model, store)
    return OpenRun(folder, config, metrics, indexes, _saes(config, folder), source, store)


def find_near(path: str, folder: Path) -> Path | None:
    """Return where a path of a configuration is: as written, or else relative to a parent of the run's folder."""
    given = user_path(path)
    if given.exists() or given.is_absolute():
        return given if given.exists() else None
    return next((parent / given for parent in folder.absolute().parents if (parent / given).exists()), None)


def _saes(config: EvaluateConfig, folder: Path) -> dict[str, Path]:
    """Return the SAEs of an evaluation that are still on this machine; nothing is downloaded."""
    given = [config.saes] if isinstance(config.saes, str) else config.saes
    here = [str(path) for entry in given if (path := find_near(entry, folder)) is not None]
    try:
        folders = sae_folders(here) if here else []
    except ThresherError:
        return {}
    return dict(zip(unique_names(folders), folders, strict=True))


def _store(config: EvaluateConfig, folder: Path) -> ActivationStore | None:
    """Return the evaluation's store, or None if it is gone or cannot be read."""
    where = config.store if "://" in config.store else find_near(config.store, folder)
    try:
        return ActivationStore.open(where or config.store, roles=config.roles)
    except (ThresherError, OSError):
        return None


def _model(
    config: EvaluateConfig,
    folder: Path,
    metrics: list[dict[str, Any]],
    given: str | bool | None,
    store: ActivationStore | None,
) -> ModelSource:
    """Return the model that the settings name, else the evaluation's."""
    if given is False:
        return ModelSource(None, missing="the microscope was started with --model false")
    if isinstance(given, str):
        return ModelSource(given)
    named = config.model if isinstance(config.model, str) else None
    fallback = named or next((row["model"] for row in metrics if row.get("model")), None)
    if store is None:
        return _at(fallback, folder)
    try:
        name = model_name(config, store) or store.metadata.get("model")
        revision, adapter = harvested_revision(store), chosen_adapter(config, store)
    except (ThresherError, OSError):
        return _at(fallback, folder)
    bos = store.metadata.get("bos_token_id")
    return _at(
        name,
        folder,
        revision=revision,
        adapter=adapter,
        tokenizer=partial(open_tokenizer, config, store),
        bos=bos if isinstance(bos, int) else None,
        masked=tuple(store.mask_token_ids),
    )


def _at(name: str | None, folder: Path, **known: Any) -> ModelSource:
    """Return a model by its name, or by its path near the run."""
    if not name:
        return ModelSource(None, missing="the evaluation names no model; give one with --model")
    found = find_near(name, folder) if "://" not in name else None
    return ModelSource(str(found or name), **known)
