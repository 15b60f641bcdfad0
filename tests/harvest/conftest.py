"""A tiny random model with a tokenizer of bytes, and some text: what the harvests of the tests read."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from thresher.harvest.config import HarvestConfig

BOS = "<bos>"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([BOS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS).save_pretrained(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(vocab), n_embd=16, n_layer=3, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(60):
        words = rng.choice(["dust", "grain", "größe", BOS, "\n", "chaff "], rng.integers(1, 12))
        (folder / f"{i:02}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


@pytest.fixture
def config(model_folder, text_folder, tmp_path):
    """A harvest of few tokens, from a copy of the model that a test may change."""
    shutil.copytree(model_folder, tmp_path / "model")
    return HarvestConfig(
        model=str(tmp_path / "model"),
        dataset=str(text_folder),
        hook_points=["blocks.1.resid_post"],
        store=str(tmp_path / "store"),
        tokens=160,
        context_size=8,
        batch_size=2,
        holdout_fraction=0.35,
        dtype="float32",
        model_dtype="float32",
        workers=1,
    )
