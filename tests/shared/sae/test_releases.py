"""Short names of releases, from the registry file of SAELens, which is not imported."""

import sys

import pytest

from thresher.shared.core.errors import SaeError
from thresher.shared.hub.address import HubAddress, is_hub_address, parse_address
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
