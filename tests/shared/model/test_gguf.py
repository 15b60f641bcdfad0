"""GGUF files are found by path and by package, joined from parts as they were cut, and unpacked when loaded."""

import copy
import hashlib

import numpy as np
import pytest

from thresher.shared.core.errors import ModelError
from thresher.shared.model.content import model_content
from thresher.shared.model.language_model import load_model
from thresher.shared.model.loading.gguf import gguf_options
from thresher.shared.model.loading.packages import local_model

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


def test_weights_are_unpacked_and_the_model_is_not_taken_for_a_quantised_one(tmp_path, capfd):
    path = tmp_path / "tiny.gguf"
    weights = write_llama(path)
    capfd.readouterr()
    model = load_model(str(path), dtype="float32")
    assert capfd.readouterr() == ("", "")  # transformers shows bars, also without a terminal
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    copied = dict(copy.deepcopy(model).float().named_parameters())
    np.testing.assert_array_equal(copied["model.layers.0.mlp.up_proj.weight"].numpy(), weights)


def write_llama(path):
    """Write a random Llama of one block with 8-bit weights, and return the values of its `up_proj` in NumPy."""
    import gguf

    rng, width, inner, vocabulary = np.random.default_rng(0), 32, 64, 3
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    block = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (width, width))
    block |= {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
    shapes = {f"blk.0.{name}.weight": shape for name, shape in block.items()}
    shapes |= {"token_embd.weight": (vocabulary, width), "output.weight": (vocabulary, width)}
    up = None
    for name, shape in shapes.items():
        packed = gguf.quants.quantize(rng.standard_normal(shape, dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        if "ffn_up" in name:
            scales = packed.reshape(inner, -1, 34)[..., :2].copy().view(np.float16).astype(np.float32)
            up = (packed.reshape(inner, -1, 34)[..., 2:].view(np.int8) * scales).reshape(shape)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones(width, dtype=np.float32))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    return up


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
