"""Download SAEs from the Hub into a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..core.disk import check_writable, replacing_folder
from ..core.errors import ConfigError
from ..hub.address import is_hub_address
from ..sae.formats import walk_saes
from ..sae.sources import locate_source


def pull(source: str, folder: Path) -> list[str]:
    """Copy what a source on the Hub, or a release's name, stands for into a new folder, and return lines to print.

    Downloaded files stay in the Hub's cache as well, from which a second pull copies them.

    Raises:
        ConfigError: the folder is there already, or the source is not on the Hub.
        HubError: the Hub does not give it.
    """
    check_writable(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"'{folder}' is there already; choose a new folder")
    located = locate_source(source, several=True).path
    if not is_hub_address(source) and Path(source).expanduser() == located:
        raise ConfigError(f"'{source}' is not on the Hub; expected hf://USER/REPO/path@revision or a release's name")
    with replacing_folder(folder) as partial:
        if located.is_file():
            partial.mkdir(parents=True)
            for path in located.parent.iterdir():
                if path.name == located.name or path.suffix in (".json", ".yaml"):
                    shutil.copyfile(path, partial / path.name)
        else:
            shutil.copytree(located, partial)
    found, notes = walk_saes(folder)
    return [*(f"note: {note}" for note in notes), f"downloaded {len(found)} SAEs to '{folder}'"]
