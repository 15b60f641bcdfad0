"""The three stages on a store in an object store give what they give on one in a folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.run import evaluate
from thresher.harvest.config import HarvestConfig
from thresher.harvest.run import harvest
from thresher.train import TrainConfig, train
from thresher.train.architectures import make_config

HOOK = "blocks.1.resid_post"


@pytest.fixture
def model(tmp_path):
    """Return the folder of a tiny random model with a tokenizer of bytes."""
    alphabet = ["<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>").save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    config = GPT2Config(vocab_size=len(alphabet), bos_token_id=0, eos_token_id=0, **shape)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path):
    """Return a folder of random text."""
    folder = tmp_path / "text"
    folder.mkdir()
    words = np.random.default_rng(0).choice(["dust", "grain", "chaff ", "\n"], (40, 30))
    for i, line in enumerate(words):
        (folder / f"{i:02}.txt").write_text(" ".join(line))
    return folder


def all_stages(store, model, text, output):
    """Harvest, train and evaluate; return the SAE's weights and the metrics."""
    harvest(
        HarvestConfig(
            model=str(model),
            dataset=str(text),
            hook_points=[HOOK],
            store=store,
            tokens=16 * 120,
            context_size=16,
            batch_size=8,
            holdout_fraction=0.3,
            chunk_bytes=16 * 16 * 2,
            shard_bytes=16 * 16 * 2 * 20,
        )
    )
    sae = make_config(architecture="topk", hook_point=HOOK, d_sae=32, k=4, lr=1e-3)
    config = TrainConfig(store=store, output=str(output / "saes"), batch_size=64, tokens=64 * 30, sae=[sae])
    (folder,) = train(config)
    config = EvaluateConfig(store=store, saes=str(output / "saes"), output=str(output / "evaluation"), model=str(model))
    evaluate(config)
    return load_file(folder / "sae_weights.safetensors"), json.loads(
        (output / "evaluation" / "metrics.json").read_text()
    )


def test_every_stage_reads_and_writes_a_url(s3, objects, model, text, tmp_path):
    url = s3()
    weights, metrics = all_stages(url, model, text, tmp_path / "remote")
    expected_weights, expected = all_stages(str(tmp_path / "store"), model, text, tmp_path / "local")
    assert "manifest.jsonl" in objects.read(url)
    assert weights.keys() == expected_weights.keys()
    for name, values in expected_weights.items():
        np.testing.assert_array_equal(weights[name], values)
    assert [row.pop("store") for row in metrics + expected] == [url, str(tmp_path / "store")]
    assert metrics == expected
    assert {"explained_variance", "ce_loss_score"} <= metrics[0].keys()


@pytest.fixture
def play(ranks_config, play_ranks, model, text, tmp_path, s3, objects):
    """The function that lets ranks write below a URL, holds each store to a plain one, and returns the notes."""
    return lambda mode: held_to_plain(play_ranks(ranks_config(model, text), mode, s3()), tmp_path, objects)


def held_to_plain(result, tmp_path, objects):
    """Hold each store to the plain one, and return the notes."""
    assert result["problems"] == []
    plain = tmp_path / "plain" / "store"
    expected = {str(p.relative_to(plain)): p.read_bytes() for p in plain.rglob("*") if p.is_file()}
    del expected["harvest.toml"]  # it names the store
    for store in result["stores"]:
        found = objects.read(store)
        assert found.pop("harvest.toml")
        assert found == expected, store
    assert len({key for key in expected if key.startswith("tokens/c.")}) == 11
    return result["notes"]


def test_ranks_leave_the_objects_of_one_process_on_a_url(play):
    first_killed, other_killed = play("quick-url")
    assert "error: rank 1 stops: another rank ended or cannot be reached; what was harvested" in first_killed
    assert "error: rank 1 is gone; what was harvested is kept: run the same command again" in other_killed


@pytest.mark.long
def test_after_kills_any_number_of_ranks_completes_a_store_at_a_url(play):
    notes = play("random-url")
    assert sum("-9" in note for note in notes) >= 12, notes
