"""Which files a configuration reads: splits, mixed folders, links, names with special characters."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from datasets.data_files import DataFilesDict, get_data_patterns

from thresher.harvest.config import HarvestConfig
from thresher.harvest.documents.documents import read_documents, source_files
from thresher.harvest.documents.splits import by_name
from thresher.shared.core.errors import ConfigError, DataError, MissingFileError


def config_of(dataset, **options):
    return HarvestConfig(model="m", hook_points=["h"], store="s", dataset=str(dataset), **options)


def read(dataset, report=False, **options):
    """Return the texts of a dataset's documents."""
    return [document.text for document in read_documents(config_of(dataset, **options), report=report)]


def put(folder, *names):
    """Write files whose only text is their own name, in the format that it tells."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.table({"text": [name]}), path)
        elif path.suffix == ".csv":
            path.write_text(f"text\n{name}\n")
        elif path.suffix.lower() in (".jsonl", ".json", ".ndjson", ".jsonlines"):
            path.write_text(json.dumps({"text": name}) + "\n")
        else:
            path.write_bytes(os.fsencode(name))


SHARD = "00000-of-00001"
LAYOUTS = {
    "sharded": {
        "train": [f"data/train-{SHARD}.parquet"],
        "test": [f"data/test-{SHARD}.parquet"],
        "unsupervised": [f"data/unsupervised-{SHARD}.parquet"],
    },
    "files": {"train": ["train.jsonl"], "validation": ["dev.jsonl"], "test": ["test.jsonl"]},
    "prefixes": {"train": ["my_train_0.csv", "my_train_1.csv"], "validation": ["my_valid_0.csv"]},
    "folders": {"train": ["train/a.parquet", "train/b/c.parquet"], "validation": ["val/a.parquet"]},
    "suffixes": {"train": [f"en/c4-train.{SHARD}.jsonl"], "validation": [f"en/c4-validation.{SHARD}.jsonl"]},
    "eval": {"train": ["training.jsonl"], "test": ["evaluation.jsonl"]},
    "none": {"train": ["contest.jsonl", "developer.jsonl", "trains.jsonl"]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_split_is_what_datasets_makes_of_it(tmp_path, layout):
    splits = LAYOUTS[layout]
    put(tmp_path, *(name for names in splits.values() for name in names))
    put(tmp_path, "README.md")
    patterns = get_data_patterns(str(tmp_path))
    peers = DataFilesDict.from_patterns(patterns, str(tmp_path), allowed_extensions=[".jsonl", ".parquet", ".csv"])
    assert {split: {str(tmp_path / name) for name in names} for split, names in splits.items()} == {
        split: set(files) for split, files in peers.items()
    }
    for split, names in splits.items():
        assert read(tmp_path, split=split) == sorted(names)
        assert source_files(config_of(tmp_path, split=split)) == [tmp_path / name for name in sorted(names)]
    assert read(tmp_path, split="all") == sorted(name for names in splits.values() for name in names)
    with pytest.raises(DataError, match=f"(?m)no split 'other'; set split to one that it has: {', '.join(splits)}$"):
        read(tmp_path, split="other")


def test_names_without_a_split_are_train():
    assert by_name(["part1.jsonl", "TEST.jsonl", "train/test.jsonl", "train-test.jsonl", "latest.jsonl"]) == {
        "train": ["part1.jsonl", "train/test.jsonl", "train-test.jsonl", "latest.jsonl"],
        "test": ["TEST.jsonl", "train-test.jsonl"],
    }


def test_other_splits_are_reported_as_left_out(tmp_path, capsys):
    put(
        tmp_path,
        f"data/train-{SHARD}.parquet",
        f"data/test-{SHARD}.parquet",
        "README.md",
        "LICENSE",
        "dataset_info.json",
    )
    read(tmp_path, report=True)
    end = (
        "left out: 3 not data (LICENSE, README.md, dataset_info.json), "
        "1 of other splits (data/test-00000-of-00001.parquet)"
    )
    assert capsys.readouterr().err == (
        f"text: from '{tmp_path}', {end}\ntext: read 1 file, 1 document, 33 characters from '{tmp_path}'; {end}\n"
    )


CARD = """---
license: mit
configs:
- config_name: small
  data_files:
  - {split: train, path: "small/part-*"}
  - {split: test, path: [small/held.jsonl]}
- config_name: large
  data_files: large/*.jsonl
- config_name: below
  data_dir: deep
---
# A card
"""


def test_configurations_of_a_dataset_card(tmp_path):
    put(tmp_path, "small/part-0.jsonl", "small/held.jsonl", "large/a.jsonl", "deep/train.jsonl", "deep/test.jsonl")
    (tmp_path / "README.md").write_text(CARD)
    with pytest.raises(ConfigError, match="has the configurations small, large, below; set dataset_config to one"):
        read(tmp_path)
    with pytest.raises(ConfigError, match=r"has no configuration 'other'; its README\.md lists small, large, below"):
        read(tmp_path, dataset_config="other")
    assert read(tmp_path, dataset_config="small") == ["small/part-0.jsonl"]
    assert read(tmp_path, dataset_config="small", split="test") == ["small/held.jsonl"]
    assert read(tmp_path, dataset_config="large") == ["large/a.jsonl"]
    assert read(tmp_path, dataset_config="below", split="test") == ["deep/test.jsonl"]
    (tmp_path / "README.md").write_text(CARD.replace("- config_name: small", "- config_name: small\n  default: true"))
    assert read(tmp_path) == ["small/part-0.jsonl"]
    (tmp_path / "README.md").write_text("---\n{\n---\n")
    with pytest.raises(DataError, match=r"the header of '.*README.md' is not valid YAML"):
        read(tmp_path)
    (tmp_path / "README.md").write_text("no header")
    assert read(tmp_path, dataset_config="deep") == ["deep/train.jsonl"]
    with pytest.raises(ConfigError, match="has no configuration 'other'"):
        read(tmp_path, dataset_config="other")


def test_settings_that_would_have_no_effect_are_refused(tmp_path):
    put(tmp_path, "a.jsonl", "text/a.txt", "text/b.txt", "test.jsonl")
    for options, told in (
        ({"split": "test"}, "is text without splits; remove split"),
        ({"dataset_config": "en"}, "text files have no configurations"),
        ({"text_column": "body"}, "is read as text files; remove text_column"),
        ({"dataset_revision": "v1"}, "a local folder has no revisions"),
    ):
        with pytest.raises(ConfigError, match=told):
            read(tmp_path / "text", **options)
    with pytest.raises(ConfigError, match="it chooses among the files of a folder"):
        read(tmp_path / "a.jsonl", files=["a*"])
    with pytest.raises(ConfigError, match="is read whole; remove split"):
        read(tmp_path / "a.jsonl", split="test")
    assert read(tmp_path / "test.jsonl") == read(tmp_path / "test.jsonl", split="test") == ["test.jsonl"]


def test_splits_of_text_files(tmp_path):
    put(tmp_path / "ptb", "ptb.train.txt", "ptb.valid.txt", "ptb.test.txt", "README")
    assert sorted(read(tmp_path / "ptb")) == ["README", "ptb.train.txt"]
    assert read(tmp_path / "ptb", split="validation") == ["ptb.valid.txt"]
    put(tmp_path / "imdb", "train/pos/1.txt", "train/neg/2.txt", "test/pos/3.txt")
    assert sorted(read(tmp_path / "imdb")) == ["train/neg/2.txt", "train/pos/1.txt"]
    assert len(read(tmp_path / "imdb", split="all")) == 3
    assert read(tmp_path / "imdb", split="test") == ["test/pos/3.txt"]
    with pytest.raises(DataError, match="no split 'validation'; set split to one that it has: train, test"):
        read(tmp_path / "imdb", split="validation")
    put(tmp_path / "code", "train.py", "test.py", "eval/dev.py", "notes/test.txt")
    assert len(read(tmp_path / "code")) == 4


def test_saved_datasets_and_other_folders_with_a_state(tmp_path):
    saved = Dataset.from_dict({"text": ["a"]}, split="test")
    saved.save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == read(tmp_path / "saved", split="test") == ["a"]
    assert {path.name for path in source_files(config_of(tmp_path / "saved"))} == {
        "data-00000-of-00001.arrow",
        "dataset_info.json",
        "state.json",
    }
    with pytest.raises(ConfigError, match="is read whole; remove split"):
        read(tmp_path / "saved", split="validation")
    with pytest.raises(ConfigError, match="a saved dataset is read whole"):
        read(tmp_path / "saved", files=["*"])
    (tmp_path / "saved" / "data-00000-of-00001.arrow").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"cannot load dataset '.*saved'"):
        read(tmp_path / "saved")
    put(tmp_path / "other", "a.txt", "state.json")
    assert read(tmp_path / "other") == ["a.txt"]


def test_one_json_file_does_not_hide_text(tmp_path, capsys):
    put(tmp_path, "a.py", "b/c.py", "README.md", "package.json")
    assert sorted(read(tmp_path, report=True)) == ["README.md", "a.py", "b/c.py"]
    assert "1 data files among text (package.json)" in capsys.readouterr().err


def test_a_few_texts_do_not_hide_data(tmp_path, capsys):
    put(tmp_path, *(f"{i:02}.json" for i in range(40)), "x.py")
    assert len(read(tmp_path, report=True)) == 40
    assert "1 not data (x.py)" in capsys.readouterr().err


def test_images_beside_data_are_left_out(tmp_path, capsys):
    put(tmp_path, "a.parquet")
    (tmp_path / "logo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    assert read(tmp_path, report=True) == ["a.parquet"]
    assert "1 not data (logo.png)" in capsys.readouterr().err


@pytest.mark.parametrize("names", [("a.py", "b.json"), ("a.py", "b.py", "c.jsonl"), ("a.parquet", "load.py")])
def test_an_ambiguous_folder_is_refused(tmp_path, names):
    put(tmp_path, *names)
    with pytest.raises(
        DataError, match=r"holds data files \(1 \.\w+\) and text files \(\d \.py\); set files to"
    ) as error:
        read(tmp_path)
    assert len(str(error.value).splitlines()) == 1
    assert sorted(read(tmp_path, files=["*.py"])) == sorted(name for name in names if name.endswith(".py"))
    assert read(tmp_path, files=["*.json*", "*.parquet"]) == [name for name in names if not name.endswith(".py")]


def test_formats_do_not_mix(tmp_path, capsys):
    put(tmp_path, "a.jsonl", "b.csv", "deep/c.csv")
    with pytest.raises(DataError, match=r"mixes csv and json files \(2 \.csv, 1 \.jsonl\); set files"):
        read(tmp_path)
    assert read(tmp_path, report=True, files=["*.csv"]) == ["b.csv", "deep/c.csv"]
    assert "left out: 1 not matched by files (a.jsonl)" in capsys.readouterr().err
    assert read(tmp_path, files=["deep/*"]) == read(tmp_path, files=["./deep/"]) == ["deep/c.csv"]
    with pytest.raises(DataError, match=r"no file in '.*' matches files = \['\*.txt'\]"):
        read(tmp_path, files=["*.txt"])
    with pytest.raises(ConfigError, match=r"'a\*\*/b' is not a valid file pattern"):
        read(tmp_path, files=["a**/b"])


@pytest.mark.parametrize("suffix", [".JSONL", ".jsonlines", ".ndjson", ".Json"])
def test_all_spellings_of_json_are_data(tmp_path, suffix):
    put(tmp_path, f"a{suffix}", f"b{suffix}")
    assert read(tmp_path) == [f"a{suffix}", f"b{suffix}"]
    assert read(tmp_path / f"b{suffix}") == [f"b{suffix}"]


@pytest.mark.parametrize("folder", ["a[1]", "b*", "c?d", "{e}", "f g%20#h", "größe", "-n", "**"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv", ".txt"])
def test_names_with_special_characters(tmp_path, folder, suffix):
    name = f"{folder}{suffix}"
    put(tmp_path / folder, name, f"a1{suffix}", f"bb{suffix}", f"cxd{suffix}")
    assert read(tmp_path / folder / name) == [name]
    assert sorted(read(tmp_path / folder)) == sorted([name, f"a1{suffix}", f"bb{suffix}", f"cxd{suffix}"])


def test_a_file_name_that_is_not_utf8(tmp_path):
    folder = tmp_path / "text"
    put(folder, "a.txt")
    (folder / "b\udcff.txt").write_text("b")
    assert sorted(document.name for document in read_documents(config_of(folder))) == ["a.txt", "b?.txt"]


def test_links_are_followed_once(tmp_path, capsys):
    put(tmp_path / "data", "a.jsonl", "own/b.jsonl")
    put(tmp_path / "far", "c.jsonl", "deep/d.jsonl")
    (tmp_path / "data" / "far").symlink_to(tmp_path / "far")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data" / "own")
    (tmp_path / "far" / "loop").symlink_to(tmp_path / "far")
    (tmp_path / "data" / "up").symlink_to(tmp_path)
    (tmp_path / "data" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    assert read(tmp_path / "data", report=True) == ["a.jsonl", "c.jsonl", "deep/d.jsonl", "own/b.jsonl"]
    told = capsys.readouterr().err
    assert "1 broken links or devices (gone.jsonl)" in told
    assert "3 links to folders read elsewhere (again, far/loop, up)" in told


def test_hidden_and_cache_files_are_left_out(tmp_path, capsys):
    put(tmp_path, "a.py", ".git/config", ".hidden.py", "__pycache__/a.txt")
    assert read(tmp_path, report=True) == ["a.py"]
    assert "left out: 2 hidden (.git, .hidden.py), 1 cache files (__pycache__/a.txt)" in capsys.readouterr().err


def test_an_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    put(tmp_path, "a.txt")
    monkeypatch.setattr(
        "os.scandir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied", path))
    )
    with pytest.raises(DataError, match=f"cannot read the folder '{tmp_path}': Permission denied"):
        read(tmp_path)


def test_what_looks_like_a_path_is_one(tmp_path):
    for name in ("a.jsonl", "b.csv", "~/c", "d/e/f", "g.jsonl.zst"):
        with pytest.raises(MissingFileError):
            read(name)
