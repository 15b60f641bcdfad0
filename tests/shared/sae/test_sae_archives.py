"""What torch.save writes is read without running code, and refused if it is damaged or holds anything but tensors."""

import os
import zipfile

import pytest
import torch

from thresher.shared.core.errors import SaeError
from thresher.shared.sae.formats.reading import read_torch_archive

TENSORS = {"W": torch.arange(60.0).view(6, 10).T, "k": torch.tensor(3, dtype=torch.int32)}


@pytest.fixture
def archive(tmp_path):
    def write(content=TENSORS):
        torch.save(content, tmp_path / "ae.pt")
        return tmp_path / "ae.pt"

    return write


def test_tensors_are_read_as_they_are(archive):
    read = read_torch_archive(archive(TENSORS | {"half": torch.ones(2, dtype=torch.bfloat16)}), "SAE")
    assert torch.equal(read["W"], TENSORS["W"])
    assert not read["W"].is_contiguous()
    assert (read["k"].dtype, read["half"].dtype) == (torch.int32, torch.bfloat16)


class Runs:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_an_archive_runs_no_code(archive, tmp_path):
    hostile = Runs(tmp_path / "made")
    for content in (hostile, TENSORS | {"x": hostile}):
        with pytest.raises(SaeError, match=r"ae\.pt may hold tensors alone, and no code"):
            read_torch_archive(archive(content), "SAE")
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "ae.pt", weights_only=False)
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "holds a list, expected named tensors"),
        ({1: torch.zeros(2)}, "holds a dict, expected named tensors"),
        ({"state_dict": {"x": torch.zeros(2)}}, r"'state_dict' in ae\.pt is not a dense tensor"),
        ({"x": torch.zeros(2, 2).to_sparse()}, r"'x' in ae\.pt is not a dense tensor"),
        ({"x": torch.zeros(1).expand(10_000, 10_000)}, "unpacks to more"),
        ({"x": torch.tensor([1.0, float("nan")])}, r"x in ae\.pt has 1 of 2 values that are NaN or infinite"),
        ({"x": torch.zeros(2, dtype=torch.complex64)}, r"x in ae\.pt holds torch\.complex64"),
    ],
)
def test_archives_of_other_things_are_refused(content, message, archive):
    with pytest.raises(SaeError, match=message):
        read_torch_archive(archive(content), "SAE")


def test_a_changed_byte_is_noticed(archive):
    path = archive()
    saved = bytearray(path.read_bytes())
    saved[saved.index(torch.arange(60.0).numpy().tobytes()) + 8] ^= 1
    path.write_bytes(saved)
    assert torch.load(path, weights_only=True)["W"][2, 0] != 2
    with pytest.raises(SaeError, match=r"in ae\.pt does not match its checksum"):
        read_torch_archive(path, "SAE")


def test_a_compressed_archive_is_not_unpacked(archive):
    path = archive()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("ae/data/0", b"\0" * 10_000_000)
    with pytest.raises(SaeError, match="unpacks to more"):
        read_torch_archive(path, "SAE")


def test_damaged_archives_are_refused_in_a_line(archive):
    path = archive()
    saved = path.read_bytes()
    for number in range(0, len(saved), 37):
        path.write_bytes(saved[:number] + bytes([saved[number] ^ 255]) + saved[number + 1 :])
        try:
            read = read_torch_archive(path, "SAE")
        except SaeError:
            continue
        assert torch.equal(read["W"], TENSORS["W"]), number
