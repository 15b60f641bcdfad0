"""Cross-layer transcoders as they are saved and loaded, and what their files may not hold."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from thresher.shared.core.errors import SaeError
from thresher.shared.sae import CrossLayerTranscoder, Sae

N, D_SAE, D_IN, D_OUT = 3, 8, 4, 5
READS = [f"blocks.{i}.mlp_in" for i in range(N)]
WRITES = [f"blocks.{i}.mlp_out" for i in range(N)]


def make(activation="jumprelu", **config):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {}
    for i in range(N):
        tensors |= {f"W_enc_{i}": random(D_SAE, D_IN), f"b_enc_{i}": random(D_SAE)}
        tensors |= {f"W_dec_{i}": random(D_SAE, N - i, D_OUT), f"b_dec_{i}": random(D_OUT)}
        if activation == "jumprelu":
            tensors[f"threshold_{i}"] = random(D_SAE).abs()
    keys = {"reads": READS, "writes": WRITES, "activation": activation}
    return CrossLayerTranscoder(tensors, config=keys | config, metadata={"model_name": "m"})


@pytest.fixture
def folder(tmp_path):
    return make().save(tmp_path / "sae")


def test_it_is_loaded_as_it_was_saved(folder):
    sae, saved = make(), Sae.load(folder)
    assert isinstance(saved, CrossLayerTranscoder)
    assert (saved.sizes, saved.reads, saved.writes) == ((N, D_SAE, D_IN, D_OUT), tuple(READS), tuple(WRITES))
    assert saved.metadata == {"model_name": "m"}
    x = torch.randn(2, 6, N * D_IN)
    torch.testing.assert_close(saved(x), sae(x))
    assert saved(x).shape == (2, 6, N * D_OUT)
    torch.testing.assert_close(saved(x)[1], sae(x[1]))


def test_few_and_many_active_latents_decode_alike():
    """Where few fire, only their decoder rows are read."""
    sae = make()
    few = torch.zeros(40, N * D_SAE)
    few[::5, 3], few[7, 12], few[9, 20] = 1.5, 0.5, 2.0
    tensors = {name: tensor.double() for name, tensor in sae.named_parameters()}
    for latents in (few, torch.rand(40, N * D_SAE)):
        expected = []
        for target in range(N):
            y_hat = tensors[f"b_dec_{target}"].expand(40, -1)
            for layer in range(target + 1):
                acts = latents[:, layer * D_SAE : (layer + 1) * D_SAE].double()
                y_hat = y_hat + acts @ tensors[f"W_dec_{layer}"][:, target - layer]
            expected.append(y_hat)
        torch.testing.assert_close(sae.decode(latents).double(), torch.cat(expected, 1), rtol=1e-5, atol=1e-5)


def test_folding_norms_leaves_reconstructions():
    sae, x = make(), torch.randn(20, N * D_IN)
    before = sae(x)
    sae.fold_decoder_norm()
    torch.testing.assert_close(sae.decoder_norms().square().sum(1), torch.ones(N * D_SAE))
    torch.testing.assert_close(sae(x), before, rtol=1e-4, atol=1e-4)
    with pytest.raises(SaeError, match="would change which latents fire"):
        make("topk", k=3).fold_decoder_norm()


def test_latents_of_all_layers_cannot_be_chosen_by_one():
    with pytest.raises(SaeError, match="cannot be chosen from what one layer reads"):
        make("topk", k=3).encode_layer(0, torch.randn(5, D_IN))


def change_config(folder, **keys):
    saved = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(saved | keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"activation": "gelu"}, "has activation 'gelu', expected one of: relu, jumprelu, topk"),
        ({"activation": "topk"}, "has k None, expected a whole number"),
        ({"activation": "topk", "k": 25, "select_over": "all"}, "k is 25, expected 1 to d_sae = 24"),
        ({"activation": "topk", "k": 9, "select_over": "layer"}, "k is 9, expected 1 to d_sae = 8"),
        ({"activation": "relu"}, "its weights file has threshold_0"),
        ({"reads": READS[:2]}, "expected the names of 3 hook points"),
        ({"d_out": 6}, "W_dec_0 is .* expected floating-point numbers of shape .8, 3, 6. from cfg.json"),
        ({"affine_connection": True}, "has affine_connection = True, which this version does not know"),
    ],
)
def test_what_does_not_fit_is_refused(folder, keys, message):
    change_config(folder, **keys)
    with pytest.raises(SaeError, match=message):
        Sae.load(folder)


def test_a_missing_tensor_is_named(folder):
    tensors = load_file(folder / "sae_weights.safetensors")
    del tensors["b_dec_2"]
    save_file(tensors, folder / "sae_weights.safetensors")
    with pytest.raises(SaeError, match="its weights file lacks b_dec_2"):
        Sae.load(folder)


def test_another_sae_is_not_loaded_as_one(tmp_path):
    tensors = {"W_enc": torch.randn(4, 6), "b_enc": torch.zeros(6), "W_dec": torch.randn(6, 4), "b_dec": torch.zeros(4)}
    Sae("standard", tensors, hook_point="h").save(tmp_path / "sae")
    with pytest.raises(SaeError, match="expected a cross-layer transcoder, got a 'standard' SAE"):
        CrossLayerTranscoder.load(tmp_path / "sae")
