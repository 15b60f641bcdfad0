"""The settings of other libraries on docs/coming-from.md exist there, and ours beside them exist here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from thresher.harvest.config import HarvestConfig
from thresher.train.architectures.registry import ARCHITECTURES
from thresher.train.config import SaeConfig, TrainConfig

PAGE = Path(__file__).parents[2] / "docs/coming-from.md"
OURS = {
    "harvest": set(HarvestConfig.__struct_fields__),
    "train": set(TrainConfig.__struct_fields__),
    "[[sae]]": set(SaeConfig.__struct_fields__).union(*(registered.keys for registered in ARCHITECTURES.values())),
    "": {""},
}


class Row(NamedTuple):
    """A row of a table: the class or function of the other library, its setting, and ours."""

    owner: str
    theirs: str
    where: str
    ours: str
    note: str


def rows() -> list[Row]:
    found = []
    for section in re.split(r"^### ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        owner = re.match(r"`([\w.]+)`", section)[1]
        for line in re.findall(r"^\| (`.*) \|$", section, flags=re.MULTILINE):
            theirs, where, ours, note = (cell.strip() for cell in line.replace("\\|", "/").split("|"))
            found.append(Row(owner, theirs.strip("`"), where, ours.strip("`"), note))
    return found


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row.owner}.{row.theirs}")
def test_our_setting_exists_and_a_missing_one_is_explained(row):
    assert row.ours in OURS[row.where]
    assert row.ours or row.note


IN_PEERS = """
import importlib, inspect, json, sys
missing = []
for owner, setting in json.loads(sys.argv[1]):
    module, _, name = owner.rpartition(".")
    if setting not in inspect.signature(getattr(importlib.import_module(module), name)).parameters:
        missing.append(f"{owner}: {setting}")
print(json.dumps(missing))
"""


@pytest.mark.peers
def test_their_settings_exist(run_peers):
    named = [(row.owner, row.theirs) for row in rows()]
    assert len(named) > 80
    printed = run_peers("-c", IN_PEERS, json.dumps([*named, ("sparsify.TrainConfig", "no_such_setting")]))
    assert json.loads(printed.splitlines()[-1]) == ["sparsify.TrainConfig: no_such_setting"]
