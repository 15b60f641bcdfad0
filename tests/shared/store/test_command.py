"""`thresher store info|verify|sample`, and the bound on the writer's memory."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from transformers import BertConfig

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.store.command import main
from thresher.shared.store.local import durable
from thresher.shared.store.write.pipeline import Pipeline


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(durable, "flush", lambda handle: None)
    rows = torch.zeros(4, 8, 3)
    rows[..., 0] = 3.0
    rows[..., 1] = torch.arange(32).reshape(4, 8) % 2 * 8.0 - 4.0
    documents = torch.arange(4)[:, None].expand(4, 8)
    settings = {"mask_token_ids": [0], "metadata": {"model": "some/model"}}
    with ActivationStoreWriter(tmp_path / "s", {"blocks.0.resid_post": 3}, 8, **settings) as writer:
        writer.append(
            {"blocks.0.resid_post": rows},
            torch.arange(32).reshape(4, 8),
            documents=documents,
            positions=torch.arange(8).expand(4, 8),
            held_out=[False, True, False, False],
            document_info={i: (i, f"file{i}.py") for i in range(4)},
        )
    return tmp_path / "s"


def test_info_tells_sizes_and_moments(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(store)]) == 0
    out = capsys.readouterr().out
    assert "complete" in out
    assert "32: 4 contexts of 8, 1 held out" in out
    assert "23 rows (not held out; tokens [0] masked)" in out
    # 11 of the 23 rows hold -4 and 12 hold 4: variance 16 - (4/23)^2; every norm is 5.
    variance = 16 - (4 / 23) ** 2
    assert f"mean norm 5, total variance {variance:.4g}" in out
    assert "model = 'some/model'" in out


def test_sample_shows_contexts_with_their_norms(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(store), "--contexts", "9"]) == 0
    out = capsys.readouterr().out
    assert out.count("context ") == 4
    assert "context 1 (held out), document 1 (file1.py) from position 0" in out
    assert "norms of mean 5, least 5, most 5" in out
    assert "8 9 10 11 12 13 14 15" in out


def test_sample_shows_no_text_of_a_tokenizer_that_is_made_up(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    BertConfig().save_pretrained(tmp_path / "bare")  # for which transformers makes a tokenizer of five tokens
    assert main(["sample", str(store), "--tokenizer", str(tmp_path / "bare")]) == 2
    assert f"'{tmp_path / 'bare'}' contains no tokenizer" in capsys.readouterr().err
    settings = {"metadata": {"tokenizer": str(tmp_path / "bare")}}
    with ActivationStoreWriter(tmp_path / "t", {"h": 1}, 8, **settings) as writer:
        writer.append({"h": torch.ones(1, 8, 1)}, torch.arange(8)[None])
    assert main(["sample", str(tmp_path / "t")]) == 0
    assert "0 1 2 3 4 5 6 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["look", "x"], "error: no action 'look'; expected one of: info, verify, sample"),
        (["info"], "error: `thresher store info` needs the path of a store"),
        (["info", "nowhere"], "error: no activation store at 'nowhere'"),
        (["sample", "{}", "--rows", "3"], "error: command line: unknown key 'rows'; known keys: contexts"),
        (
            ["sample", "{}", "--contexts", "many"],
            "error: command line: contexts: expected an integer of at least 0, got",
        ),
        (["info", "{}", "other"], "error: unexpected 'other'; expected one store and options"),
    ],
)
def test_mistakes_are_one_line(
    store: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([part.format(store) for part in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_no_more_rows_wait_than_allowed(tmp_path: Path) -> None:
    """The disk is blocked: the caller writes up to the bound and no further, and continues with the disk."""
    disk_moves, handed_over = threading.Event(), threading.Semaphore(0)
    pipeline = Pipeline(tmp_path, threads=2, pending_bytes=1000)
    sent: list[int] = []

    def write(number: int) -> int:
        disk_moves.wait()
        return number

    def send() -> None:
        for i in range(12):
            pipeline.encode(lambda i=i: i, write, 300)
            sent.append(i)
            handed_over.release()

    caller = threading.Thread(target=send)
    caller.start()
    for _ in range(3):
        handed_over.acquire()
    caller.join(timeout=0.05)
    assert caller.is_alive()
    assert sent == [0, 1, 2], "3 x 300 bytes fit 1,000; a fourth does not"
    disk_moves.set()
    caller.join()
    pipeline.close()
    pipeline.check()
    assert pipeline.bytes_written == sum(range(12)), "each result was written once"


def test_a_store_can_be_read_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "flush", lambda handle: None)
    rows = torch.randn(40, 8, 3, generator=torch.Generator().manual_seed(0))
    with ActivationStoreWriter(tmp_path / "s", {"a": 3}, 8, chunk_bytes=100, shard_bytes=500) as writer:
        for part in rows.split(10):
            writer.append({"a": part})
        # A shard that is begun waits for nothing; those before it are committed or on their way.
        store = ActivationStore.open(tmp_path / "s")
        assert not store.complete
        assert torch.equal(store.read("a", 0, store.n_rows), rows.bfloat16().reshape(-1, 3)[: store.n_rows])
    assert ActivationStore.open(tmp_path / "s").n_contexts == 40
