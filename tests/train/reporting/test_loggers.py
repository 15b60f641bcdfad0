"""What is logged of each SAE, where, and what a resumed run adds; TensorBoard and W&B skip where not installed."""

import json
import re
import struct
import sys
import warnings
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from thresher.shared import ActivationStoreWriter
from thresher.shared.core.errors import ConfigError
from thresher.train import TrainConfig, train

LOGGED = {"loss", "mse_loss", "explained_variance", "l0", "dead_fraction", "lr", "tokens_per_second"}


@pytest.fixture
def config(tmp_path, sparse_activations):
    with ActivationStoreWriter(tmp_path / "store", {"h": 32}, 16) as writer:
        writer.append({"h": sparse_activations[:1600].view(100, 16, 32)}, held_out=np.arange(100) % 5 == 0)
    return TrainConfig(
        store=str(tmp_path / "store"),
        output=str(tmp_path / "saes"),
        batch_size=64,
        tokens=64 * 12,
        device="cpu",
        checkpoint_every_tokens=64 * 5,
        log_every_steps=2,
        sae=[
            {"hook_point": "h", "d_sae": 48, "k": 3, "name": "a", "lr": 1e-3},
            {"architecture": "standard", "hook_point": "h", "d_sae": 48, "l1_coefficient": 0.3, "name": "b"},
        ],
    )


@pytest.fixture
def kill_and_resume(train_killed):
    def run(config):
        train_killed(config, 8)
        return train(config)

    return run


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_jsonl_has_every_number(config, kill_and_resume):
    a, b = kill_and_resume(config)
    for folder, own in ((a, set()), (b, {"l1_loss"})):
        assert [line["step"] for line in lines(folder)] == [2, 4, 6, 8, 10, 12]
        for line in lines(folder):
            assert set(line) >= LOGGED | own | {"step", "tokens", "data_wait_fraction"}
            assert 0 <= line["data_wait_fraction"] <= 1
    assert not list(a.glob("tensorboard")) + list(a.glob("wandb*"))


def test_without_a_terminal_lines_show_the_progress(config, monkeypatch, capsys):
    monkeypatch.setattr("thresher.shared.core.terminal.progress.SECONDS_BETWEEN_LINES", 0.0)
    train(config)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: ")]
    assert len(told) == 12
    assert told[-1].startswith("train: 768 of 768 tokens (100%), ")
    assert re.search(r"tokens/s, 00:00 left, step 10 of 12, fvu \d\.\d{3} \d\.\d{3}$", told[-1])


def test_tensorboard(config, kill_and_resume):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        a, _ = kill_and_resume(msgspec.structs.replace(config, tensorboard=True))
        events = EventAccumulator(str(a / "tensorboard")).Reload()
    for name in LOGGED - {"tokens_per_second"}:
        points = {event.step: event.value for event in events.Scalars(name)}
        assert points == pytest.approx({line["step"]: line[name] for line in lines(a)}, rel=1e-6), name


def wandb_records(data):
    """Return the records of a `.wandb` file: LevelDB's log of 32 KiB blocks after a header of 7 bytes."""
    at, part = 7, b""
    while at + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield part
            part = b""
        left = -at % (1 << 15)
        at += left if left < 7 else 0


def test_wandb_offline(config, kill_and_resume):
    """A run for each SAE and each start, with the SAE's id; the last line of each is read back from its own file."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    folders = kill_and_resume(msgspec.structs.replace(config, wandb="offline"))
    for folder in folders:
        run_id = (folder / "wandb-id.txt").read_text().strip()
        files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
        assert files
        assert {file.name for file in files} == {f"run-{run_id}.wandb"}
        found = {}
        for file in files:
            for part in wandb_records(file.read_bytes()):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(part)
                if record.history.item:
                    items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                    found[items["_step"]] = items
        for line in lines(folder):
            assert found[line["step"]]["explained_variance"] == pytest.approx(line["explained_variance"])
            assert found[line["step"]]["tokens"] == line["tokens"]


def test_wandb_without_a_key_is_one_line(config, monkeypatch, tmp_path):
    """As its `init` does where nobody is logged in and there is no terminal to ask at."""

    class UsageError(Exception):
        pass

    def init(**_):
        raise UsageError("api_key not configured (no-tty). call wandb login [your_api_key]")

    fake = SimpleNamespace(init=init, Settings=lambda **_: None, errors=SimpleNamespace(Error=UsageError))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(ConfigError, match=r"wandb = 'online' could not start a run: api_key .* `wandb login`"):
        train(msgspec.structs.replace(config, wandb="online"))
    assert not list(tmp_path.glob("saes/*/cfg.json"))


@pytest.mark.parametrize(
    ("changes", "module", "extra"),
    [({"tensorboard": True}, "torch.utils.tensorboard", "tensorboard"), ({"wandb": "offline"}, "wandb", "wandb")],
)
def test_a_logger_that_is_not_installed_is_refused(config, monkeypatch, changes, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"install 'thresher\[{extra}\]'"):
        train(msgspec.structs.replace(config, **changes))
