"""Upload a sweep to the Hub, in the layout that SAELens and Neuronpedia expect: a folder per SAE, and a model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from ..core.errors import ConfigError, MissingFileError
from ..hub.address import repository_address
from ..hub.upload import upload
from ..sae import Sae
from ..sae.formats import find_saes, natural_order
from ..sae.formats.files import CONFIG_NAME, WEIGHTS_NAME
from .card import CardSae, measured_rows, model_card

_TRAINING = "config.toml"
_METRICS = "metrics.json"


def push(
    folder: Path, repository: str, evaluation: Path | None, license_name: str, private: bool, dry_run: bool
) -> list[str]:
    """Upload the SAEs in a folder, their training configurations and metrics, and a card; return lines to print.

    SAEs must be in the format that Thresher and SAELens write. `evaluation` is the output of `thresher evaluate`, by
    default the folder `evaluation` beside the SAEs, if it is there. Nothing else in the folder is uploaded.

    Raises:
        ConfigError: the repository's name is not USER/NAME, or an SAE is of another format.
        MissingFileError: there is no SAE.
        HubError: the Hub cannot be reached, or refuses the upload.
    """
    address = repository_address(repository)
    saes = _saes_of(folder)
    rows = measured_rows(evaluation or folder.parent / "evaluation", required=evaluation is not None)
    card = model_card(repository, saes, rows, license_name)
    with TemporaryDirectory(prefix="thresher-push-") as temporary:
        root = Path(temporary)
        files = ["README.md"]
        (root / "README.md").write_text(card, encoding="utf-8")
        for sae in saes:
            (root / sae.name).mkdir()
            for name in (CONFIG_NAME, WEIGHTS_NAME, _TRAINING):
                if (sae.path / name).is_file():
                    _place(sae.path / name, root / sae.name / name)
                    files.append(f"{sae.name}/{name}")
        if rows:
            source = (evaluation or folder.parent / "evaluation") / _METRICS
            _place(source, root / _METRICS)
            files.append(_METRICS)
        if dry_run:
            return [card, *(f"would upload {name}" for name in files)]
        url = upload(root, address, private=private, message=f"Upload {len(saes)} SAEs with Thresher")
    return [
        f"uploaded {len(saes)} SAEs and {len(files)} files to {url}",
        f'load one with Sae.load("hf://{repository}/{saes[0].name}")',
    ]


def _saes_of(folder: Path) -> list[CardSae]:
    if not folder.is_dir():
        raise MissingFileError(f"no folder '{folder}'; give the output folder of `thresher train`")
    places = [folder] if find_saes(folder) else sorted(folder.iterdir(), key=natural_order)
    saes = []
    for place in places:
        found = find_saes(place) if place.is_dir() else []
        if not found:
            continue
        if found[0][0].name not in ("saelens", "thresher"):
            raise ConfigError(
                f"'{place}' is of the format {found[0][0].name}, which SAELens does not load from the Hub; write it "
                "with `thresher sae convert SOURCE FOLDER --format saelens` first"
            )
        saes.append(CardSae(place.absolute().name, place, Sae.load(place)))
    if not saes:
        raise MissingFileError(f"no SAE in '{folder}'; give the output folder of `thresher train`")
    return saes


def _place(source: Path, target: Path) -> None:
    """Link a file, or copy it where its file system is another."""
    try:
        target.symlink_to(source.absolute())
    except OSError:
        shutil.copyfile(source, target)
