"""Short names of releases, from the registry file of SAELens, which is not imported."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from thresher.shared.core.errors import ConfigError, SaeError
from thresher.shared.hub.address import HubAddress, is_hub_address, parse_address, repository_address
from thresher.shared.sae import Sae
from thresher.shared.sae.formats import read_sae
from thresher.shared.sae.sources.releases import find_release

REGISTRY = """
gemma-scope-2b-pt-res:
  conversion_func: gemma_2
  model: gemma-2-2b
  repo_id: google/gemma-scope-2b-pt-res
  saes:
  - id: layer_12/width_16k/average_l0_82
    path: layer_12/width_16k/average_l0_82
    l0: 82
    variance_explained: 0.79
    neuronpedia: gemma-2-2b/12-gemmascope-res-16k
gemma-scope-2b-pt-res-canonical:
  conversion_func: gemma_2
  model: gemma-2-2b
  repo_id: google/gemma-scope-2b-pt-res
  saes:
  - id: layer_12/width_16k/canonical
    path: layer_12/width_16k/average_l0_82
    l0: 82
mistral-7b-res-wg:
  config_overrides:
    normalize_activations: constant_norm_rescale
    model_from_pretrained_kwargs:
      center_writing_weights: true
  model: mistral-7b
  repo_id: me/demo
  saes:
  - id: by-row
    path: layer_8
  - id: by-average
    path: layer_9
    norm_scaling_factor: 1.5
"""


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A package of SAELens's name that fails when it is imported, with a registry file."""
    (tmp_path / "sae_lens").mkdir()
    (tmp_path / "sae_lens" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "sae_lens" / "pretrained_saes.yaml").write_text(REGISTRY)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


@pytest.mark.parametrize("end", ["average_l0_82", "canonical"])
def test_a_release_is_found_by_its_name(end, registry):
    release = find_release(f"gemma-scope-2b-pt-res/layer_12/width_16k/{end}")
    assert release is not None
    assert release.address == HubAddress("google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82")
    figures = {"l0": 82, "explained_variance": 0.79} if end != "canonical" else {"l0": 82}
    assert release.metadata["published"] == figures
    assert release.metadata["model_name"] == "gemma-2-2b"
    assert "sae_lens" not in sys.modules


@pytest.mark.peers
def test_the_registry_of_the_installed_saelens_is_read_without_importing_it(monkeypatch):
    (file,) = Path(__file__).parents[3].glob(".venv-peers/lib/python3*/site-packages/sae_lens/pretrained_saes.yaml")
    monkeypatch.setattr(sys, "path", [str(file.parents[1]), *sys.path])
    whole = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)
    for release in list(whole)[::12]:
        first, last = whole[release]["saes"][0], whole[release]["saes"][-1]
        for sae in (first, last):
            found = find_release(f"{release}/{sae['id']}")
            assert found.address == HubAddress(whole[release]["repo_id"], sae["path"])
            assert found.metadata["model_name"] == whole[release]["model"]
    address = find_release("gemma-scope-2b-pt-res/layer_12/width_16k/canonical").address
    assert address.path.startswith("layer_12/width_16k/average_l0_")
    assert "sae_lens" not in sys.modules


def test_settings_of_the_registry_go_to_reading(registry):
    release = find_release("mistral-7b-res-wg/by-average")
    assert release.stated == {"normalize_activations": "constant_norm_rescale", "norm_scaling_factor": 1.5}
    assert release.metadata["model_from_pretrained_kwargs"] == {"center_writing_weights": True}


@pytest.mark.parametrize("given", ["expected_average_only_in", True, "none"])
def test_a_factor_that_the_registry_states_is_folded(given, tmp_path):
    """As SAELens folds it: only where the file says that rows are scaled, and does not say by what."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (6, 12), "b_enc": (12,), "W_dec": (12, 6), "b_dec": (6,)}
    tensors = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    Sae("standard", tensors, hook_point="blocks.1.resid_post").save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text()) | {"normalize_activations": given}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    stated = {"norm_scaling_factor": 1.5}
    parts = read_sae(tmp_path, stated=stated)
    factor, x = (1.0 if given == "none" else 1.5), torch.randn(9, 6, generator=draw, dtype=torch.float64)
    f = ((x * factor - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]).relu()
    expected = (f @ tensors["W_dec"] + tensors["b_dec"]) / factor
    sae = Sae(parts.architecture, parts.tensors, config=parts.config)
    torch.testing.assert_close(sae(x.float()).double(), expected, rtol=1e-4, atol=1e-4)
    assert len(parts.folded) == (given != "none")
    by_row = read_sae(tmp_path, stated={"normalize_activations": "constant_norm_rescale"})
    assert by_row.config["normalize_activations"] == "constant_norm_rescale"


def test_what_is_not_in_the_registry(registry):
    assert find_release("another/layer_12") is None
    with pytest.raises(SaeError, match="has no SAE 'layer_1'; expected one of 2, such as layer_12/width_16k/average"):
        find_release("gemma-scope-2b-pt-res/layer_1")


def test_addresses_are_taken_apart_and_put_together():
    address = parse_address("hf://me/some-repo/a/b@v1.0")
    assert address == HubAddress("me/some-repo", "a/b", "v1.0")
    assert str(address) == "hf://me/some-repo/a/b@v1.0"
    assert parse_address("hf:/me/repo") == HubAddress("me/repo")
    assert parse_address("hf://datasets/me/repo/x") == HubAddress("me/repo", "x", "", "dataset")
    assert str(parse_address("hf://datasets/me/repo@main")) == "hf://datasets/me/repo@main"
    assert not is_hub_address("s3://bucket/x")
    assert repository_address("me/repo", "dataset") == HubAddress("me/repo", kind="dataset")
    for name, message in (
        ("me", "is not a repository on the Hub; expected --repo USER/NAME"),
        ("me/repo/x", "is more than a repository"),
        ("me/repo@v1", "is more than a repository"),
        ("datasets/me/repo", "is more than a repository"),
    ):
        with pytest.raises(ConfigError, match=message):
            repository_address(name)
