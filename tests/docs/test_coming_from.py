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

SAEV = {
    "saev.framework.shards.Config": (
        "data shards_root family ckpt batch_size n_workers d_model layers content_tokens_per_example "
        "cls_token pixel_agg max_tokens_per_shard ssl device n_hours slurm_acct slurm_partition log_to"
    ),
    "saev.data.ShuffledConfig": (
        "shards tokens layer batch_size drop_last scale_norm ignore_labels n_threads buffer_size "
        "min_buffer_fill batch_timeout_s seed debug log_every_s use_tmpdir"
    ),
    "saev.framework.train.Config": (
        "train_data val_data n_train n_val sae objective n_sparsity_warmup optim lr n_lr_warmup "
        "grad_clip track wandb_project tags log_every runs_root device seed slurm_acct slurm_partition "
        "n_hours mem_gb log_to"
    ),
    "saev.nn.SparseAutoencoderConfig": (
        "d_model d_sae activation reinit_blend reinit_enc_dec_tranpose remove_parallel_grads normalize_w_dec"
    ),
    "saev.nn.modeling.TopK": "key top_k sparsity aux",
    "saev.nn.modeling.BatchTopK": "key top_k sparsity momentum aux",
    "saev.nn.modeling.AuxK": "key k_aux alpha",
    "saev.nn.modeling.L1Sparsity": "key coeff",
    "saev.nn.objectives.Matryoshka": "n_prefixes dead_threshold_tokens",
}
"""The fields of saev's dataclasses, version 0.1.0: it needs Python 3.12, and is not among the peers."""


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


def test_the_settings_of_saev_exist():
    named = [row for row in rows() if row.owner.startswith("saev.")]
    assert {row.owner for row in named} == set(SAEV)
    assert [row for row in named if row.theirs not in SAEV[row.owner].split()] == []


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
    named = [(row.owner, row.theirs) for row in rows() if row.owner not in SAEV]
    assert len(named) > 80
    printed = run_peers("-c", IN_PEERS, json.dumps([*named, ("sparsify.TrainConfig", "no_such_setting")]))
    assert json.loads(printed.splitlines()[-1]) == ["sparsify.TrainConfig: no_such_setting"]
