"""Settings that a configuration leaves open follow the run; explicit ones win, and a run keeps what it began with."""

import math

import msgspec
import numpy as np
import pytest

from thresher.shared import ActivationStoreWriter
from thresher.shared.core.config import read_toml
from thresher.shared.sae import Sae
from thresher.train import TrainConfig, train
from thresher.train.architectures import make_config
from thresher.train.checkpoints.record import load_record, save_record
from thresher.train.recipes import RunFacts, batch_size_for, completed, settings_for, warmup_for

TOPK = {"architecture": "topk", "hook_point": "h", "d_sae": 32, "k": 4, "name": "sae"}


def settings(table, n_steps, recipe="auto", batch_size=2048, starts_from_sae=False):
    chosen = settings_for(make_config(**table), RunFacts(n_steps, batch_size, 32, starts_from_sae), recipe)
    return {key: setting.value for key, setting in chosen.items()}


@pytest.fixture(scope="module")
def store(tmp_path_factory, sparse_activations):
    path = tmp_path_factory.mktemp("store") / "store"
    with ActivationStoreWriter(path, {"h": 32}, 16, dtype="float32", codec="none") as writer:
        writer.append({"h": sparse_activations[:3200].view(200, 16, 32).float()}, held_out=np.arange(200) % 5 == 0)
    return path


@pytest.fixture
def config(store, tmp_path):
    return TrainConfig(
        store=str(store), output=str(tmp_path / "out"), batch_size=128, tokens=128 * 40, device="cpu", sae=[TOPK]
    )


def change(config, **changes):
    return msgspec.structs.replace(config, **changes)


def weights(config):
    (folder,) = train(config)
    return (folder / "sae_weights.safetensors").read_bytes()


def test_rates_fall_with_the_length_and_moments_average_over_a_tenth_of_it():
    alike = {"decoder_lr_scale": 1.6}
    assert settings(TOPK, 200) == alike | {"lr": 8e-3, "beta1": 0.6, "beta2": 0.95}
    assert settings(TOPK, 50) == alike | {"lr": 8e-3, "beta1": 0.6, "beta2": 0.95}
    assert settings(TOPK, 20_000) == alike | {"lr": 1.2e-3, "beta1": 0.9, "beta2": 0.999}
    wide = TOPK | {"d_sae": 2**15}
    assert settings(wide, 10**6)["lr"] == pytest.approx(2e-4 / math.sqrt(2), rel=0.02)  # the published rule
    assert settings(wide, 200)["lr"] == pytest.approx(8e-3 / 4, rel=0.02)
    assert settings(TOPK, 1000)["beta2"] == pytest.approx(1 - 1 / 100)
    assert settings(TOPK, 700)["lr"] == 8e-3
    # On logarithmic axes, a line from 8e-3 at 700 steps to the published rule at 70,000.
    slope = math.log(8e-3 / (2e-4 * math.sqrt(2**14 / 2048))) / math.log(70_000 / 700)
    assert settings(TOPK, 2000)["lr"] == pytest.approx(8e-3 * (700 / 2000) ** slope, rel=0.02)
    assert settings(TOPK, 200, batch_size=256)["lr"] == 4e-3
    assert settings(TOPK, 200, batch_size=8192)["lr"] == 8e-3


def test_gradients_are_averaged_over_few_steps_in_short_runs_of_saes():
    """Over `steps / 300`, from 2.5 to 10; transcoders, which keep the channels, and gated SAEs are better at 10."""
    assert [settings(TOPK, n)["beta1"] for n in (100, 750, 1500, 3000, 10**5)] == [0.6, 0.6, 0.8, 0.9, 0.9]
    by_k = [settings(TOPK | {"k": k}, 200)["beta1"] for k in (2, 4, 8, 16, 24)]
    assert by_k == [0.6, 0.6, 0.8, 0.9, 0.9]  # 20 steps times the share of the 32 channels
    assert settings(TOPK | {"k": 8}, 2400)["beta1"] == 0.875
    assert "beta1" not in settings(TOPK | {"reads": "h", "writes": "g"}, 200)
    jumprelu = {"architecture": "jumprelu", "hook_point": "h", "d_sae": 32, "name": "sae"}
    assert [settings(jumprelu | {"target_l0": l0}, 200)["beta1"] for l0 in (4.0, 8.0)] == [0.6, 0.8]
    assert "beta1" not in settings(jumprelu | {"l0_coefficient": 1.0}, 200)
    gated = {"architecture": "gated", "hook_point": "h", "d_sae": 32, "name": "sae", "target_l0": 4.0}
    assert settings(gated, 200)["beta1"] == 0.9


def test_decoders_of_saes_learn_faster_than_encoders():
    """Of the architectures of which that was measured; those with an L1 penalty, and transcoders, keep one rate."""
    saes = [
        TOPK,
        TOPK | {"architecture": "batch_topk"},
        {"architecture": "jumprelu", "hook_point": "h", "d_sae": 32, "name": "sae", "target_l0": 4.0},
    ]
    for table in saes:
        assert settings(table, 200)["decoder_lr_scale"] == 1.6
        assert "decoder_lr_scale" not in settings(table | {"decoder_lr_scale": 1.0}, 200)
        assert "decoder_lr_scale" not in settings(table | {"reads": "h", "writes": "g"}, 200)
    of_penalty = {"hook_point": "h", "d_sae": 32, "name": "sae"}
    for kind in ({"architecture": "standard", "target_l0": 4.0}, {"architecture": "jumprelu", "l0_coefficient": 1.0}):
        assert "decoder_lr_scale" not in settings(of_penalty | kind, 200)


@pytest.mark.parametrize(
    ("target", "n_steps", "first"),
    [(2, 320, 4.0), (2, 640, 6.0), (1, 10_000, 8.0), (2, 10_000, 0.4 * 32), (13, 10_000, None)],
)
def test_jumprelu_starts_above_its_target_in_long_runs(target, n_steps, first):
    """At most eight times the target, and .4 times the rows' width."""
    table = {"architecture": "jumprelu", "hook_point": "h", "d_sae": 64, "target_l0": target, "name": "sae"}
    assert settings(table, n_steps).get("initial_l0") == first
    assert "initial_l0" not in settings(table | {"initial_l0": 3.0}, n_steps)
    for other in ({"l0_coefficient": 1.0}, {"initial_threshold": 0.1}):
        assert "initial_l0" not in settings(table | other, n_steps)
    assert "initial_l0" not in settings(table, n_steps, starts_from_sae=True)


def test_what_a_table_gives_is_not_chosen():
    given = {"lr": 1e-3, "decoder_lr_scale": 1.0}
    assert settings(TOPK | given, 200) == {"beta1": 0.6, "beta2": 0.95}
    assert settings(TOPK | given | {"beta1": 0.0, "beta2": 0.5}, 200) == {}
    assert completed(make_config(**TOPK, lr=1e-3), {"lr": 5.0, "beta2": 0.9}).lr == 1e-3


def test_published_settings_are_those_of_the_architecture():
    assert settings(TOPK, 200, "published") == {}
    assert (warmup_for(200, "published").value, warmup_for(200, "auto").value) == (1000, 10)
    assert warmup_for(10**6, "auto").value == 1000


def test_a_chosen_setting_trains_as_the_same_one_given(config, tmp_path):
    given = TOPK | {"lr": 3.2e-3, "beta1": 0.6, "beta2": 0.95, "decoder_lr_scale": 1.6}
    chosen = weights(config)
    assert chosen == weights(change(config, output=str(tmp_path / "given"), sae=[given], warmup_steps=2))
    assert chosen != weights(change(config, output=str(tmp_path / "published"), recipe="published"))
    saved = read_toml(tmp_path / "out/sae/config.toml")
    assert {key: saved["sae"][0][key] for key in ("lr", "beta2")} == {"lr": 3.2e-3, "beta2": 0.95}
    assert (saved["batch_size"], saved["warmup_steps"], saved["rotation"]) == (128, 2, "pca")
    assert Sae.load(tmp_path / "out/sae").config["lr"] == 3.2e-3


def test_a_plan_says_what_was_chosen_and_why(config, capsys):
    train(change(config, dry_run=True, sae=[TOPK, TOPK | {"name": "other", "beta2": 0.9}]))
    out = capsys.readouterr().out
    assert "chosen: warmup_steps = 2 (a twentieth of 40 steps, at most 1,000)" in out
    assert "chosen: lr = 0.0032 (0.008 (700 / 700 steps)^0.575 (128 / 2,048 rows)^(1/3))" in out
    assert "chosen: beta2 = 0.95 of 'sae' (averages squared gradients over 20 steps)" in out


@pytest.mark.parametrize(
    ("tokens", "rows", "batch_size"),
    [(100, 10**6, 256), (491_520, 10**6, 512), (1_966_080, 10**6, 2048), (10**9, 10**6, 4096), (10**7, 3000, 2048)],
)
def test_short_runs_have_smaller_batches(tokens, rows, batch_size):
    """A power of two that leaves 700 steps, and is no larger than the store."""
    assert batch_size_for(tokens, rows, "auto").value == batch_size
    assert batch_size_for(tokens, rows, "published").value == 4096


def test_a_batch_size_is_chosen_and_kept_when_a_run_resumes_and_continues(config, tmp_path, train_killed, capsys):
    chosen, tokens = change(config, batch_size=None, checkpoint_every_tokens=2048), 256 * 40
    train(change(chosen, tokens=tokens, dry_run=True))
    assert "chosen: batch_size = 256 (at most 10,240 tokens / 700 steps, 2,560 rows" in capsys.readouterr().out
    short = change(chosen, tokens=tokens)
    given = change(config, batch_size=256, tokens=tokens, output=str(tmp_path / "given"))
    train_killed(short, 25)
    assert weights(short) == weights(given)
    # Alone, the longer run would have batches of 512.
    tokens = 512 * 700
    longer = {"tokens": tokens, "epochs": 1.0}
    assert batch_size_for(tokens, 2560, "auto").value == 512
    assert weights(change(short, **longer)) == weights(change(given, **longer))


def test_a_run_of_a_release_with_one_batch_size_for_all_keeps_it(config, tmp_path):
    old = change(config, batch_size=4096, tokens=4096 * 4)
    first = weights(old)
    record, _ = load_record(tmp_path / "out")
    assert record is not None
    record.batch_size = None
    save_record(tmp_path / "out", record, None)
    left_open = change(old, batch_size=None)
    assert weights(left_open) == first
    longer = weights(change(left_open, tokens=4096 * 6))
    weights(change(old, output=str(tmp_path / "whole")))
    assert longer == weights(change(old, output=str(tmp_path / "whole"), tokens=4096 * 6))


def test_a_run_resumes_and_continues_with_what_it_began_with(config, tmp_path, train_killed, monkeypatch):
    whole = weights(change(config, output=str(tmp_path / "whole")))
    longer = weights(change(config, output=str(tmp_path / "whole"), tokens=128 * 80))
    short = change(config, checkpoint_every_tokens=128 * 10)
    train_killed(short, 25)
    monkeypatch.setattr("thresher.train.recipes._PEAK_LR", 1.0)  # a release that chooses otherwise
    assert weights(short) == whole
    assert weights(change(short, tokens=128 * 80)) == longer


def test_a_run_of_a_release_without_recipes_keeps_published_settings(config, tmp_path):
    old = change(config, recipe="published", warmup_steps=1000)
    first = weights(old)
    record, _ = load_record(tmp_path / "out")
    assert record is not None
    assert record.config is not None
    record.settings = record.warmup_steps = None
    del record.config["recipe"]
    save_record(tmp_path / "out", record, None)
    assert weights(config) == first  # finished: nothing is left to do
    continued = weights(change(config, tokens=128 * 60))
    whole = change(old, output=str(tmp_path / "whole"))
    weights(whole)
    assert continued == weights(change(whole, tokens=128 * 60))
