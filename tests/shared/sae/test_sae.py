"""SAEs: the formulas, the files, and what a damaged folder says."""

import json
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import thresher.shared.core.version as version_module
from thresher.shared import Sae
from thresher.shared.core.errors import DiskSpaceError, MissingFileError, OutputError, SaeError

D_IN, D_SAE = 5, 11


def make(architecture, d_out=D_IN, **config):
    torch.manual_seed(0)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, d_out), "b_dec": (d_out,), "W_skip": (d_out, D_IN)}
    names = ("W_enc", "W_dec", "b_dec", "W_skip", "b_enc", "b_gate", "b_mag", "r_mag", "threshold")
    tensors = {name: torch.randn(shapes.get(name, (D_SAE,))) for name in names}
    tensors["threshold"] = tensors["threshold"].abs()
    return Sae(architecture, tensors, hook_point="blocks.2.resid_post", config=config)


KINDS = [
    ("standard", {}),
    ("topk", {"k": 3}),
    ("jumprelu", {}),
    ("gated", {}),
    ("transcoder", {"d_out": 7}),
    ("skip_transcoder", {"d_out": 7}),
    ("jumprelu_transcoder", {"d_out": 4}),
]


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), DiskSpaceError, "the disk is full"),
        (OSError(30, "Read-only file system"), OutputError, "cannot write"),
    ],
)
def test_a_disk_that_refuses_leaves_the_folder_as_it_was(tmp_path, monkeypatch, error, kind, said):
    sae = make("standard")
    sae.save(tmp_path / "sae")
    before = {path.name: path.read_bytes() for path in (tmp_path / "sae").iterdir()}

    def refuse(tensors, path, **options):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr("thresher.shared.sae.formats.files.save_file", refuse)
    with pytest.raises(kind, match=f"{said}.*sae_weights"):
        make("topk", k=2).save(tmp_path / "sae")
    assert {path.name: path.read_bytes() for path in (tmp_path / "sae").iterdir()} == before


@pytest.mark.parametrize(("architecture", "options"), KINDS)
def test_saved_sae_loads_equal(tmp_path, architecture, options):
    sae = make(architecture, **options)
    loaded = Sae.load(sae.save(tmp_path / "sae"))
    x = torch.randn(9, D_IN)
    assert torch.equal(loaded.encode(x), sae.encode(x))
    assert torch.equal(loaded(x), sae(x))
    assert (loaded.architecture, loaded.hook_point) == (architecture, "blocks.2.resid_post")
    assert loaded.config.get("k") == options.get("k")
    assert not list((tmp_path / "sae").glob(".*"))


def test_home_in_an_saes_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert make("topk", k=3).save("~/sae") == tmp_path / "sae"
    assert Sae.load("~/sae").config["k"] == 3


@pytest.mark.parametrize(("architecture", "options"), KINDS)
def test_sparse_encoding_is_the_dense_one(architecture, options):
    sae = make(architecture, **options)
    x = torch.randn(9, D_IN)
    top_acts, top_indices = sae.encode_sparse(x)
    dense = torch.zeros(9, D_SAE).scatter_(1, top_indices, top_acts)
    torch.testing.assert_close(dense, sae.encode(x))
    torch.testing.assert_close(sae.decode_sparse(top_acts, top_indices), sae.decode(dense))


def test_encoders_are_their_formulas():
    x = torch.randn(6, D_IN)
    sae = make("topk", k=4)
    pre_acts = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    fourth = pre_acts.sort(dim=1, descending=True).values[:, 3:4]
    torch.testing.assert_close(sae.encode(x), torch.where(pre_acts >= fourth, pre_acts, 0).clamp(min=0))

    sae = make("jumprelu")
    torch.testing.assert_close(sae.encode(x), torch.where(pre_acts > sae.threshold, pre_acts, 0).clamp(min=0))

    sae = make("gated")
    linear = (x - sae.b_dec) @ sae.W_enc
    magnitude = (linear * sae.r_mag.exp() + sae.b_mag).relu()
    torch.testing.assert_close(sae.encode(x), (linear + sae.b_gate > 0) * magnitude)

    sae = make("skip_transcoder", d_out=7)
    expected = (x @ sae.W_enc + sae.b_enc).relu() @ sae.W_dec + sae.b_dec + x @ sae.W_skip.T
    torch.testing.assert_close(sae(x), expected)


def test_topk_that_weighs_by_decoder_norm_is_folded_on_loading(tmp_path):
    sae = make("topk", k=3)
    sae.save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"rescale_acts_by_decoder_norm": True}))
    x = torch.randn(8, D_IN)
    norms = sae.W_dec.norm(dim=1)
    pre_acts = sae.pre_activations(x) * norms
    kept = torch.zeros_like(pre_acts).scatter(1, pre_acts.topk(3).indices, 1) * pre_acts.relu()
    loaded = Sae.load(tmp_path)
    torch.testing.assert_close(loaded.encode(x), kept)
    torch.testing.assert_close(loaded(x), (kept / norms) @ sae.W_dec + sae.b_dec)
    torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_hook_name_is_saelens_spelling(tmp_path):
    make("standard").save(tmp_path)
    metadata = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == "blocks.2.hook_resid_post"
    assert Sae.load(tmp_path).hook_point == "blocks.2.resid_post"


def edit(folder, **changes):
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "banana"}, "'banana' is not supported; expected one of: standard"),
        ({"normalize_activations": "batch_norm"}, "normalize_activations 'batch_norm', expected one of: none, layer"),
        ({"d_sae": 12}, r"W_enc has shape \(5, 11\), expected \(5, 12\)"),
        ({"k": 99}, "k is 99, expected 1 to d_sae = 11"),
    ],
)
def test_unusable_configuration_is_refused(tmp_path, changes, message):
    make("topk", k=3).save(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(SaeError, match=message):
        Sae.load(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(MissingFileError, match="no SAE at"):
        Sae.load(tmp_path)
    make("standard").save(tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if name != "b_enc"}, weights)
    with pytest.raises(SaeError, match="lacks b_enc"):
        Sae.load(tmp_path)
    weights.write_bytes(b"\x00" * 40)
    with pytest.raises(SaeError, match="damaged"):
        Sae.load(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(SaeError, match="damaged"):
        Sae.load(tmp_path)


def test_a_transcoder_is_saved_under_the_hook_that_gives_its_input(tmp_path):
    sae = make("transcoder")
    sae.hook_point = "blocks.2.mlp_in"
    metadata = json.loads((sae.save(tmp_path / "a") / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == "blocks.2.mlp.hook_in"
    assert metadata["model_from_pretrained_kwargs"] == {"fold_ln": False}, "else the norm's weight is in the MLP"
    assert Sae.load(tmp_path / "a").hook_point == "blocks.2.mlp_in"


@pytest.mark.parametrize(
    ("hook_name", "hook_point"),
    [
        ("blocks.2.ln2.hook_normalized", "blocks.2.mlp_in_normalized"),
        ("blocks.2.hook_mlp_in", "blocks.2.mlp_branch"),
        ("blocks.2.mlp.hook_in", "blocks.2.mlp_in"),
    ],
)
def test_public_transcoders_are_read_at_the_hook_that_they_name(hook_name, hook_point, tmp_path):
    config = json.loads((make("transcoder").save(tmp_path) / "cfg.json").read_text())
    del config["metadata"]["thresher"]
    config["metadata"]["hook_name"] = hook_name
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert Sae.load(tmp_path).hook_point == hook_point


def test_an_earlier_transcoder_of_ours_is_read_at_mlp_in(tmp_path):
    sae = make("transcoder")
    sae.hook_point = "blocks.2.mlp_in"
    config = json.loads((sae.save(tmp_path) / "cfg.json").read_text())
    config["metadata"]["hook_name"] = "blocks.2.ln2.hook_normalized"
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert Sae.load(tmp_path).hook_point == "blocks.2.mlp_in", "it was trained there, whatever name was saved"


def test_an_sae_is_saved_where_the_package_is_only_on_the_path(tmp_path, monkeypatch):
    def not_installed(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(version_module, "version", not_installed)
    make("topk", k=3).save(tmp_path / "sae")
    written = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert written["metadata"]["thresher"]["version"] == "0+unknown"
    assert Sae.load(tmp_path / "sae").architecture == "topk"
