"""GGUF files are found by path and by package, and a package's parts are joined as they were cut."""

import hashlib

import pytest

from thresher.shared.core.errors import ModelError
from thresher.shared.model.content import model_content
from thresher.shared.model.loading.gguf import gguf_options, local_model

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def install(tmp_path, monkeypatch):
    """The function that installs a package of given files, and returns the folder that it is installed in."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path / "cache"))

    def make(name, files, requires=()):
        info = site / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        lines = [f"Requires-Dist: {each}" for each in requires]
        (info / "METADATA").write_text(
            "\n".join(["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *lines]) + "\n"
        )
        for path, content in files.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_bytes(content)
        (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))
        return site

    return make


def test_a_package_with_one_file_stands_for_it(install):
    site = install("tiny-model", {"tiny_model/m.gguf": CONTENT}, requires=["never-installed"])
    assert local_model("package:tiny-model") == str(site / "tiny_model/m.gguf")
    assert model_content("package:tiny-model") == model_content(str(site / "tiny_model/m.gguf"))
    assert gguf_options(str(site / "tiny_model/m.gguf")) == (str(site / "tiny_model"), {"gguf_file": "m.gguf"})


def parts(install, content=CONTENT):
    sums = f"{hashlib.sha256(CONTENT).hexdigest()}  m.gguf\n".encode()
    install("a-model", {"a/SHA256SUMS": sums}, requires=["a-model-1==1.0", "a-model-2==1.0"])
    install("a-model-2", {"a2/m.gguf.part01": content[7000:]})
    install("a-model-1", {"a1/m.gguf.part00": content[:7000]})


def test_parts_are_joined_in_order_once(install, tmp_path):
    parts(install)
    path = local_model("package:a-model")
    with open(path, "rb") as file:
        assert file.read() == CONTENT
    assert local_model("package:a-model") == path
    assert [p.name for p in (tmp_path / "cache/models").rglob("*") if p.is_file()] == ["m.gguf"]


def test_damaged_parts_are_refused_and_nothing_is_kept(install, tmp_path):
    parts(install, CONTENT[:-1] + b"x")
    with pytest.raises(ModelError, match="do not match their checksum; install the package again"):
        local_model("package:a-model")
    assert [p for p in (tmp_path / "cache/models").rglob("*") if p.is_file()] == []


def test_packages_without_one_file_are_refused(install):
    install("none", {"none/x.txt": b""})
    install("two", {"two/a.gguf": b"a", "two/b.gguf": b"b"})
    with pytest.raises(ModelError, match=r"expected one GGUF file in package 'none', found: none"):
        local_model("package:none")
    with pytest.raises(ModelError, match=r"found: a\.gguf, b\.gguf"):
        local_model("package:two")
    with pytest.raises(ModelError, match=r"no package 'absent' is installed.*pip install absent"):
        local_model("package:absent")
