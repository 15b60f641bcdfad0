"""`thresher store import` on files of each documented layout: values bit for bit, tokens, documents, resume."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from thresher.shared import ActivationStore
from thresher.shared.store.command import main
from thresher.shared.store.write.writer import ActivationStoreWriter

D = 6


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(source: Path, store: Path, *options: str) -> ActivationStore:
    assert main(["import", str(source), "--store", str(store), *options]) == 0
    found = ActivationStore.open(store, verify="always")
    assert found.complete
    assert found.verify() == []
    return found


def saev(folder: Path, **facts: object) -> torch.Tensor:
    """Write 7 examples of 2 layers, 3 patches and a class token, in shards of 4; return `[7, 2, 4, D]`."""
    folder.mkdir()
    known = {"family": "clip", "ckpt": "ViT-B/16", "layers": [4, 7], "cls_token": True, "d_model": D, "n_examples": 7}
    known |= {"content_tokens_per_example": 3, "dtype": "float32", "protocol": "2.1", "max_tokens_per_shard": 32}
    (folder / "metadata.json").write_text(json.dumps(known | facts))
    rows = numbers(7, 2, 4, D)
    for shard, n in enumerate((4, 3)):  # the last file has the size of a full shard
        file = np.memmap(folder / f"acts{shard:06}.bin", "<f4", "w+", shape=(4, 2, 4, D))
        file[:n] = rows[shard * 4 : shard * 4 + n].numpy()
        file.flush()
    shards = [{"name": f"acts{shard:06}.bin", "n_examples": n} for shard, n in enumerate((4, 3))]
    (folder / "shards.json").write_text(json.dumps(shards))
    return rows


def test_saev_shards_keep_examples_as_contexts(tmp_path):
    rows = saev(tmp_path / "in")
    store = run(tmp_path / "in", tmp_path / "out", "--holdout_fraction", "0.3")
    assert (store.n_contexts, store.context_size, store.hook_points) == (
        7,
        4,
        ("blocks.4.resid_post", "blocks.7.resid_post"),
    )
    assert store.dtype == torch.float32
    for place, name in enumerate(store.hook_points):
        assert torch.equal(store.read(name, 0, 28), rows[:, place].reshape(28, D))
    documents, positions = store.documents(0, 28)
    assert documents.tolist() == np.repeat(np.arange(7), 4).tolist()
    assert positions.tolist() == [0, 1, 2, 3] * 7
    assert 0 < store.held_out_contexts().sum() < 7
    assert store.metadata["model"] == "ViT-B/16"


def test_saev_shards_of_the_protocol_s_documented_names(tmp_path):
    """Protocol 2.0's page names the keys `patches_per_ex` and `n_ex`."""
    rows = saev(tmp_path / "in", patches_per_ex=3, cls_token=True)
    facts = json.loads((tmp_path / "in" / "metadata.json").read_text())
    del facts["content_tokens_per_example"]
    (tmp_path / "in" / "metadata.json").write_text(json.dumps(facts))
    shards = [{"name": f"acts{shard:06}.bin", "n_ex": n} for shard, n in enumerate((4, 3))]
    (tmp_path / "in" / "shards.json").write_text(json.dumps(shards))
    store = run(tmp_path / "in", tmp_path / "out", "--hook_points", "blocks.7.resid_post")
    assert torch.equal(store.read("blocks.7.resid_post", 0, 28), rows[:, 1].reshape(28, D))


def llamascopium(folder: Path, form: str, flat: bool = False) -> dict[str, torch.Tensor]:
    """Write 3 chunks of 2 contexts of 5 at two hook points, in an order that sorts wrongly by name."""
    names = {"blocks.3.hook_resid_post": 1, "blocks.4.hook_mlp_out": 2}
    rows = {name: numbers(6, 5, D, dtype=torch.bfloat16, seed=seed) for name, seed in names.items()}
    for name, values in rows.items():
        (folder / name).mkdir(parents=True)
        for chunk, number in enumerate((9, 10, 11)):
            part = slice(chunk * 2, chunk * 2 + 2)
            content = {"activation": values[part], "tokens": torch.arange(30).view(6, 5)[part]}
            content |= {"mask": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 5, dtype=torch.int)}
            content["mask"][0, 0] = 0
            if flat:
                content = {key: value.flatten(0, 1) for key, value in content.items()}
            content = {key: value.clone() for key, value in content.items()}
            file = folder / name / f"shard-0-chunk-{number}.{form}"
            save_file(content, file) if form == "safetensors" else torch.save(content | {"meta": [{}]}, file)
    return rows


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_llamascopium_chunks_keep_tokens_and_masks(tmp_path, form):
    rows = llamascopium(tmp_path / "in", form)
    store = run(tmp_path / "in", tmp_path / "out")
    assert store.hook_points == ("blocks.3.resid_post", "blocks.4.mlp_out")
    assert store.dtype == torch.bfloat16
    for name, values in zip(store.hook_points, rows.values(), strict=True):
        assert torch.equal(store.read(name, 0, 30), values.view(30, D))
    assert store.tokens(0, 30).tolist() == list(range(30))
    assert (~store.row_mask(0, 30)).nonzero()[0].tolist() == [0, 10, 20]


def test_llamascopium_chunks_of_rows_are_grouped(tmp_path):
    rows = llamascopium(tmp_path / "in", "safetensors", flat=True)
    store = run(tmp_path / "in", tmp_path / "out", "--context_size", "7")
    assert (store.n_contexts, store.context_size) == (4, 7)
    assert torch.equal(store.read("blocks.4.mlp_out", 0, 28), rows["blocks.4.hook_mlp_out"].view(30, D)[:28])


def crosslayer(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    """Write two chunks of 20 and 10 rows with inputs and targets of layers 0 and 10; return `[30, 4, D]`."""
    h5py = pytest.importorskip("h5py")
    folder.mkdir()
    rows = numbers(30, 4, D, dtype=dtype)
    for chunk, part in enumerate((slice(0, 20), slice(20, 30))):
        with h5py.File(folder / f"chunk_{chunk}.h5", "w") as file:
            for place, key in enumerate(("layer_0/inputs", "layer_0/targets", "layer_10/inputs", "layer_10/targets")):
                values = rows[part, place].contiguous()
                bits = values.view(torch.int16).numpy().view(np.uint16) if dtype == torch.bfloat16 else values.numpy()
                file.create_dataset(key, data=bits, chunks=(5, D), compression="gzip")
    (folder / "metadata.json").write_text(json.dumps({"model_name": "gpt2", "d_model": D}))
    return rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_crosslayer_chunks_in_every_type(tmp_path, dtype):
    rows = crosslayer(tmp_path / "in", dtype)
    store = run(tmp_path / "in", tmp_path / "out", "--context_size", "10", "--aligned", "true")
    assert store.dtype == dtype
    assert store.hook_points == tuple(f"blocks.{layer}.mlp_{side}" for layer in (0, 10) for side in ("in", "out"))
    for place, name in enumerate(store.hook_points):
        assert torch.equal(store.read(name, 0, 30), rows[:, place])
    assert store.metadata["model"] == "gpt2"


def test_crosslayer_layers_are_not_taken_as_aligned(tmp_path, capsys):
    rows = crosslayer(tmp_path / "in", torch.float32)
    assert main(["import", str(tmp_path / "in"), "--store", str(tmp_path / "out")]) == 2
    assert "--hook_points blocks.0.mlp_in,blocks.0.mlp_out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    only = ("--hook_points", "blocks.10.mlp_out", "--context_size", "10")
    store = run(tmp_path / "in", tmp_path / "out", *only)
    assert torch.equal(store.read("blocks.10.mlp_out", 0, 30), rows[:, 3])


def vllm(folder: Path, lengths: list[int]) -> list[dict[str, torch.Tensor]]:
    folder.mkdir()
    requests = []
    for number, length in enumerate(lengths):
        states = numbers(length, 2, D, dtype=torch.bfloat16, seed=number)
        requests.append({"hidden_states": states, "token_ids": torch.arange(length) + 100 * number})
        save_file(requests[-1], folder / f"cmpl-{number:03}.safetensors")
        (folder / f"cmpl-{number:03}.safetensors.lock").touch()
    return requests


def test_vllm_s_requests_become_documents_that_are_not_split_between_training_and_held_out(tmp_path):
    requests = vllm(tmp_path / "in", [3, 11, 1, 8, 2, 9, 5, 6, 7, 4, 12, 3])
    options = ("--layers", "0,9", "--context_size", "4", "--holdout_fraction", "0.4")
    store = run(tmp_path / "in", tmp_path / "out", *options)
    assert store.hook_points == ("blocks.0.resid_pre", "blocks.8.resid_post")
    documents, positions = store.documents(0, store.n_rows)
    tokens = store.tokens(0, store.n_rows).tolist()
    for row, (document, position) in enumerate(zip(documents.tolist(), positions.tolist(), strict=True)):
        request = requests[document]
        assert tokens[row] == request["token_ids"][position]
        for place, name in enumerate(store.hook_points):
            assert torch.equal(store.read(name, row, row + 1)[0], request["hidden_states"][position, place])
    pairs = list(zip(documents.tolist(), positions.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert 71 - 2 * 3 <= len(pairs) <= 71, "at most three rows of either split fill no context"
    held_out = np.repeat(store.held_out_contexts(), 4)
    assert 0 < held_out.sum() < len(held_out)
    assert not set(documents[held_out].tolist()) & set(documents[~held_out].tolist())
    assert store.document_info(3)[1] == "cmpl-003"


def test_vllm_s_files_do_not_say_their_layers(tmp_path, capsys):
    vllm(tmp_path / "in", [5, 6])
    assert main(["import", str(tmp_path / "in"), "--store", str(tmp_path / "out")]) == 2
    assert "its files do not say which; give their ids in order" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "in"), "--store", str(tmp_path / "out"), "--layers", "1,2,3"]) == 2
    assert "(got [1, 2, 3])" in capsys.readouterr().err


@pytest.mark.parametrize("dims", [2, 3])
def test_a_folder_of_safetensors(tmp_path, dims):
    (tmp_path / "in").mkdir()
    a, b = numbers(24, D, dtype=torch.float16), numbers(24, 2 * D, dtype=torch.float16, seed=1)
    tokens = torch.arange(24)
    for file, part in enumerate((slice(0, 12), slice(12, 24))):
        content = {"model.layers.3": a[part], "blocks.2.hook_resid_post": b[part], "input_ids": tokens[part]}
        if dims == 3:
            content = {name: value.unflatten(0, (3, 4)) for name, value in content.items()}
        save_file({name: value.clone() for name, value in content.items()}, tmp_path / "in" / f"{file}.safetensors")
    options = ("--context_size", "8") if dims == 2 else ()
    store = run(tmp_path / "in", tmp_path / "out", *options)
    assert store.context_size == (8 if dims == 2 else 4)
    assert torch.equal(store.read("model.layers.3", 0, 24), a)
    assert torch.equal(store.read("blocks.2.resid_post", 0, 24), b)
    assert store.tokens(0, 24).tolist() == tokens.tolist()


def test_an_interrupted_import_ends_with_the_same_bytes(tmp_path, monkeypatch, capsys):
    """The third batch fails; the same command resumes behind the committed shards; then it reuses the store."""
    (tmp_path / "in").mkdir()
    for file in range(5):
        save_file({"h": numbers(16, 4, D, seed=file)}, tmp_path / "in" / f"{file}.safetensors")
    monkeypatch.setattr("thresher.shared.store.foreign.run.BATCH_BYTES", 8 * 4 * D * 4)
    make = ActivationStoreWriter.__init__
    small = {"chunk_bytes": 200, "shard_bytes": 1000}
    monkeypatch.setattr(ActivationStoreWriter, "__init__", lambda self, *a, **k: make(self, *a, **k, **small))
    whole = run(tmp_path / "in", tmp_path / "whole")
    append = ActivationStoreWriter.append
    calls = []

    def failing(self, *arguments, **named):
        calls.append(self.n_contexts)
        if len(calls) == 4:
            raise KeyboardInterrupt
        append(self, *arguments, **named)

    monkeypatch.setattr(ActivationStoreWriter, "append", failing)
    assert main(["import", str(tmp_path / "in"), "--store", str(tmp_path / "out")]) == 130
    assert not ActivationStore.open(tmp_path / "out").complete
    resumed = run(tmp_path / "in", tmp_path / "out")
    assert calls[4] > 0, "it did not start anew"
    assert torch.equal(resumed.read("h", 0, 320), whole.read("h", 0, 320))
    files = {p.relative_to(tmp_path / "whole"): p.read_bytes() for p in (tmp_path / "whole").rglob("*") if p.is_file()}
    assert files == {
        p.relative_to(tmp_path / "out"): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    n = len(calls)
    run(tmp_path / "in", tmp_path / "out")
    assert len(calls) == n
    assert "reuses store" in capsys.readouterr().err
    save_file({"h": numbers(16, 4, D, seed=9)}, tmp_path / "in" / "0.safetensors")
    assert main(["import", str(tmp_path / "in"), "--store", str(tmp_path / "out")]) == 2
    assert "is of another import: it differs in files" in capsys.readouterr().err


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


FAULTS = {
    "nothing there": (lambda folder: None, (), "nothing at"),
    "other files": (lambda folder: (folder.mkdir(), (folder / "a.txt").touch()), (), "no activations of a known"),
    "a cut file": (lambda folder: (vllm(folder, [9]), cut(folder / "cmpl-000.safetensors")), (), "is cut short"),
    "a cut shard": (
        lambda folder: (saev(folder), (folder / "acts000001.bin").write_bytes(b"")),
        (),
        "should have",
    ),
    "damaged JSON": (lambda folder: (saev(folder), (folder / "metadata.json").write_text("{")), (), "cannot read"),
    "an unknown hook point": (saev, ("--hook_points", "blocks.9.resid_post"), "it has blocks.4.resid_post"),
    "another context size": (saev, ("--context_size", "9"), "holds contexts of 4"),
    "another format": (saev, ("--format", "vllm"), "holds no files of format vllm"),
    "too few rows": (lambda folder: vllm(folder, [3]), ("--layers", "1,2"), "too few for one context"),
    "an unknown option": (saev, ("--context", "9"), "did you mean 'context_size'"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_mistakes_are_one_line_and_leave_no_store(tmp_path, case, capsys):
    make, options, message = FAULTS[case]
    make(tmp_path / "in")
    assert main(["import", str(tmp_path / "in"), "--store", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
