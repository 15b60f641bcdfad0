"""A run that would not give what its configuration says is refused before any work, or says what it does instead."""

import json
import re
import unicodedata

import msgspec
import numpy as np
import pytest
import torch

from thresher.shared import ActivationStore, ActivationStoreWriter, Sae
from thresher.shared.core.errors import ConfigError, NonFiniteError, OutputError, StoreError
from thresher.train import TrainConfig, train
from thresher.train.architectures import ARCHITECTURES, architectures_using, make_architecture, make_config
from thresher.train.architectures.registry import all_fields
from thresher.train.config import SaeConfig
from thresher.train.plan import plan_run

TOPK = {"hook_point": "h", "d_sae": 32, "k": 4}
STANDARD = {"architecture": "standard", "hook_point": "h", "d_sae": 32, "l1_coefficient": 0.3}
TRANSCODER = {
    "architecture": "transcoder",
    "hook_point": "ok",
    "hook_point_out": "h",
    "d_sae": 32,
    "l1_coefficient": 1.0,
}
GIVEN = {
    "k": 4,
    "l1_coefficient": 0.5,
    "l0_coefficient": 0.5,
    "target_l0": 4.0,
    "initial_l0": 4.0,
    "sparsity_loss": "l0",
    "tanh_scale": 3.0,
    "pre_act_coefficient": 0.0,
    "bandwidth": 0.1,
    "initial_threshold": 0.1,
    "threshold_lr_scale": 2.0,
    "decoder_lr_scale": 2.0,
    "prefix_sizes": (8, 32),
    "refine_rate": 0.5,
    "sparsity_warmup_steps": 0,
    "aux_coefficient": 0.0,
    "k_aux": 3,
    "hook_point_out": "g",
    "k_anneal_steps": 5,
    "multi_topk_coefficient": 0.125,
    "p_final": 0.5,
    "p_anneal_steps": 5,
    "unit_norm_decoder": False,
    "select_over": "layer",
}
"""A value for each key that some architectures do not use."""

PLACES = {
    "transcoder": {"hook_point_out": "g"},
    "skip_transcoder": {"hook_point_out": "g"},
    "crosscoder": {"hook_points": ("h", "g")},
}
"""Keys that say what is read and written, where an architecture's name asks for them."""

USED = {
    "topk": {
        *("k", "aux_coefficient", "k_aux", "k_anneal_steps", "multi_topk_coefficient"),
        *("unit_norm_decoder", "select_over"),
    },
    "batch_topk": {"k", "aux_coefficient", "k_aux", "unit_norm_decoder", "select_over"},
    "matryoshka_batch_topk": {"k", "aux_coefficient", "k_aux", "unit_norm_decoder", "prefix_sizes"},
    "hierarchical_topk": {"k", "aux_coefficient", "k_aux", "unit_norm_decoder"},
    "random": {"k"},
    "lista_matryoshka": {"k", "aux_coefficient", "k_aux", "unit_norm_decoder", "prefix_sizes", "refine_rate"},
    "matching_pursuit": {"k"},
    "standard": {"l1_coefficient", "target_l0", "sparsity_warmup_steps", "p_final", "p_anneal_steps"},
    "gated": {
        *("l1_coefficient", "target_l0", "sparsity_warmup_steps", "unit_norm_decoder"),
        *("initial_l0", "threshold_lr_scale"),
    },
    "jumprelu": {
        *("l0_coefficient", "target_l0", "initial_l0", "sparsity_loss", "tanh_scale", "pre_act_coefficient"),
        *("bandwidth", "initial_threshold", "threshold_lr_scale", "sparsity_warmup_steps", "unit_norm_decoder"),
    },
    "transcoder": {"l1_coefficient", "target_l0", "hook_point_out", "sparsity_warmup_steps"},
    "skip_transcoder": {"l1_coefficient", "target_l0", "hook_point_out", "sparsity_warmup_steps"},
    "crosscoder": {"l1_coefficient", "target_l0", "sparsity_warmup_steps"},
}
"""What the pages of the architectures name, key by key."""
for _name in USED.keys() - {"random"}:
    USED[_name].add("decoder_lr_scale")


@pytest.fixture(scope="module")
def store(tmp_path_factory, sparse_activations):
    path = tmp_path_factory.mktemp("store") / "store"
    with ActivationStoreWriter(path, {"h": 32}, 16) as writer:
        writer.append({"h": sparse_activations[:3200].view(200, 16, 32)}, held_out=np.arange(200) % 5 == 0)
    return path


@pytest.fixture
def config(store, tmp_path):
    return TrainConfig(
        store=str(store), output=str(tmp_path / "out"), batch_size=64, tokens=64 * 20, warmup_steps=0, sae=[TOPK]
    )


def change(config, **changes):
    return msgspec.structs.replace(config, **changes)


def test_every_key_is_used_by_all_architectures_or_named_here():
    shared = set(SaeConfig.__struct_fields__) - set(SaeConfig.unused)
    assert set(all_fields()) == shared | set(GIVEN)
    assert set(USED) == set(ARCHITECTURES)


@pytest.mark.parametrize("architecture", sorted(USED))
def test_options_that_an_architecture_does_not_use_are_refused(architecture):
    needed = (
        *ARCHITECTURES[architecture].required,
        getattr(ARCHITECTURES[architecture].config, "coefficient_key", None),
    )
    required = {key: GIVEN[key] for key in needed if key is not None}
    base = {"architecture": architecture, "hook_point": "h", "d_sae": 32} | required | PLACES.get(architecture, {})
    make_architecture(make_config(**base), 16)
    for key, value in GIVEN.items():
        assert (architecture in architectures_using(key)) == (key in USED[architecture]), key
        if key not in USED[architecture]:
            users = ", ".join(name for name in ARCHITECTURES if key in USED[name])
            said = f"'{key}' is given, but architecture '{architecture}' does not use it (used by: {users})"
            with pytest.raises(ConfigError, match=re.escape(said)):
                make_architecture(make_config(**(base | {key: value})), 16)


def test_the_auxiliary_loss_is_on_unless_it_is_given_as_zero(config):
    for given, weight in ((None, 1 / 32), (0.0, 0.0), (0.5, 0.5)):
        assert make_architecture(make_config(**TOPK, aux_coefficient=given), 32).aux_coefficient == weight
    (folder,) = train(config)
    assert json.loads((folder / "cfg.json").read_text())["metadata"].get("aux_coefficient", 1 / 32) == 1 / 32


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TOPK | {"k_anneal_steps": 21}, "k_anneal_steps is 21, but the run has 20 steps, so k would not reach 4"),
        (STANDARD | {"p_final": 0.5, "p_anneal_steps": 21}, "p_anneal_steps is 21, .* would not reach 0.5"),
        (STANDARD | {"sparsity_warmup_steps": 21}, "sparsity_warmup_steps is 21, but the run has 20 steps"),
        (TOPK | {"resample_every_tokens": 641}, "resample_every_tokens is 641, .* which has 640 tokens"),
        (
            STANDARD | {"architecture": "crosscoder", "hook_point": "g", "hook_points": ["h", "g"]},
            "hook_point is 'g', but the first of hook_points is 'h'",
        ),
    ],
)
def test_schedules_that_the_run_ends_before_are_refused(config, tmp_path, table, message):
    with pytest.raises(ConfigError, match=message):
        train(change(config, sae=[table]))
    assert list(tmp_path.iterdir()) == []


def test_schedules_as_long_as_the_run_reach_their_end(config, store, capsys):
    """The last step's metrics are of the k that is saved, and those before say which k they are of."""
    sae = TOPK | {"k_anneal_steps": 20, "resample_every_tokens": 640}
    (folder,) = train(change(config, tokens=64 * 21, sae=[sae]))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [lines[0]["k"], lines[-1]["k"]] == [32, 4]
    assert lines[0]["l0"] > 10
    assert Sae.load(folder).config["k"] == 4
    x = ActivationStore.open(store).read("h", 0, 3200).float()
    explained = 1 - (Sae.load(folder)(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert lines[-1]["explained_variance"] == pytest.approx(float(explained), abs=0.1)
    assert "the metrics of 'topk-h-32-k4' are of the annealed k" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"warmup_steps": 17}, "warmup_steps is 17, but 16 of the run's 20 steps come before the learning rate falls"),
        ({"warmup_steps": 21, "decay_fraction": 1.0}, "it does not reach its peak"),
        ({"sae": [TOPK | {"dead_after_tokens": 1280}]}, "dead_after_tokens of 'topk-h-32-k4' is not less than"),
        ({"batch_size": 4096}, "the store has 2,560 training rows, fewer than a batch of 4,096"),
    ],
)
def test_what_a_run_does_otherwise_is_noted(config, capsys, changes, note):
    assert train(change(config, dry_run=True, **changes)) == []
    assert f"note: {note}" in (said := capsys.readouterr().out) or note in said
    train(change(config, dry_run=True))
    assert "note:" not in capsys.readouterr().out


@pytest.mark.parametrize("name", [".", "..", ".hidden", "config.toml", "checkpoint.json", "Config.TOML"])
def test_names_that_are_no_folders_of_the_output_are_refused(config, tmp_path, name):
    with pytest.raises(ConfigError, match=re.escape(f"an SAE is named '{name}'")):
        train(change(config, output=str(tmp_path / "runs/out"), sae=[TOPK | {"name": name}]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x" * 300], "has 300 bytes, expected at most 200"),
        (["ü" * 101], "has 202 bytes, expected at most 200"),
        (["a", "A"], "'a' and 'A' would share a folder"),
        ([unicodedata.normalize("NFC", "각"), unicodedata.normalize("NFD", "각")], "would share a folder"),
        (["a/b", "a_b"], "two SAEs are named 'a_b'"),
    ],
)
def test_names_that_file_systems_confuse_are_refused(config, names, message):
    with pytest.raises(ConfigError, match=message):
        train(change(config, sae=[TOPK | {"name": name} for name in names]))


def write(path, rows, **options):
    """Write rows of shape (contexts, positions, width), every fifth context held out."""
    first = next(iter(rows.values()))
    widths = {hook: x.shape[-1] for hook, x in rows.items()}
    with ActivationStoreWriter(path, widths, first.shape[1], dtype="float32", codec="none") as writer:
        writer.append(rows, held_out=np.arange(len(first)) % 5 == 0)
    return str(path)


@pytest.mark.parametrize(
    "x",
    [torch.zeros(16, 16, 16), torch.full((16, 16, 16), 0.1), 1e4 + 1e-5 * torch.randn(16, 16, 16).double()],
    ids=["zero", "constant", "rounding"],
)
@pytest.mark.parametrize("sae", [TOPK, TRANSCODER])
def test_activations_that_do_not_vary_are_refused_by_name(config, tmp_path, x, sae):
    good = torch.randn(16, 16, 16)
    store = write(tmp_path / "constant", {"ok": good, "h": x.float()})
    with pytest.raises(StoreError, match=r"the activations at 'h' .* do not vary: all 192 training rows are equal"):
        train(change(config, store=store, sae=[TOPK | {"hook_point": "ok"}, sae]))
    assert not (tmp_path / "out").exists()
    assert train(change(config, store=store, sae=[TOPK | {"hook_point": "ok"}]))


def test_a_single_training_row_is_refused_and_a_constant_channel_is_not(config, tmp_path):
    store = write(tmp_path / "one", {"h": torch.randn(2, 1, 16)})
    with pytest.raises(StoreError, match=r"at 'h' .* have one training row"):
        train(change(config, store=store))
    x = torch.randn(32, 16, 16)
    x[..., 3] = 7.0
    (folder,) = train(change(config, store=write(tmp_path / "channel", {"h": x})))
    assert torch.isfinite(Sae.load(folder)(x)).all()


def test_moments_that_are_not_finite_are_refused(config, store, monkeypatch):
    opened = ActivationStore.open(store)
    moments = opened.moments("h")
    mean = np.where(np.arange(32) == 5, np.nan, moments.mean)
    monkeypatch.setattr(ActivationStore, "moments", lambda *_: type(moments)(moments.count, mean, moments.M2, 1.0))
    with pytest.raises(NonFiniteError, match=r"at 'h' .* NaN or infinite"):
        plan_run(config, opened, 1000)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_whose_norms_overflow_are_refused(config, tmp_path, dtype):
    with ActivationStoreWriter(tmp_path / "huge", {"h": 32}, 16, dtype=dtype) as writer:
        writer.append({"h": 1e25 * torch.randn(8, 16, 32)})
    with pytest.raises(NonFiniteError, match="norms overflow float32"):
        train(change(config, store=str(tmp_path / "huge")))


@pytest.mark.parametrize(
    "table",
    [
        {"architecture": "jumprelu", "l0_coefficient": 1.0, "target_l0": 33.0},
        {"architecture": "jumprelu", "l0_coefficient": 1.0, "initial_l0": 32.5},
        {"architecture": "gated", "l1_coefficient": 1.0, "initial_l0": 33.0},
    ],
)
def test_more_active_latents_than_there_are_is_refused(config, table):
    with pytest.raises(ConfigError, match=r"_l0 is 3.*, expected at most d_sae = 32"):
        train(change(config, sae=[{"hook_point": "h", "d_sae": 32} | table]))


def test_seeds_that_no_generator_takes_are_refused(config):
    with pytest.raises(
        ConfigError, match=rf"sae\[0\]: seed: expected an integer of at least 0 and of at most {2**63 - 1}"
    ):
        train(change(config, sae=[TOPK | {"seed": 2**64}]))
    with pytest.raises(ConfigError, match="seed: expected"):
        change(config, seed=2**63)


def test_an_output_that_is_not_a_separate_folder_is_refused(config, store, tmp_path):
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file/below/it", store, store / "saes", "s3://bucket/saes"):
        for dry_run in (True, False):
            with pytest.raises((ConfigError, OutputError), match=r"/file' is a file|is in the store|got the URL"):
                train(change(config, output=str(output), dry_run=dry_run))
    assert (tmp_path / "file").read_text() == "x"
    assert not (store / "config.toml").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"freeze": ("W_decoder",)}, "freeze names 'W_decoder', expected some of: W_enc, b_enc, W_dec, b_dec"),
        ({"freeze": ("W_enc", "b_enc", "W_dec", "b_dec")}, "freeze names every parameter"),
        ({"freeze": ("W_dec",), "resample_every_tokens": 64}, "would change W_dec, which is frozen"),
        ({"architecture": "random", "resample_every_tokens": 64}, "would change W_dec, which is frozen"),
    ],
)
def test_what_cannot_be_frozen_is_refused(config, keys, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        train(change(config, sae=[TOPK | keys]))


@pytest.mark.parametrize(("keys", "frozen"), [({"freeze": ["W_dec"]}, {"W_dec"}), ({"architecture": "random"}, None)])
def test_frozen_directions_are_the_initial_ones_and_the_rest_is_trained(config, keys, frozen):
    table = TOPK | {"name": "sae", "seed": 3} | keys
    (folder,) = train(change(config, sae=[table]))
    sae, architecture = Sae.load(folder), make_architecture(make_config(**table), 32)
    initial = architecture.initial_parameters(torch.Generator().manual_seed(3))
    frozen = frozen or {"W_enc", "W_dec"}
    assert sae.config["freeze"] == sorted(frozen)
    torch.testing.assert_close(sae.W_dec.detach(), initial["W_dec"], rtol=0, atol=1e-6)
    assert torch.allclose(sae.W_enc, initial["W_enc"].T, rtol=0, atol=1e-6) == ("W_enc" in frozen)
    assert sae.b_enc.abs().max() > 0
