"""A sweep trains, resumes and refuses, on a real store."""

import json
import random
import shutil
import signal
import subprocess
import sys

import msgspec
import numpy as np
import pytest
import torch

import thresher.train.plan as plan_module
import thresher.train.run as run_module
from thresher.shared import ActivationStore, ActivationStoreWriter, Sae
from thresher.shared.core.cli import main
from thresher.shared.core.config import to_toml
from thresher.shared.core.errors import ConfigError, HookPointError, MissingFileError, StoreError
from thresher.train import TrainConfig, train
from thresher.train.architectures.topk import TopK
from thresher.train.parallel.ranks import TrainRanks
from thresher.train.plan import plan_run
from thresher.train.sweep.grids import expand_sweep

TOPK = {"architecture": "topk", "hook_point": "blocks.0.resid_post", "d_sae": 96, "lr": 3e-3}
STANDARD = {
    "architecture": "standard",
    "hook_point": "blocks.0.mlp_out",
    "d_sae": 64,
    "l1_coefficient": 0.3,
    "lr": 3e-3,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory, sparse_activations):
    """Write the activations, and three times them at a second hook point; every fifth context is held out."""
    path = tmp_path_factory.mktemp("store") / "store"
    x = sparse_activations[: 372 * 16].view(372, 16, 32)
    tokens = torch.randint(0, 50, (372, 16), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    hooks = {"blocks.0.resid_post": 32, "blocks.0.mlp_out": 32}
    with ActivationStoreWriter(path, hooks, 16, mask_token_ids=[0], metadata={"model": "tiny"}) as writer:
        held_out = np.arange(372) % 5 == 0
        writer.append({"blocks.0.resid_post": x, "blocks.0.mlp_out": 3 * x}, tokens, held_out=held_out)
    return path


@pytest.fixture
def config(store, tmp_path):
    return TrainConfig(
        store=str(store),
        output=str(tmp_path / "saes"),
        batch_size=128,
        tokens=128 * 40,
        warmup_steps=5,
        checkpoint_every_tokens=128 * 10,
        window_bytes=1 << 18,
        sae=[{**TOPK, "k": [4, 8]}, STANDARD],
    )


def change(config, **changes):
    return msgspec.structs.replace(config, **changes)


def weights(folder):
    return (folder / "sae_weights.safetensors").read_bytes()


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "data_wait_fraction")} for line in lines]


def test_a_sweep_trains_each_sae_to_its_hook_point(config, store):
    folders = train(change(config, tokens=128 * 200))
    x = ActivationStore.open(store).read("blocks.0.resid_post", 0, 16).float()
    names = ["topk-blocks.0.resid_post-96-k4", "topk-blocks.0.resid_post-96-k8", "standard-blocks.0.mlp_out-64-l1-0.3"]
    assert [folder.name for folder in folders] == names
    for folder in folders:
        sae = Sae.load(folder)
        held_out = x * 3 if sae.hook_point == "blocks.0.mlp_out" else x
        error = (sae(held_out) - held_out).square().sum()
        assert error < 0.3 * (held_out - held_out.mean(0)).square().sum()
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae), rtol=1e-5, atol=1e-5)
        lines = metrics(folder)
        assert [line["step"] for line in lines] == list(range(1, 201))
        assert lines[-1]["tokens"] == 128 * 200
        assert lines[-1]["explained_variance"] > 0.7
        assert 0 < lines[-1]["l0"] < 30
        assert (folder / "config.toml").exists()
    assert sae.metadata["model_name"] == "tiny"


def test_an_sae_in_a_sweep_equals_the_same_sae_alone(config, tmp_path):
    together = train(config)
    for table, folder in zip([TOPK | {"k": 4}, TOPK | {"k": 8}, STANDARD], together, strict=True):
        (alone,) = train(change(config, output=str(tmp_path / "alone"), sae=[table]))
        assert weights(alone) == weights(folder)
        assert metrics(alone) == metrics(folder)
        shutil.rmtree(tmp_path / "alone")


def test_the_number_of_threads_changes_no_bit(config, tmp_path):
    """At sizes at which operators and blocks of work would be shared between threads."""
    saes = [sae | {"d_sae": 640, "ema_decay": 0.5, "resample_every_tokens": 3072} for sae in EVERY_ARCHITECTURE]
    saes += [{**TOPK, "architecture": "skip_transcoder", "hook_point_out": "blocks.0.mlp_out", "l1_coefficient": 0.1}]
    saes += [{"architecture": "crosscoder", "hook_points": [TOPK["hook_point"], STANDARD["hook_point"]]}]
    saes[-1] |= {"d_sae": 640, "l1_coefficient": 0.1, "lr": 1e-3}
    saes = [sae | {"prefix_sizes": [80, 640]} if "prefix_sizes" in sae else sae for sae in saes]
    before, found = torch.get_num_threads(), []
    for n_threads in (1, 2, 5):
        torch.set_num_threads(n_threads)
        try:
            output = str(tmp_path / f"{n_threads}-threads")
            folders = train(change(config, output=output, sae=saes, batch_size=1536, tokens=1536 * 6))
        finally:
            torch.set_num_threads(before)
        found.append({folder.name: weights(folder) for folder in folders})
        assert len(folders) == len(saes)
    for other in found[1:]:
        assert [name for name, bits in other.items() if bits != found[0][name]] == []


@pytest.mark.parametrize("at_step", [3, 10, 25, 40])
def test_a_killed_run_resumes_to_the_same_end(config, tmp_path, train_killed, at_step):
    whole = train(config)
    cut = change(config, output=str(tmp_path / "cut"))
    if at_step < 40:
        train_killed(cut, at_step)
    resumed = train(cut)
    assert [weights(folder) for folder in resumed] == [weights(folder) for folder in whole]
    assert [metrics(folder) for folder in resumed] == [metrics(folder) for folder in whole]


EVERY_ARCHITECTURE = [
    TOPK | {"k": 4},
    TOPK | {"k": 4, "architecture": "batch_topk"},
    TOPK | {"k": 4, "architecture": "matryoshka_batch_topk", "prefix_sizes": [24, 96]},
    TOPK | {"k": 4, "architecture": "hierarchical_topk"},
    TOPK | {"k": 4, "architecture": "matching_pursuit"},
    TOPK | {"architecture": "jumprelu", "l0_coefficient": 0.02},
    TOPK | {"architecture": "jumprelu", "l0_coefficient": 1.0, "target_l0": 4.0, "name": "jumprelu-target"},
    TOPK | {"architecture": "jumprelu", "sparsity_loss": "tanh", "l0_coefficient": 0.3, "name": "tanh"},
    TOPK | {"architecture": "gated", "l1_coefficient": 0.3, "initial_l0": 8.0},
    STANDARD,
]


def test_a_mixed_sweep_of_every_architecture_resumes_to_the_same_end(
    config, tmp_path, train_killed, sparse_activations
):
    config = change(config, sae=EVERY_ARCHITECTURE, tokens=128 * 100, checkpoint_every_tokens=128 * 30)
    whole = train(config)
    cut = change(config, output=str(tmp_path / "cut"))
    train_killed(cut, 70)
    resumed = train(cut)
    assert [weights(folder) for folder in resumed] == [weights(folder) for folder in whole]
    x = sparse_activations[:2000].float()
    for folder in whole:
        sae = Sae.load(folder)
        scale = 3 if sae.hook_point == "blocks.0.mlp_out" else 1
        x_hat = sae(x * scale) / scale
        assert (x - x_hat).square().sum() < 0.9 * (x - x.mean(0)).square().sum(), folder.name
        final = metrics(folder)[-1]
        assert final["l0"] == pytest.approx((sae.encode(x * scale) > 0).sum() / len(x), rel=0.25), folder.name
        if folder.name == "jumprelu-target":
            assert final["l0"] == pytest.approx(4, rel=0.25)


def test_a_signal_to_stop_writes_a_checkpoint_to_go_on_from(config, tmp_path, monkeypatch):
    whole = train(config)
    stopped = change(config, output=str(tmp_path / "stopped"))
    prepare, calls = run_module.prepare_batches, []

    def signalled(*arguments):
        calls.append(None)
        if len(calls) == 17:
            signal.raise_signal(signal.SIGTERM)
        return prepare(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "prepare_batches", signalled)
        with pytest.raises(KeyboardInterrupt):
            train(stopped)
    assert json.loads((tmp_path / "stopped" / "checkpoint.json").read_text())["step"] == 17
    assert [weights(folder) for folder in train(stopped)] == [weights(folder) for folder in whole]


DRIVER = """
import os, signal, sys
from thresher.train import TrainConfig
from thresher.train.run import train  # imported once, before the processes that train are forked
from thresher.train.step.sae_trainer import SaeTrainer
from thresher.shared.core.config import load_config
def counted(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
os.fsync, os.replace, SaeTrainer.step = counted(os.fsync), counted(os.replace), counted(SaeTrainer.step)
for line in sys.stdin:
    path, moment = line.rsplit(maxsplit=1)
    child = os.fork()
    if not child:
        code = 1
        try:
            left = int(moment)
            train(load_config(TrainConfig, path, []))
            print(-left, flush=True)
            code = 0
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.long
def test_a_run_killed_at_any_moment_resumes_to_the_same_end(config, tmp_path):
    """SIGKILL before 30 random writes, renames and steps of one SAE or another."""
    path = tmp_path / "train.toml"
    command = [sys.executable, "-c", DRIVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdin is not None
        assert driver.stdout is not None

        def run(output, moment):
            """Train in a process of its own; return its exit code, and what it counted if it was not killed."""
            path.write_text(to_toml(change(config, output=str(output), sae=expand_sweep(config.sae))))
            driver.stdin.write(f"{path} {moment}\n")
            driver.stdin.flush()
            said = int(driver.stdout.readline())
            return (said, 0) if said == -signal.SIGKILL else (int(driver.stdout.readline()), said)

        code, moments = run(tmp_path / "whole", 0)
        assert code == 0
        names = [sae.name for sae in expand_sweep(config.sae)]
        expected = [weights(tmp_path / "whole" / name) for name in names]
        for moment in random.Random(0).sample(range(1, moments), 30):
            assert run(tmp_path / "cut", moment)[0] == -signal.SIGKILL
            assert run(tmp_path / "cut", 0)[0] == 0
            assert [weights(tmp_path / "cut" / name) for name in names] == expected, moment
            shutil.rmtree(tmp_path / "cut")
        driver.stdin.close()


def test_only_the_last_checkpoints_are_kept(config, train_killed):
    train_killed(config, 35)
    kept = sorted(path.name for path in run_module.Path(config.output).glob("topk-*k4/checkpoints/*"))
    assert kept == ["step-000000020.safetensors", "step-000000030.safetensors"]


def test_a_finished_run_says_so_and_does_nothing(config, capsys):
    folders = train(config)
    before = weights(folders[0])
    assert train(config) == folders
    assert "this run is finished" in capsys.readouterr().err
    assert weights(folders[0]) == before


def test_a_changed_configuration_is_refused_with_its_keys(config, train_killed):
    train_killed(config, 12)
    other = change(config, seed=1, tokens=999, sae=[{**TOPK, "k": [4, 8]}, STANDARD | {"lr": 0.1}])
    with pytest.raises(ConfigError, match=r"differing: seed, sae 'standard-blocks.0.mlp_out-64-l1-0.3'\.lr, n_steps"):
        train(other)
    assert train(change(config, log_every_steps=7))


def test_an_sae_that_diverges_is_recorded_and_harms_no_other(config, tmp_path, capsys):
    expected = train(config)
    bad = TOPK | {"k": 6, "lr": 1e18}
    mixed = train(change(config, output=str(tmp_path / "mixed"), sae=[bad, *config.sae]))
    assert [weights(folder) for folder in mixed] == [weights(folder) for folder in expected]
    folder = tmp_path / "mixed" / "topk-blocks.0.resid_post-96-k6"
    assert "step" in json.loads((folder / "diverged.json").read_text())["reason"]
    assert not (folder / "cfg.json").exists()
    with pytest.raises(ConfigError, match="all SAEs diverged"):
        train(change(config, output=str(tmp_path / "bad"), sae=[bad]))


@pytest.mark.parametrize(("loss", "mse"), [(float("nan"), 1.0), (1.0, 1e9)])
def test_nan_and_explosion_stop_one_sae_at_their_step(config, tmp_path, monkeypatch, train_killed, loss, mse):
    """In the middle of the run and after a checkpoint; the one that diverged is not taken up again by a resumed run."""
    expected = train(config)
    step = TopK.step

    def failing(self, parameters, batch, given):
        output = step(self, parameters, batch, given)
        if self.config.k == 6 and given.steps_done == 14:
            output.loss, output.mse = loss, mse
        return output

    mixed = change(config, output=str(tmp_path / "mixed"), sae=[TOPK | {"k": 6}, *config.sae])
    with monkeypatch.context() as patch:
        patch.setattr(TopK, "step", failing)
        train_killed(mixed, 25)
    assert [weights(folder) for folder in train(mixed)] == [weights(folder) for folder in expected]
    folder = tmp_path / "mixed" / "topk-blocks.0.resid_post-96-k6"
    assert json.loads((folder / "diverged.json").read_text())["reason"].endswith("at step 15")
    assert not (folder / "cfg.json").exists()
    assert metrics(folder)[-1]["step"] == 15


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_that_does_not_fit_is_refused_before_it_starts(config, tmp_path, monkeypatch, device, capsys):
    """By the memory that is free there, RAM or the GPU's; one byte more than is needed is enough."""
    train(change(config, dry_run=True, device="cpu"))
    said = float(capsys.readouterr().out.split("about ")[1].split(" GiB")[0])
    store = ActivationStore.open(config.store)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 40, 1 << 40))
    assert plan_run(change(config, device="cpu"), store, 1000).memory_bytes / 2**30 == pytest.approx(said, abs=0.006)
    needed = plan_run(change(config, device=device), store, 1000).memory_bytes
    d_in, n = 32, 2 * 96 + 64
    parameters = 3 * d_in + 2 * d_in * n + n
    assert needed > parameters * 12
    if device == "cuda":
        free = lambda bytes_: monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (bytes_, 1 << 40))  # noqa: E731
    else:
        free = lambda bytes_: monkeypatch.setattr(plan_module, "available_memory", lambda *_: bytes_)  # noqa: E731
    ranks = TrainRanks(device)
    free(needed)
    assert plan_run(change(config, device=device), store, 1000, ranks).memory_bytes == needed
    free(needed - 1)
    with pytest.raises(ConfigError, match=r"the run needs about .* GiB of memory and .* are available; train fewer"):
        plan_run(change(config, device=device), store, 1000, ranks)


def test_dry_run_prints_the_plan_and_writes_nothing(config, tmp_path, capsys):
    assert train(change(config, dry_run=True)) == []
    out = capsys.readouterr().out
    assert "topk-blocks.0.resid_post-96-k8" in out
    assert "3 SAEs" in out
    assert "40 steps of 128" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ({"k": 97}, ConfigError, "k is 97, expected at most d_sae = 96"),
        ({"k": None}, ConfigError, "architecture 'topk' needs 'k'"),
        ({"k": 4, "hook_point": "blocks.9.resid_post"}, HookPointError, "it has: blocks.0.resid_post"),
        ({"k": 4, "architecture": "topkk"}, ConfigError, "did you mean 'topk'"),
        ({"k": 4, "lrr": 1}, ConfigError, "unknown key 'lrr'; did you mean 'lr'"),
        ({"k": 4, "lr": -1.0}, ConfigError, "lr"),
        ({"k": []}, ConfigError, "empty list"),
        ({"k": [4, 8], "name": "same"}, ConfigError, None),
    ],
)
def test_errors(config, table, error, message):
    merged = {key: value for key, value in (TOPK | table).items() if value is not None}
    if message is None:
        assert [folder.name for folder in train(change(config, sae=[merged]))] == ["same-k4", "same-k8"]
        return
    with pytest.raises(error, match=message):
        train(change(config, sae=[merged]))


def test_a_store_that_is_none_is_refused(config, tmp_path):
    with pytest.raises(MissingFileError):
        train(change(config, store=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises((StoreError, MissingFileError)):
        train(change(config, store=str(tmp_path / "empty")))


def test_command_line(config, tmp_path, capsys):
    path = tmp_path / "train.toml"
    path.write_text(to_toml(config))
    assert main(["train", str(path), "--dry-run", "true"]) == 0
    assert "3 SAEs" in capsys.readouterr().out
    assert main(["train", str(path), "--bach_size", "3"]) == 2
    assert "did you mean 'batch_size'" in capsys.readouterr().err
