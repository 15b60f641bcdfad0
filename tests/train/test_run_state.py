"""What a run leaves on disk: whose store it is on, what damage does, one process at a time, and going further."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

import thresher.train.checkpoints.checkpoint as checkpoint_module
import thresher.train.checkpoints.normalizations as normalizations_module
from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.core.cli import main
from thresher.shared.core.config import read_toml, to_toml
from thresher.shared.core.errors import ConfigError, DiskSpaceError, OutputBusyError, OutputError
from thresher.train import ShuffledBatches, TrainConfig, train
from thresher.train.kernels import kernels_for
from thresher.train.lockstep import prepare_batches
from thresher.train.reporting.metrics import MetricsLog
from thresher.train.step.sae_trainer import SaeTrainer, Schedule
from thresher.train.step.schedule import lr_factor
from thresher.train.stream.normalization import RowScale, normalization_of, row_scale, scale_of_raw_norm
from thresher.train.sweep.grids import expand_sweep

BATCH = 64
TOPK = {"name": "a", "hook_point": "h", "d_sae": 48, "k": 4, "lr": 3e-3, "ema_decay": 0.9}
TANH = {"name": "b", "architecture": "jumprelu", "sparsity_loss": "tanh", "hook_point": "h", "d_sae": 40} | {
    "l0_coefficient": 0.1,
    "lr": 1e-3,
}
BAD = TOPK | {"name": "bad", "lr": 1e18}


def write_store(path, x):
    with ActivationStoreWriter(path, {"h": 32}, 16, dtype="float32", codec="none") as writer:
        writer.append({"h": x}, held_out=np.arange(len(x)) % 5 == 0)
    return path


@pytest.fixture(scope="module")
def rows(sparse_activations):
    return sparse_activations[: 200 * 16].view(200, 16, 32).float()


@pytest.fixture(scope="module")
def store(tmp_path_factory, rows):
    return write_store(tmp_path_factory.mktemp("store") / "store", rows)


@pytest.fixture
def config(store, tmp_path):
    return TrainConfig(
        store=str(store),
        output=str(tmp_path / "out"),
        batch_size=BATCH,
        tokens=BATCH * 30,
        warmup_steps=5,
        checkpoint_every_tokens=BATCH * 8,
        window_bytes=1 << 16,
        device="cpu",
        sae=[TOPK, TANH],
    )


def change(config, **changes):
    return msgspec.structs.replace(config, **changes)


def weights(folders):
    return [(folder / "sae_weights.safetensors").read_bytes() for folder in folders]


def lines(folder):
    timing = ("tokens_per_second", "data_wait_fraction")
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timing} for line in read]


@pytest.fixture
def whole(config, tmp_path):
    """Train without a break, elsewhere."""
    return train(change(config, output=str(tmp_path / "whole")))


# --- the store


def test_a_run_resumes_on_its_store_wherever_that_lies(config, whole, tmp_path, store, train_killed):
    train_killed(config, 20)
    shutil.copytree(store, tmp_path / "moved")
    moved = change(config, store=str(tmp_path / "moved"))
    assert weights(train(moved)) == weights(whole)
    assert read_toml(tmp_path / "out/config.toml")["store"] == str(tmp_path / "moved")
    assert read_toml(tmp_path / "out/a/config.toml")["store"] == str(tmp_path / "moved")


@pytest.mark.parametrize("finished", [False, True])
def test_another_store_is_refused_and_nothing_changed(config, tmp_path, rows, train_killed, finished):
    """As many rows of as many channels, one value different."""
    if finished:
        train(config)
    else:
        train_killed(config, 20)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    other = rows.clone()
    other[7, 3, 5] += 1.0
    there = change(config, store=str(write_store(tmp_path / "other", other)))
    with pytest.raises(ConfigError, match=r"holds 200 contexts .* began on 200 of other content .* give the store of"):
        train(there)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_a_store_that_was_extended_is_refused_as_such(config, tmp_path, rows, train_killed):
    """The order of rows is another one, although the first shards are the same."""

    def write(path, n):
        widths, kind = {"h": 32}, {"dtype": "float32", "codec": "none"}
        with ActivationStoreWriter(path, widths, 16, chunk_bytes=8192, shard_bytes=64 * 16 * 128, **kind) as writer:
            writer.append({"h": rows[:n]}, held_out=np.arange(n) % 5 == 0)
        return str(path)

    short = change(config, store=write(tmp_path / "short", 128))
    train_killed(short, 20)
    with pytest.raises(ConfigError, match=r"holds 192 contexts, but .* began on 128: it was extended since"):
        train(change(short, store=write(tmp_path / "long", 192)))


def test_a_run_of_an_older_release_is_resumed_with_its_own_scale(config, tmp_path, monkeypatch, train_killed, capsys):
    """That its store is not recorded is noted; inputs stay scaled by the mean norm of rows that are not centred."""
    published = change(config, recipe="published")
    with monkeypatch.context() as patch:
        patch.setattr(normalizations_module, "row_scale", lambda *given: RowScale(factor=scale_of_raw_norm(*given[:3])))
        expected = train(change(published, output=str(tmp_path / "whole")))
        train_killed(published, 20)
    path = tmp_path / "out/checkpoint.json"
    record = json.loads(path.read_text())
    old = {key: record[key] for key in ("step", "finished", "n_steps", "rows_per_epoch")}
    old |= {key: record["checkpoints"][0][key] for key in ("stream", "diverged")}
    path.write_text(json.dumps(old))
    table = read_toml(tmp_path / "out/config.toml")
    table["sae"] = [sae | {"aux_coefficient": 1 / 32, "k": 4} for sae in table["sae"]]
    config_path = tmp_path / "out/config.toml"
    config_path.write_text(msgspec.toml.encode(table).decode())
    assert weights(train(config)) == weights(expected)
    assert "did not record which store it trained on" in capsys.readouterr().err
    assert read_toml(config_path)["sae"][1].get("aux_coefficient") is None


def test_other_defaults_of_another_release_are_refused(config, monkeypatch, train_killed):
    config = change(config, recipe="published")
    train_killed(change(config, sae=[TOPK | {"lr": None}, TANH]), 20)
    monkeypatch.setattr("thresher.train.architectures.topk.TopK.default_lr", 1e-4)
    with pytest.raises(ConfigError, match=r"begun by a release that trains differently; differing: sae 'a'\.lr"):
        train(change(config, sae=[TOPK | {"lr": None}, TANH]))


# --- damage


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 64
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "flipped in a tensor": lambda path: flip(path, -3000),
    "flipped in the header": lambda path: flip(path, 60),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    config, whole, tmp_path, train_killed, damage, name, capsys
):
    train_killed(config, 27)
    path = tmp_path / "out" / name / "checkpoints" / "step-000000024.safetensors"
    DAMAGE[damage](path)
    assert weights(resumed := train(config)) == weights(whole)
    assert [lines(folder) for folder in resumed] == [lines(folder) for folder in whole]
    said = capsys.readouterr().err
    assert f"warning: the checkpoint '{path}' " in said
    assert "resuming from the checkpoint before it, at step 16" in said


def test_where_no_checkpoint_is_whole_the_run_starts_over(config, whole, tmp_path, train_killed, capsys):
    train_killed(config, 27)
    for path in (tmp_path / "out").glob("b/checkpoints/*"):
        flip(path, -100)
    assert weights(train(config)) == weights(whole)
    assert "resuming from the start of the run" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe", b'{"step": 8}', None])
def test_a_damaged_record_is_named_and_the_one_before_it_used(config, whole, tmp_path, train_killed, damage, capsys):
    train_killed(config, 27)
    path = tmp_path / "out/checkpoint.json"
    content = path.read_bytes()
    # A flipped digit leaves valid JSON, with another step.
    path.write_bytes(content.replace(b'"step": 24', b'"step": 25') if damage is None else damage)
    assert weights(train(config)) == weights(whole)
    assert f"'{path}' is damaged" in capsys.readouterr().err


def test_records_that_are_all_damaged_are_one_error(config, tmp_path, train_killed):
    train_killed(config, 27)
    for name in ("checkpoint.json", "checkpoint.previous.json"):
        (tmp_path / "out" / name).write_text("{")
    with pytest.raises(ConfigError, match=r"checkpoint\.json' is damaged; remove"):
        train(config)


def test_damaged_lines_of_metrics_are_left_out(config, whole, tmp_path, train_killed):
    train_killed(config, 27)
    path = tmp_path / "out/a/metrics.jsonl"
    content = path.read_bytes().splitlines(keepends=True)
    content[3] = b"\x00\xff not json\n"
    path.write_bytes(b"".join(content) + b'{"step": 26, "tok')
    train(config)
    expected = lines(whole[0])
    assert lines(tmp_path / "out/a") == expected[:3] + expected[4:]


def test_a_checkpoint_that_cannot_be_read_back_is_an_error_and_the_one_before_it_stays(config, tmp_path, monkeypatch):
    save_file, calls = checkpoint_module.save_file, []

    def bad_disk(tensors, path):
        save_file(tensors, path)
        calls.append(path)
        if len(calls) == 4:
            flip(path, -64)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_file", bad_disk)
        with pytest.raises(
            OutputError, match=r"step-000000016.* does not have its checksum right after it was written"
        ):
            train(change(config, keep_checkpoints=1))
    assert json.loads((tmp_path / "out/checkpoint.json").read_text())["checkpoints"][0]["step"] == 8
    assert sorted(path.name for path in (tmp_path / "out").glob("b/checkpoints/step*")) == [
        "step-000000008.safetensors"
    ]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("where", ["checkpoint", "rename"])
def test_a_disk_that_refuses_is_one_line_and_the_run_resumes(config, whole, monkeypatch, number, where):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        target = {
            "checkpoint": (checkpoint_module, "save_file"),
            "rename": ("thresher.shared.core.disk.os.replace",),
        }[where]
        patch.setattr(*target, refuse)
        error, said = {errno.ENOSPC: (DiskSpaceError, "is full"), errno.EROFS: (OutputError, "cannot write")}[number]
        with pytest.raises(error, match=said):
            train(config)
    assert weights(train(config)) == weights(whole)


def test_metrics_on_a_full_disk_are_one_line(tmp_path):
    log = MetricsLog(tmp_path)
    log._file.close()
    log._file = Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115
    log.write(1, 64, {"loss": 0.5})
    with pytest.raises(DiskSpaceError, match=r"cannot write '.*metrics\.jsonl'"):
        log.flush()
    with pytest.raises(DiskSpaceError):
        log.close()


# --- one process at a time


def test_an_output_has_one_process_and_a_killed_one_lets_it_go(config, tmp_path, whole):
    script = (
        "import sys, time; from pathlib import Path; from thresher.train.checkpoints.output import locked;"
        "from thresher.train.parallel.ranks import TrainRanks\n"
        "with locked(Path(sys.argv[1]), TrainRanks()): print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, config.output], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "locked\n"
            with pytest.raises(OutputBusyError, match=rf"another process \({other.pid} on .*\) is training into"):
                train(config)
            path = tmp_path / "c.toml"
            path.write_text(to_toml(change(config, sae=expand_sweep(config.sae))))
            assert main(["train", str(path)]) == 2
        finally:
            other.send_signal(signal.SIGKILL)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    assert weights(train(config)) == weights(whole)


# --- a finished run is trained on


LONGER = BATCH * 70


def test_a_finished_run_is_trained_on_from_its_last_state(config, store, tmp_path, capsys):
    """Weights are those of a plain loop whose learning rate is first a short run's, then that of the longer one."""
    table = TOPK | {"dead_after_tokens": BATCH * 6, "beta1": 0.9, "beta2": 0.9, "decoder_lr_scale": 1.6}
    config = change(config, rotation="none")
    train(change(config, sae=[table]))
    (folder,) = train(change(config, sae=[table], tokens=LONGER))
    assert "continuing from step 30 (1,920 tokens) to step 70 (4,480 tokens)" in capsys.readouterr().err
    factors = [lr_factor(step, 30 if step < 30 else 70, 5, 0.2) for step in range(70)]
    assert [line["lr"] for line in lines(folder)] == [3e-3 * factor for factor in factors]
    assert factors[29] < 0.2
    assert factors[30] == 1.0
    assert [line["step"] for line in lines(folder)] == list(range(1, 71))
    opened = ActivationStore.open(store)
    (sae,) = expand_sweep([table])
    normalization = normalization_of(opened, "h", row_scale(opened, "h", "expected_average_only_in", 10.0))
    trainer = SaeTrainer(
        config=sae,
        d_in=32,
        normalization=normalization,
        schedule=Schedule(30, BATCH, 5, 0.2),
        kernels=kernels_for("cpu"),
    )
    with ShuffledBatches(opened, ["h"], BATCH, window_bytes=1 << 16) as batches:
        for step in range(70):
            trainer.schedule = Schedule(30 if step < 30 else 70, BATCH, 5, 0.2)
            (batch,) = prepare_batches(next(batches), [trainer]).values()
            trainer.step(batch)
    expected = trainer.to_sae({}).save(tmp_path / "expected")
    assert weights([folder]) == weights([expected])
    assert read_toml(tmp_path / "out/config.toml")["tokens"] == LONGER


def test_schedules_are_not_restarted_when_a_run_continues(config):
    """The tanh recipe's penalty grows over the whole of the first run, and then stays."""
    train(config)
    folder = train(change(config, tokens=LONGER))[1]
    penalties = [line["sparsity_loss"] for line in lines(folder)]
    assert penalties[30] > 0.8 * penalties[29] > 10 * penalties[0]


@pytest.mark.parametrize("at_step", [3, 15, 39])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_that_is_trained_on_can_be_killed_and_damaged(config, tmp_path, train_killed, at_step, damaged):
    longer = change(config, tokens=LONGER)
    train(change(config, output=str(tmp_path / "whole")))
    expected = train(change(longer, output=str(tmp_path / "whole")))
    train(config)
    train_killed(longer, at_step)
    if damaged:
        flip(max((tmp_path / "out/a/checkpoints").glob("step-*")), -50)
    with pytest.raises(ConfigError, match="n_steps"):
        train(config)
    resumed = train(longer)
    assert weights(resumed) == weights(expected)
    assert [lines(folder) for folder in resumed] == [lines(folder) for folder in expected]
    assert [sorted(path.name for path in (tmp_path / "out").glob("a/checkpoints/*"))[-1]] == [
        "step-000000070.safetensors"
    ]


def test_a_finished_run_is_not_trained_back_or_otherwise(config):
    train(config)
    with pytest.raises(ConfigError, match=r"n_steps \(20, the run has 30\)"):
        train(change(config, tokens=BATCH * 20))
    with pytest.raises(ConfigError, match="differing: seed"):
        train(change(config, tokens=LONGER, seed=1))


def test_an_sae_that_was_removed_is_written_again_from_the_final_state(config, whole, tmp_path):
    folders = train(config)
    shutil.rmtree(folders[0].with_name("b") / "checkpoints")
    assert weights(train(config)) == weights(whole)
    for names in (("cfg.json", "sae_weights.safetensors"), ("sae_weights.safetensors",)):
        for name in names:
            (folders[0] / name).unlink()
        assert weights(train(config)) == weights(whole)


# --- what diverged


def test_a_diverged_sae_is_reported_and_can_be_trained_again_alone(config, whole, tmp_path, capsys, monkeypatch):
    mixed = change(config, sae=[TOPK, BAD, TANH])
    folders = train(mixed)
    assert weights(folders) == weights(whole)
    assert list(folders.diverged) == ["bad"]
    assert "warning: 1 of 3 SAEs diverged" in capsys.readouterr().err
    path = tmp_path / "c.toml"
    path.write_text(to_toml(change(mixed, sae=expand_sweep(mixed.sae))))
    stamps = [(folder / "sae_weights.safetensors").stat().st_mtime_ns for folder in folders]
    assert main(["train", str(path)]) == 3
    said = capsys.readouterr()
    assert "this run is finished" in said.err
    assert "'bad' with loss" in said.err
    good = change(config, sae=[TOPK, BAD | {"lr": 1e-3}, TANH])
    expected = train(change(good, output=str(tmp_path / "good")))
    again = train(good)
    assert again.diverged == {}
    assert [folder.name for folder in again] == ["a", "bad", "b"]
    assert weights(again) == weights(expected)
    assert lines(again[1]) == lines(expected[1])
    assert [(folder / "sae_weights.safetensors").stat().st_mtime_ns for folder in folders] == stamps
    assert not (tmp_path / "out/bad/diverged.json").exists()
    longer = {"tokens": LONGER}
    assert weights(train(change(good, **longer))) == weights(
        train(change(good, output=str(tmp_path / "good"), **longer))
    )


@pytest.mark.parametrize("at_step", [2, 20])
def test_a_new_try_can_be_killed(config, whole, tmp_path, train_killed, at_step):
    train(change(config, sae=[TOPK, BAD]))
    good = change(config, sae=[TOPK, TANH])  # in place of what diverged
    train_killed(good, at_step)
    with pytest.raises(ConfigError, match="'bad'"):
        train(change(config, sae=[TOPK, BAD]))
    assert weights(train(good)) == weights(whole)
    assert not (tmp_path / "out/bad/diverged.json").exists()


def test_a_new_try_that_diverges_leaves_the_others(config, tmp_path):
    train(change(config, sae=[TOPK, BAD]))
    again = train(change(config, sae=[TOPK, BAD | {"lr": 1e17}]))
    assert ([folder.name for folder in again], list(again.diverged)) == (["a"], ["bad"])
    longer = train(change(config, sae=[TOPK, BAD | {"lr": 1e17}], tokens=LONGER))
    assert ([folder.name for folder in longer], list(longer.diverged)) == (["a"], ["bad"])
    assert lines(longer[0])[-1]["step"] == 70


def test_what_diverged_before_the_first_checkpoint_leaves_no_note(config, whole, tmp_path, train_killed):
    train_killed(change(config, sae=[TOPK | {"lr": 1e18}, TANH]), 5)
    assert (tmp_path / "out/a/diverged.json").exists()
    assert weights(train(config)) == weights(whole)
    assert not (tmp_path / "out/a/diverged.json").exists()


def test_where_all_diverged_the_run_fails_and_can_be_tried_again(config, whole, capsys):
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"all SAEs diverged, 'bad' with .* run again"):
            train(change(config, sae=[TOPK | {"lr": 1e18}, BAD]))
    assert "its SAEs are in" not in capsys.readouterr().err
    assert weights(train(change(config, sae=[TOPK]))) == weights(whole)[:1]


def test_metrics_that_are_a_folder_are_one_line(config, tmp_path, train_killed):
    train_killed(config, 25)
    path = tmp_path / "out/a/metrics.jsonl"
    path.unlink()
    path.mkdir()
    with pytest.raises(OutputError, match=f"cannot write '{path}'"):
        train(config)


@pytest.mark.parametrize(
    "saes", [[TOPK, TANH, BAD | {"lr": 1e-3}], [TOPK | {"lr": 1e-3}, BAD], [TOPK, BAD, BAD | {"name": "more"}], [BAD]]
)
def test_nothing_but_what_diverged_is_tried_again(config, saes):
    train(change(config, sae=[TOPK, BAD]))
    with pytest.raises(ConfigError, match="holds a run of another configuration"):
        train(change(config, sae=saes))


def test_checksums_are_of_shapes_too():
    state = {"x": torch.arange(6.0).view(2, 3).T, "n": torch.tensor(3), "none": torch.empty(0, 4)}
    plain = {key: tensor.contiguous() for key, tensor in sorted(state.items())}
    assert checkpoint_module._checksum(plain.items()) != checkpoint_module._checksum(
        {**plain, "x": plain["x"].view(2, 3)}.items()
    )
