"""A hook point's rows are what its name says, whatever else is harvested beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from thresher.harvest.config import HarvestConfig
from thresher.harvest.run import harvest
from thresher.shared import ActivationStore
from thresher.shared.core.cli import main

from ..tiny_models import build

KINDS = ("resid_pre", "attn_out", "mlp_out", "resid_post")


@pytest.fixture
def harvested(model_folder, text_folder, tmp_path):
    """The function that harvests kinds of hook point of block 1 of a tiny model and opens the store."""

    def run(model_type, kinds=KINDS):
        folder = tmp_path / model_type
        if not folder.exists():
            build(model_type, vocab_size=257).save_pretrained(folder)
            for file in Path(model_folder).glob("tokenizer*"):
                shutil.copy(file, folder)
        config = HarvestConfig(
            model=str(folder),
            dataset=str(text_folder),
            hook_points=[f"blocks.1.{kind}" for kind in kinds],
            store=str(tmp_path / f"{model_type}-{'-'.join(kinds)}"),
            tokens=256,
            context_size=16,
            holdout_fraction=0.35,
            dtype="float32",
            model_dtype="float32",
            workers=1,
        )
        return ActivationStore.open(harvest(config))

    return run


def rows(store, kind):
    return store.read(f"blocks.1.{kind}", 0, store.n_rows).double()


@pytest.mark.parametrize("model_type", ["bloom", "mpt", "granite", "minicpm3", "falcon"])
def test_the_rows_of_the_parts_add_up_to_the_stream(harvested, model_type):
    store = harvested(model_type)
    pre, attn, mlp, post = (rows(store, kind) for kind in KINDS)
    for part in (attn, mlp):
        assert float((pre + attn + mlp - post).norm() / part.norm()) < 1e-5
    measured = store.metadata["certificate"]
    assert measured["measured_in"] == "float32"
    assert list(measured["hook_points"]) == [f"blocks.1.{kind}" for kind in KINDS]
    assert measured["hook_points"]["blocks.1.mlp_out"] == {
        "module": store.metadata["hook_modules"]["blocks.1.mlp_out"],
        "side": "output",
        "identity": "resid_pre + attn_out + mlp_out = resid_post"
        if model_type == "falcon"
        else "resid_mid + mlp_out = resid_post",
        "derived": {
            "granite": "model.layers.1.mlp times residual_multiplier",
            "minicpm3": "model.layers.1.mlp times residual_scale",
        }.get(model_type, ""),
        "cloned": model_type == "falcon",
        "splice": True,
    }


def test_a_row_does_not_depend_on_what_else_is_harvested(harvested):
    alone, beside = harvested("falcon", ("mlp_out",)), harvested("falcon", KINDS)
    assert float((rows(alone, "mlp_out") - rows(beside, "mlp_out")).abs().max()) == 0


def test_a_name_that_does_not_hold_ends_the_harvest_in_one_line(model_folder, text_folder, tmp_path, capsys):
    build("falcon_h1", vocab_size=257).save_pretrained(tmp_path / "model")
    for file in Path(model_folder).glob("tokenizer*"):
        shutil.copy(file, tmp_path / "model")
    arguments = ["--model", tmp_path / "model", "--dataset", text_folder, "--store", tmp_path / "store"]
    more = ["--hook_points", "blocks.1.attn_out", "--tokens", 256, "--context_size", 16]
    assert main(["harvest", *map(str, arguments + more)]) == 2
    shown = capsys.readouterr().err
    assert (
        "no hook point 'blocks.1.attn_out' in FalconH1ForCausalLM: the block does not add the output of its attention"
        in shown
    )
    assert "`thresher hooks MODEL` lists those it has" in shown
    assert not (tmp_path / "store").exists()
