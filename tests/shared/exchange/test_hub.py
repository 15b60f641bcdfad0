"""SAEs on the Hub: a sweep is uploaded with a card, comes back the same, and faults are one line."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from thresher.evaluate.saes.sae_folders import sae_folders
from thresher.shared.core.errors import HubError, MissingFileError, SaeError
from thresher.shared.exchange.command import main
from thresher.shared.sae import Sae
from thresher.shared.sae.formats import walk_saes
from thresher.shared.sae.sources import locate_source
from thresher.train.warm_start import read_trained_sae

# What `huggingface_hub` calls its HTTP client with.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

D, N = 6, 12


def make(seed=0, architecture="topk"):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,), "threshold": (N,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    metadata = {"model_name": "openai-community/gpt2", "dataset_path": "some/text", "context_size": 64}
    return Sae(architecture, tensors, hook_point="blocks.1.resid_post", config={"k": 3}, metadata=metadata)


@pytest.fixture
def sweep(tmp_path):
    """A run's output with two SAEs, and their evaluation beside it."""
    root = tmp_path / "run"
    for seed, name in enumerate(("topk-k2", "topk-k10")):
        make(seed).save(root / "saes" / name)
        (root / "saes" / name / "config.toml").write_text('store = "nowhere"\n')
        (root / "saes" / name / "checkpoints").mkdir()
        (root / "saes" / name / "checkpoints" / "large.bin").write_bytes(b"x")
    row = {
        "name": "topk-k2",
        "explained_variance": 0.81234,
        "l0": 3.0,
        "n_rows": 5000,
        "n_documents": 40,
        "error": None,
    }
    row["confidence_95"] = {"explained_variance": [0.80, 0.82]}
    (root / "evaluation").mkdir()
    (root / "evaluation" / "metrics.json").write_text(json.dumps([row]))
    return root / "saes"


def test_a_sweep_is_pushed_and_loaded_as_it_was(sweep, hub, token, tmp_path, capsys):
    assert main(["push", str(sweep), "--repo", "me/demo"]) == 0
    assert "uploaded 2 SAEs" in capsys.readouterr().out
    files = hub.repositories["me/demo"]
    expected = {
        f"{name}/{file}" for name in ("topk-k2", "topk-k10") for file in ("cfg.json", "sae_weights.safetensors")
    }
    expected |= {"README.md", "metrics.json", "topk-k2/config.toml", "topk-k10/config.toml"}
    assert set(files) == expected
    for name in ("topk-k2", "topk-k10"):
        for file in ("cfg.json", "sae_weights.safetensors"):
            assert files[f"{name}/{file}"] == (sweep / name / file).read_bytes()
    x = torch.randn(20, D)
    sae = Sae.load("hf://me/demo/topk-k10")
    assert torch.equal(sae(x), Sae.load(sweep / "topk-k10")(x))
    n = len(hub.downloads)
    Sae.load("hf://me/demo/topk-k10@main")
    assert len(hub.downloads) == n
    assert main(["pull", "hf://me/demo", str(tmp_path / "pulled")]) == 0
    assert (tmp_path / "pulled" / "topk-k2" / "cfg.json").read_bytes() == files["topk-k2/cfg.json"]
    assert main(["push", str(sweep), "--repo", "me/demo"]) == 0
    assert main(["pull", "hf://me/demo", str(tmp_path / "pulled")]) == 2
    assert "is there already; choose a new folder" in capsys.readouterr().err


def test_the_card_says_what_was_measured(sweep, hub, token, capsys):
    assert main(["push", str(sweep), "--repo", "me/demo", "--dry_run"]) == 0
    card = capsys.readouterr().out
    assert hub.repositories == {}
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "openai-community/gpt2"
    assert front["datasets"] == ["some/text"]
    assert (front["library_name"], front["license"]) == ("saelens", "mit")
    assert {"saelens", "sparse-autoencoder"} <= set(front["tags"])
    assert "0.8123 (0.8000 to 0.8200)" in card
    assert "5,000 rows of 40 documents" in card
    assert card.count("not measured") == 2
    assert "CE and KL scores" not in card
    assert 'Sae.load("hf://me/demo/topk-k2")' in card
    assert 'SAE.from_pretrained("me/demo", "topk-k2")' in card
    assert "SHA-256" in card
    assert "would upload topk-k2/cfg.json" in card


def published(hub, sweep, name="me/demo"):
    files = [path for path in sweep.rglob("*") if path.is_file() and path.suffix != ".bin"]
    hub.repositories[name] = {path.relative_to(sweep).as_posix(): path.read_bytes() for path in files}
    return hub.repositories[name]


def test_a_cut_download_is_resumed_where_it_stopped(sweep, hub):
    published(hub, sweep)
    hub.cut = [100]
    sae = Sae.load("hf://me/demo/topk-k2")
    assert torch.equal(sae.W_enc, Sae.load(sweep / "topk-k2").W_enc)
    assert ("topk-k2/sae_weights.safetensors", 100) in hub.downloads
    hub.cut = [0] * 50
    with pytest.raises(HubError, match=r"the Hub at .* cannot be reached: .*peer closed connection"):
        Sae.load("hf://me/demo/topk-k10")
    hub.cut = []
    assert torch.equal(Sae.load("hf://me/demo/topk-k10").W_enc, Sae.load(sweep / "topk-k10").W_enc)


def test_a_file_that_does_not_match_its_checksum_is_refused_and_removed(sweep, hub, tmp_path):
    published(hub, sweep)
    hub.wrong = {"topk-k2/sae_weights.safetensors"}
    with pytest.raises(HubError, match=r"topk-k2/sae_weights\.safetensors' does not match the checksum"):
        Sae.load("hf://me/demo/topk-k2")
    assert not list((tmp_path / "cache").rglob("sae_weights.safetensors"))
    hub.wrong = set()
    assert Sae.load("hf://me/demo/topk-k2").d_sae == N
    hub.repositories["me/small"] = dict(hub.repositories["me/demo"])
    hub.wrong = {"topk-k2/cfg.json"}
    with pytest.raises(HubError, match=r"cfg\.json' does not match the checksum"):
        Sae.load("hf://me/small/topk-k2")


def test_a_private_repository_needs_a_token(sweep, hub, monkeypatch, capsys):
    published(hub, sweep)
    hub.private = {"me/demo"}
    with pytest.raises(HubError, match=r"no repository 'hf://me/demo' .*, or it is private; .*HF_TOKEN"):
        Sae.load("hf://me/demo/topk-k2")
    assert main(["push", str(sweep), "--repo", "me/other"]) == 2
    assert "error: " in capsys.readouterr().err
    assert "me/other" not in hub.repositories
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert Sae.load("hf://me/demo/topk-k2").d_sae == N


def test_without_the_hub_the_cache_serves(sweep, hub, monkeypatch):
    published(hub, sweep)
    Sae.load("hf://me/demo/topk-k2")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert Sae.load("hf://me/demo/topk-k2").d_sae == N
    with pytest.raises(HubError, match=r"the Hub at http://127\.0\.0\.1:9 cannot be reached"):
        Sae.load("hf://me/demo/topk-k10")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://me/demo", "holds 2 SAEs; name one, such as 'hf://me/demo/topk-k2'"),
        ("hf://me/demo/none", "no file or folder 'none' in 'hf://me/demo'"),
        ("hf://me/demo/topk-k2@old", "no revision 'old' in 'hf://me/demo'"),
        ("hf://me/none/x", "no repository 'hf://me/none'"),
        ("hf://me", "is not an address on the Hub; expected hf://USER/REPO/path@revision"),
        ("hf://me/demo/../x", "is not an address on the Hub"),
    ],
)
def test_what_is_not_there_is_one_line(address, message, sweep, hub):
    published(hub, sweep)
    with pytest.raises((HubError, SaeError), match=message):
        Sae.load(address)
    assert not hub.downloads


def test_a_file_of_a_repository_is_loaded_with_what_describes_it(hub, tmp_path):
    folder = tmp_path / "set"
    for layer in range(2):
        sae = make(layer, "jumprelu")
        parts = {name: value.detach() for name, value in sae.named_parameters()}
        metadata = {"hook_name_out": f"blocks.{layer}.mlp_out", "model_name": "m"}
        Sae("jumprelu_transcoder", parts, hook_point=f"blocks.{layer}.mlp_in", metadata=metadata).save(
            folder, "circuit-tracer"
        )
    published(hub, folder)
    sae = Sae.load("hf://me/demo/layer_1.safetensors")
    assert sae.reads == ("blocks.1.mlp_in",)
    assert {path for path, _ in hub.downloads} == {"layer_1.safetensors", "config.yaml"}
    with pytest.raises(SaeError, match="holds 2 SAEs; name one, such as 'hf://me/demo/layer_0"):
        Sae.load("hf://me/demo")


@pytest.mark.parametrize("gemma", [True, False])
def test_a_set_that_lists_addresses_is_loaded_from_them(gemma, hub, tmp_path, capsys):
    saes, uris = [], []
    repository = "google/gemma-scope-2b-pt-transcoders" if gemma else "me/parts"
    for layer in range(2):
        parts = {name: value.detach() for name, value in make(layer, "jumprelu").named_parameters()}
        metadata = {"hook_name_out": f"blocks.{layer}.mlp_out", "model_name": "m"}
        reads = "mlp_in_normalized" if gemma else "mlp_in"
        saes.append(Sae("jumprelu_transcoder", parts, hook_point=f"blocks.{layer}.{reads}", metadata=metadata))
        folder = tmp_path / "parts" / (f"layer_{layer}/width_16k/average_l0_7" if gemma else f"x{layer}")
        saes[-1].save(folder, "gemma-scope" if gemma else "circuit-tracer")
        name = f"{folder.relative_to(tmp_path / 'parts')}/{'params.npz' if gemma else f'layer_{layer}.safetensors'}"
        uris.append(f"hf://{repository}/{name}{'?revision=main' if layer else ''}")
    published(hub, tmp_path / "parts", repository)
    config = {"model_name": "m", "model_kind": "transcoder_set", "feature_output_hook": "hook_mlp_out"}
    config |= {"feature_input_hook": "mlp.hook_in", "transcoders": uris}
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "config.yaml").write_text(yaml.safe_dump(config))
    published(hub, tmp_path / "set", "me/set")
    x = torch.randn(5, saes[0].d_in, generator=torch.Generator().manual_seed(0))
    for source in ("hf://me/set", str(tmp_path / "set")):
        found, notes = walk_saes(locate_source(source, several=True).path)
        loaded = [Sae.load(path) for _, path in found]
        assert not notes
        assert [sae.reads for sae in loaded] == [sae.reads for sae in saes]
        for sae, ours in zip(loaded, saes, strict=True):
            torch.testing.assert_close(sae(x), ours(x), rtol=1e-5, atol=1e-5)
        assert main(["info", source]) == 0
        assert "blocks.1.mlp_out" in capsys.readouterr().out
        with pytest.raises(SaeError, match="lists 2 SAEs; name one, such as 'hf://"):
            Sae.load(source)
    (tmp_path / "set" / "config.yaml").write_text(yaml.safe_dump(config | {"transcoders": ["/else/layer_0.npz"]}))
    with pytest.raises(SaeError, match=r"lists '/else/layer_0.npz', expected hf://USER/REPO/FILE"):
        Sae.load(tmp_path / "set")


def test_what_cannot_be_pushed_is_refused(sweep, hub, token, tmp_path, capsys):
    Sae.load(sweep / "topk-k2").save(tmp_path / "other" / "sae", "sparsify")
    for arguments, message in (
        ([str(tmp_path / "other"), "--repo", "me/demo"], "is of the format sparsify"),
        ([str(sweep), "--repo", "demo"], "expected --repo USER/NAME"),
        ([str(tmp_path / "none"), "--repo", "me/demo"], "no folder"),
        ([str(sweep), "--repo", "me/demo", "--evaluation", str(tmp_path)], "no metrics.json in"),
    ):
        assert main(["push", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert hub.repositories == {}
    with pytest.raises(MissingFileError):
        Sae.load(Path("hf_no_such_folder"))


def test_stages_take_what_is_on_the_hub(sweep, hub):
    published(hub, sweep)
    assert [path.name for path in sae_folders("hf://me/demo")] == ["topk-k2", "topk-k10"]
    assert [path.name for path in sae_folders(["hf://me/demo/topk-k10"])] == ["topk-k10"]
    expected = Sae.load(sweep / "topk-k10").W_enc
    assert torch.equal(read_trained_sae("hf://me/demo", "topk-k10").W_enc, expected)
    assert torch.equal(read_trained_sae("hf://me/demo/topk-k10", "another").W_enc, expected)


def test_names_that_lead_out_of_a_folder_are_refused(sweep, hub, tmp_path):
    published(hub, sweep)["topk-k2/../../../evil.json"] = b"{}"
    with pytest.raises(HubError, match=r"has a file named 'topk-k2/\.\./\.\./\.\./evil\.json', which leads out"):
        Sae.load("hf://me/demo/topk-k2")
    assert not list(tmp_path.rglob("evil.json"))
    assert not hub.downloads
