"""Which folders hold the SAEs, in which order, and under which names."""

from __future__ import annotations

import pytest

from thresher.evaluate.sae_folders import sae_folders, unique_names
from thresher.shared.errors import MissingFileError


@pytest.fixture
def folders(tmp_path):
    for name in ("sweep/k16", "sweep/k8", "sweep/k128", "other/k8", "sweep/checkpoints/step"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("sweep/k16", "sweep/k8", "sweep/k128", "other/k8"):
        (tmp_path / name / "cfg.json").write_text("{}")
    return tmp_path


def test_a_sweep_is_its_children_in_natural_order(folders):
    assert [path.name for path in sae_folders(str(folders / "sweep"))] == ["k8", "k16", "k128"]


def test_lists_and_single_folders(folders):
    assert sae_folders(str(folders / "other" / "k8")) == [folders / "other" / "k8"]
    listed = sae_folders([str(folders / "other"), str(folders / "sweep" / "k8"), str(folders / "sweep")])
    assert [path.relative_to(folders).as_posix() for path in listed] == [
        "other/k8",
        "sweep/k8",
        "sweep/k16",
        "sweep/k128",
    ]
    assert unique_names(listed) == ["other/k8", "sweep/k8", "sweep/k16", "sweep/k128"]
    assert unique_names(listed[1:]) == ["k8", "k16", "k128"]


def test_a_sweep_of_several_kinds_is_sorted_by_kind_first(folders):
    for name in ("topk-16", "topk-8", "standard-12", "standard-l1-0.5"):
        (folders / "kinds" / name).mkdir(parents=True)
        (folders / "kinds" / name / "cfg.json").write_text("{}")
    names = [path.name for path in sae_folders(str(folders / "kinds"))]
    assert names == ["standard-12", "standard-l1-0.5", "topk-8", "topk-16"]


def test_a_folder_under_two_names_is_one_sae(folders):
    sweep = folders / "sweep"
    (sweep / "latest").symlink_to(sweep / "k16")
    found = sae_folders([str(sweep), str(folders / "other" / ".." / "sweep" / "k8")])
    assert [path.name for path in found] == ["k8", "k16", "k128"]
    assert unique_names(found) == ["k8", "k16", "k128"]


def test_an_empty_folder_is_refused(folders):
    with pytest.raises(MissingFileError, match=r"expected cfg\.json"):
        sae_folders(str(folders / "sweep" / "checkpoints"))
