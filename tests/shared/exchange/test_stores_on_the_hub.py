"""Stores on the Hub: pushed, resumed after an interruption, and pulled as the same bytes."""

import pytest
import torch
import yaml

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.store.command import main

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
HOOK = "blocks.1.resid_post"


def write(path, seed=0, n=12):
    generator = torch.Generator().manual_seed(seed)
    with ActivationStoreWriter(path, {HOOK: 6}, context_size=8, dtype="float32", metadata={"model": "m"}) as writer:
        for number in range(n):
            writer.append({HOOK: torch.randn(1, 8, 6, generator=generator)}, held_out=[number % 4 == 0])
    return path


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_a_store_comes_back_as_the_same_bytes(hub, token, tmp_path, capsys):
    store = write(tmp_path / "store")
    code, printed = run(capsys, "push", store, "--repo", "me/rows", "--license", "mit")
    assert code == 0, printed
    there = hub.repositories["me/rows"]
    assert set(there) == {*files(store), "README.md"}
    assert hub.commits[-1] == ["manifest.jsonl"]
    front = yaml.safe_load(there["README.md"].decode().split("---")[1])
    assert front["license"] == "mit"
    assert "96, in 12 contexts of 8 tokens" in there["README.md"].decode()
    code, printed = run(capsys, "pull", "hf://datasets/me/rows", tmp_path / "pulled")
    assert code == 0, printed
    assert files(tmp_path / "pulled") == files(store)
    assert ActivationStore.open(tmp_path / "pulled").verify() == []
    assert not list(tmp_path.glob(".pulled*"))
    n = len(hub.commits)
    assert run(capsys, "push", store, "--repo", "me/rows")[0] == 0
    assert [names for names in hub.commits[n:] if names != ["README.md"]] == []


def test_an_interrupted_push_is_resumed(hub, token, tmp_path, capsys, monkeypatch):
    from thresher.shared.store.share import push

    monkeypatch.setattr(push, "_FILES_PER_COMMIT", 2)
    store, real, done = write(tmp_path / "store"), push.upload, []

    def failing(*arguments, **keywords):
        done.append(keywords.get("files"))
        if len(done) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    monkeypatch.setattr(push, "upload", failing)
    assert run(capsys, "push", store, "--repo", "me/rows")[0] == 130
    assert "manifest.jsonl" not in hub.repositories["me/rows"]
    code, printed = run(capsys, "pull", "hf://datasets/me/rows", tmp_path / "pulled")
    assert code == 2
    assert "one whose upload is unfinished" in printed
    monkeypatch.setattr(push, "upload", real)
    sent = {name for names in hub.commits for name in names} - {"README.md"}
    n = len(hub.commits)
    assert run(capsys, "push", store, "--repo", "me/rows")[0] == 0
    again = {name for names in hub.commits[n:] for name in names} - {"README.md"}
    assert len(sent) == 2
    assert not sent & again
    assert set(hub.repositories["me/rows"]) == {*files(store), "README.md"}


def test_an_interrupted_pull_is_resumed(hub, token, tmp_path, capsys):
    store = write(tmp_path / "store")
    assert run(capsys, "push", store, "--repo", "me/rows")[0] == 0
    last = sorted(files(store))[-1]
    hub.wrong = {last}
    code, printed = run(capsys, "pull", "hf://datasets/me/rows", tmp_path / "pulled")
    assert code == 2
    assert "does not match the checksum" in printed
    assert not (tmp_path / "pulled").exists()
    hub.wrong, n = set(), len(hub.downloads)
    assert run(capsys, "pull", "hf://datasets/me/rows", tmp_path / "pulled")[0] == 0
    assert [path for path, _ in hub.downloads[n:]] == [last]
    assert files(tmp_path / "pulled") == files(store)


def test_mistakes_are_one_line(hub, token, tmp_path, capsys):
    store = write(tmp_path / "store")
    assert run(capsys, "push", store, "--repo", "me/rows")[0] == 0
    other = write(tmp_path / "other", seed=1, n=20)
    for arguments, message in (
        (["push", other, "--repo", "me/rows"], "holds another store than"),
        (["push", store, "--repo", "rows"], "expected --repo USER/NAME"),
        (["push"], "needs the folder of a store first"),
        (["pull", "hf://datasets/me/rows", store], "is there already; choose a new folder"),
        (["pull", "hf://me/rows", tmp_path / "x"], "is not a data set on the Hub"),
        (["pull", "hf://datasets/me/none", tmp_path / "x"], "no repository"),
        (["show", store], "expected one of: info, verify, sample, push, pull"),
    ):
        code, printed = run(capsys, *arguments)
        assert code == 2, arguments
        assert message in printed
    assert not (tmp_path / "x").exists()
