"""Published files, laid out as their releases are: values against the releases' definitions, and what is refused."""

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from thresher.shared.core.errors import MissingFileError, SaeError
from thresher.shared.sae import CrossLayerTranscoder, Sae

D, N, LAYERS = 8, 20, 3


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * len(shape)))


def gemma(d_out=D):
    return {
        "W_enc": random(D, N),
        "b_enc": random(N),
        "W_dec": random(N, d_out),
        "b_dec": random(d_out),
        "threshold": random(N).abs(),
    }


def write_npz(folder, arrays):
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})
    return folder


def expected(tensors, x):
    t = {name: tensor.double() for name, tensor in tensors.items()}
    pre_acts = x.double() @ t["W_enc"] + t["b_enc"]
    return (pre_acts * (pre_acts > t["threshold"])) @ t["W_dec"] + t["b_dec"]


def close(value, wanted):
    torch.testing.assert_close(value.detach().double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("path", "reads", "writes", "model"),
    [
        ("gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", "12.resid_post", "12.resid_post", "gemma-2-2b"),
        ("gemma-scope-9b-it-res/layer_9/width_16k/canonical", "9.resid_post", "9.resid_post", "gemma-2-9b-it"),
        ("gemma-scope-2b-pt-mlp/layer_3/width_65k/average_l0_9", "3.mlp_out", "3.mlp_out", "gemma-2-2b"),
        ("models--google--gemma-scope-2b-pt-att/snapshots/ab/layer_0/width_1m/x", "0.attn_z", "0.attn_z", "gemma-2-2b"),
        ("gemma-scope-2b-pt-transcoders/layer_5/x", "5.mlp_in_normalized", "5.mlp_out", "gemma-2-2b"),
    ],
)
def test_gemma_scope_is_placed_by_its_path(path, reads, writes, model, rows, tmp_path):
    tensors = gemma()
    old = {name.replace("W_", "w_"): tensor for name, tensor in tensors.items()}
    folder = write_npz(tmp_path / path, old if "mlp" in path else tensors)
    for source in (folder, folder / "params.npz"):
        sae = Sae.load(source)
        assert (sae.reads, sae.writes) == ((f"blocks.{reads}",), (f"blocks.{writes}",))
        assert sae.metadata["model_name"] == f"google/{model}"
        close(sae(rows()), expected(tensors, rows()))
    assert Sae.load(folder).metadata.get("published") == ({"l0": int(path[-2:].strip("_"))} if "l0" in path else None)


def test_gemma_scope_embeddings_are_of_the_stream(rows, tmp_path):
    tensors = gemma()
    folder = write_npz(tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6", tensors)
    sae = Sae.load(folder)
    root = D**0.5
    close(sae(rows() * root), expected(tensors, rows()) * root)
    assert sae.reads == ("blocks.0.resid_pre",)
    assert "sqrt(d_in)" in sae.folded[0]


def write_gemma_2(folder, tensors, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    names = {"W_enc": "w_enc", "W_dec": "w_dec", "affine": "affine_skip_connection"}
    save_file({names.get(name, name): tensor for name, tensor in tensors.items()}, folder / "params.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_gemma_scope_2_is_placed_by_its_configuration_or_path(rows, tmp_path):
    repository, tensors, x = tmp_path / "google--gemma-scope-2-1b-pt", gemma(), rows()
    for site, reads in (("resid_post", "resid_post"), ("attn_out_all", "attn_z"), ("mlp_out", "mlp_out")):
        sae = Sae.load(write_gemma_2(repository / site / "layer_4_width_16k_l0_small", tensors))
        assert sae.reads == sae.writes == (f"blocks.4.{reads}",)
        assert sae.metadata["model_name"] == "google/gemma-3-1b-pt"
        close(sae(x), expected(tensors, x))
    affine = random(D, D, seed=9)
    folder = write_gemma_2(
        repository / "transcoder" / "layer_4_width_16k_l0_small_affine", tensors | {"affine": affine}
    )
    sae = Sae.load(folder)
    assert (sae.reads, sae.writes, sae.architecture) == (
        ("blocks.4.mlp_in",),
        ("blocks.4.mlp_out",),
        "jumprelu_skip_transcoder",
    )
    close(sae(x), expected(tensors, x) + x.double() @ affine.double())
    config = {
        "architecture": "jump_relu",
        "hf_hook_point_in": "model.layers.9.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.9.post_feedforward_layernorm.output",
        "model_name": "gemma-v3-270m-pt",
        "l0": 60,
        "affine_connection": False,
    }
    sae = Sae.load(write_gemma_2(tmp_path / "any", tensors, config))
    assert (sae.reads, sae.writes) == (("blocks.9.mlp_in",), ("blocks.9.mlp_out",))
    assert sae.metadata["model_name"] == "google/gemma-3-270m"
    assert sae.metadata["published"] == {"l0": 60}
    for change, message in (
        ({"scale": 2.0}, "has scale = 2.0, which this version does not know"),
        ({"architecture": "topk"}, "has architecture 'topk', expected 'jump_relu'"),
        ({"hf_hook_point_in": "model.layers.9.mlp.output"}, "is not known; expected one of: model.layers.N.output"),
        ({"affine_connection": True}, "has affine_connection True, and its weights say False"),
    ):
        with pytest.raises(SaeError, match=message):
            Sae.load(write_gemma_2(tmp_path / "any", tensors, config | change))


def layers(n=LAYERS, affine=False, causal=True):
    found = []
    for i in range(n):
        W_dec = random(N, n, D, seed=i)
        if causal:
            W_dec[:, :i] = 0
        layer = {"w_enc": random(D, N, seed=i), "w_dec": W_dec, "b_enc": random(N, seed=i), "b_dec": random(D, seed=i)}
        layer["threshold"] = random(N, seed=i).abs()
        layer |= {"affine_skip_connection": random(D, D, seed=20 + i)} if affine else {}
        found.append(layer)
    return found


def write_layers(folder, found):
    folder.mkdir(parents=True)
    for i, layer in enumerate(found):
        save_file(layer, folder / f"params_layer_{i}.safetensors")
    return folder


def multi_layer(found, x):
    """Return the estimate of all layers by the release's own sums over layers, in float64."""
    w_enc, w_dec, b_enc, b_dec, threshold = (
        torch.stack([layer[name].double() for layer in found])
        for name in ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
    )
    x = x.double().view(len(x), len(found), D)
    pre_acts = torch.einsum("bld,ldf->blf", x, w_enc) + b_enc
    y = torch.einsum("blf,lfmd->bmd", pre_acts.relu() * (pre_acts > threshold), w_dec) + b_dec
    if "affine_skip_connection" in found[0]:
        affine = torch.stack([layer["affine_skip_connection"].double() for layer in found])
        y = y + torch.einsum("bld,lde->ble", x, affine)
    return y.flatten(1)


@pytest.mark.parametrize("affine", [False, True])
def test_gemma_scope_2_layers_are_one_sae(affine, rows, tmp_path):
    x, found = rows(LAYERS * D), layers(affine=affine, causal=False)
    folder = write_layers(tmp_path / "crosscoder" / "layer_7_13_22_width_65k_l0_medium", found)
    crosscoder = Sae.load(folder)
    assert crosscoder.reads == ("blocks.7.resid_post", "blocks.13.resid_post", "blocks.22.resid_post")
    close(crosscoder(x), multi_layer(found, x))
    crosscoder.save(tmp_path / "again", "gemma-scope-2")
    for i, layer in enumerate(found):
        again = load_file(tmp_path / "again" / f"params_layer_{i}.safetensors")
        assert all(torch.equal(again[name], layer[name]) for name in layer)
    close(Sae.load(tmp_path / "again")(x), multi_layer(found, x))
    found = layers(affine=affine)
    clt = Sae.load(write_layers(tmp_path / "clt" / "width_262k_l0_big", found))
    assert isinstance(clt, CrossLayerTranscoder)
    assert clt.reads == tuple(f"blocks.{i}.mlp_in" for i in range(LAYERS))
    close(clt(x), multi_layer(found, x))


def test_gemma_scope_2_layers_that_do_not_fit_are_refused(rows, tmp_path):
    clt = tmp_path / "clt"
    with pytest.raises(SaeError, match="has decoders from layer 1 to earlier layers of norm"):
        Sae.load(write_layers(clt / "a", layers(causal=False)))
    (write_layers(clt / "b", layers()) / "params_layer_1.safetensors").unlink()
    with pytest.raises(SaeError, match=r"has params_layer files \[0, 2\], expected every number from 0"):
        Sae.load(clt / "b")
    with pytest.raises(SaeError, match="is a crosscoder or a cross-layer transcoder; expected it in a folder named"):
        Sae.load(write_layers(tmp_path / "some" / "width_1m", layers()))
    with pytest.raises(SaeError, match="whose path does not say which"):
        Sae.load(write_layers(tmp_path / "crosscoder" / "layer_7_13_width", layers()))
    found = layers()
    found[1]["w_dec"] = found[1]["w_dec"][:, :2].contiguous()
    with pytest.raises(SaeError, match=r"W_dec of layer 1 is .* of shape \(20, 2, 8\), expected .* \(20, 3, 8\)"):
        Sae.load(write_layers(clt / "c", found))


def write_llama_scope(folder, **changes):
    settings = {
        "d_model": D,
        "d_sae": N,
        "hook_point_in": "blocks.5.hook_resid_mid",
        "hook_point_out": "blocks.5.hook_mlp_out",
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 64.0, "out": 4.0},
        "jump_relu_threshold": 0.3,
        "sparsity_include_decoder_norm": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "use_decoder_bias": True,
        "lr": None,
    }
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "hyperparams.json").write_text(json.dumps(settings | changes))
    tensors = gemma()
    saved = {
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "encoder.bias": tensors["b_enc"],
        "decoder.weight": torch.nn.functional.normalize(tensors["W_dec"], dim=1).T.contiguous(),
        "decoder.bias": tensors["b_dec"],
    }
    save_file({name: tensor.bfloat16() for name, tensor in saved.items()}, folder / "checkpoints" / "final.safetensors")
    return folder


def test_llama_scope_transcoders_have_two_factors(rows, tmp_path):
    """The threshold is of raw activations: latents of scaled rows fire above it times the factor of what is read."""
    folder, x = write_llama_scope(tmp_path / "Llama3_1-8B-Base-L5TC-8x"), rows().double() * 20
    sae = Sae.load(folder)
    saved = {name: tensor.double() for name, tensor in load_file(folder / "checkpoints" / "final.safetensors").items()}
    s_in, s_out = D**0.5 / 64, D**0.5 / 4
    pre_acts = (x * s_in) @ saved["encoder.weight"].T + saved["encoder.bias"]
    norms = saved["decoder.weight"].norm(dim=0)
    latents = pre_acts.relu() * (pre_acts * norms > 0.3 * s_in)
    y = (latents @ saved["decoder.weight"].T + saved["decoder.bias"]) / s_out
    close(sae.encode(x.float()), latents)
    close(sae(x.float()), y)
    assert (sae.reads, sae.writes) == (("blocks.5.resid_mid",), ("blocks.5.mlp_out",))
    assert sae.metadata["model_name"] == "meta-llama/Llama-3.1-8B"
    assert len(sae.folded) == 2
    for change, message in (
        ({"norm_activation": "token-wise"}, "has norm_activation 'token-wise'"),
        ({"dataset_average_activation_norm": {"in": 64.0}}, "dataset_average_activation_norm of 'out' None"),
        ({"jump_relu_threshold": -1}, "has jump_relu_threshold -1, expected a number above 0"),
        ({"act_fn": "topk"}, "has the activation 'topk'"),
        ({"rotation": 3}, "has rotation = 3"),
        ({"apply_decoder_bias_to_pre_encoder": True}, "subtracts its decoder's bias"),
    ):
        with pytest.raises(SaeError, match=message):
            Sae.load(write_llama_scope(folder, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "batchtopk"}, "has act_fn 'batchtopk', which chooses among the rows of a batch"),
        ({"norm_activation": "batch-wise"}, "which scales by the norms of a batch"),
        (
            {"norm_activation": "token-wise", "hook_point_out": "blocks.4.hook_mlp_out"},
            "scaled by the norm of the row that it estimates",
        ),
        ({"norm_activation": "dataset-wise"}, "dataset_average_activation_norm.blocks.4.hook_resid_post None"),
        ({"sae_type": "lorsa"}, "has sae_type 'lorsa', expected 'sae' or 'clt'"),
        ({"use_glu_encoder": True}, "has use_glu_encoder = True"),
        ({"new_gate": 1}, "has new_gate = 1"),
    ],
)
def test_language_model_saes_that_compute_otherwise_are_refused(change, message, make_sae, tmp_path):
    folder = make_sae("jumprelu").save(tmp_path / "sae", "llamascopium")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(SaeError, match=message):
        Sae.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_input_hook": None}, "lacks feature_input_hook or feature_output_hook"),
        ({"activation": "topk"}, "has activation 'topk', and its weights have thresholds"),
        ({"normalize": "layer"}, "has normalize = 'layer'"),
    ],
)
def test_circuit_tracer_settings_that_change_the_function_are_refused(change, message, make_sae, tmp_path):
    folder = make_sae("jumprelu_transcoder").save(tmp_path / "set", "circuit-tracer")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | change))
    with pytest.raises(SaeError, match=message):
        Sae.load(folder / "layer_4.safetensors")


def test_circuit_tracer_thresholds_below_zero_are_refused(make_sae, tmp_path):
    folder = make_sae("jumprelu_transcoder").save(tmp_path / "set", "circuit-tracer")
    tensors = load_file(folder / "layer_4.safetensors")
    tensors["activation_function.threshold"][0] = -0.1
    save_file(tensors, folder / "layer_4.safetensors")
    with pytest.raises(SaeError, match="has a threshold below zero"):
        Sae.load(folder / "layer_4.safetensors")
    with pytest.raises(MissingFileError):
        Sae.load(folder / "layer_9.safetensors")


def test_circuit_tracer_topk_is_read(rows, make_sae, tmp_path):
    folder, x = make_sae("transcoder").save(tmp_path / "set", "circuit-tracer"), rows()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    t = {name: tensor.double() for name, tensor in load_file(folder / "layer_4.safetensors").items()}
    pre_acts = x.double() @ t["W_enc"].T + t["b_enc"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"activation": "topk", "k": 3}))
    sae = Sae.load(folder / "layer_4.safetensors")
    latents = pre_acts.relu() * (pre_acts >= pre_acts.topk(3).values[:, -1:])
    close(sae.encode(x), latents)
    close(sae(x), latents @ t["W_dec"] + t["b_dec"])
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"activation": "topk"}))
    with pytest.raises(SaeError, match="has k None, expected a whole number"):
        Sae.load(folder / "layer_4.safetensors")


def test_qwen_scope_has_its_k_in_its_name(rows, tmp_path):
    tensors, x = gemma(), rows()
    saved = {"W_enc": tensors["W_enc"].T, "W_dec": tensors["W_dec"].T} | {n: tensors[n] for n in ("b_enc", "b_dec")}
    folder = tmp_path / "models--Qwen--SAE-Res-Qwen3-1.7B-Base-W32K-L0_5" / "snapshots" / "ab"
    folder.mkdir(parents=True)
    torch.save(saved, folder / "layer11.sae.pt")
    sae = Sae.load(folder / "layer11.sae.pt")
    pre_acts = x.double() @ tensors["W_enc"].double() + tensors["b_enc"].double()
    latents = pre_acts.relu() * (pre_acts >= pre_acts.topk(5).values[:, -1:])
    close(sae(x), latents @ tensors["W_dec"].double() + tensors["b_dec"].double())
    assert (sae.reads, sae.metadata["model_name"]) == (("blocks.11.resid_post",), "Qwen/Qwen3-1.7B-Base")
    torch.save(saved, tmp_path / "layer11.sae.pt")
    with pytest.raises(SaeError, match="whose k is in the name of its repository"):
        Sae.load(tmp_path / "layer11.sae.pt")


def openai_model(tensors, x, k=None):
    """Return latents and reconstruction as `Autoencoder` of openai/sparse_autoencoder defines them, in float64.

    With TopK, `Autoencoder.from_state_dict` sets `normalize`: LN before encoding, undone without its epsilon.
    """
    t, x = {name: tensor.double() for name, tensor in tensors.items()}, x.double()
    mean, deviation = 0, 1
    if k:
        mean = x.mean(-1, keepdim=True)
        deviation = (x - mean).std(-1, keepdim=True)
        x = (x - mean) / (deviation + 1e-5)
    pre_acts = torch.nn.functional.linear(x - t["pre_bias"], t["encoder.weight"], t["latent_bias"])
    latents = pre_acts.relu()
    if k:
        chosen = pre_acts.topk(k)
        latents = torch.zeros_like(pre_acts).scatter(-1, chosen.indices, chosen.values.relu())
    return latents, (latents @ t["decoder.weight"].T + t["pre_bias"]) * deviation + mean


def test_openai_saes_are_read(rows, tmp_path):
    tensors, x = gemma(), 4 * rows() + 1
    saved = {
        "pre_bias": tensors["b_dec"],
        "latent_bias": tensors["b_enc"],
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "decoder.weight": tensors["W_dec"].T.contiguous(),
        "stats_last_nonzero": torch.zeros(N, dtype=torch.int64),
        "latents_activation_frequency": torch.ones(N),
        "latents_mean_square": torch.zeros(N),
    }
    folder = tmp_path / "resid_post_mlp_v5_32k" / "autoencoders"
    folder.mkdir(parents=True)
    topk = {"activation": "TopK", "activation_state_dict": {"k": 3, "postact_fn": "ReLU"}}
    for content, k in (({"activation": "ReLU", "activation_state_dict": {}}, None), (topk, 3)):
        torch.save(OrderedDict(saved | content), folder / "6.pt")
        sae = Sae.load(folder / "6.pt")
        latents, x_hat = openai_model(saved, x, k)
        close(sae.encode(x), latents)
        close(sae(x), x_hat)
        close(sae.decode(sae.encode(x), x), x_hat)
        assert (sae.reads, sae.metadata["model_name"]) == (("blocks.6.resid_post",), "gpt2")
        assert sae.normalize_activations == ("layer_norm" if k else "none")
        close(Sae.load(sae.save(tmp_path / f"saelens {k}"))(x), x_hat)
    for content, message in (
        ({"activation": "Identity"}, "has activation 'Identity', expected 'ReLU' or 'TopK'"),
        ({"activation_state_dict": {"k": 3, "postact_fn": "Identity"}}, "postact_fn 'Identity', with which latents"),
        ({"activation_state_dict": {"k": 99}}, "k is 99, expected 1 to d_sae"),
        ({"activation_state_dict": {"k": 3, "gate": 2}}, "has gate = 2"),
    ):
        torch.save(saved | topk | content, folder / "6.pt")
        with pytest.raises(SaeError, match=message):
            Sae.load(folder / "6.pt")
    torch.save({"A": torch.zeros(2)}, folder / "7.pt")
    with pytest.raises(SaeError, match="has the tensors A, which are no known format's"):
        Sae.load(folder / "7.pt")


@pytest.mark.parametrize("damage", ["pickle", "cut", "bomb", "nan", "empty"])
def test_damaged_npz_files_are_refused(damage, tmp_path):
    folder = write_npz(tmp_path / "sae", gemma())
    path = folder / "params.npz"
    arrays = {name: tensor.numpy() for name, tensor in gemma().items()}
    if damage == "pickle":
        np.savez(path, **(arrays | {"threshold": np.array([{"x": 1}], dtype=object)}), allow_pickle=True)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "bomb":
        np.savez_compressed(path, **(arrays | {"W_enc": np.zeros((D, 1_000_000), np.float32)}))
    elif damage == "nan":
        arrays["W_dec"][1, 1] = np.nan
        np.savez(path, **arrays)
    else:
        path.write_bytes(b"")
    with pytest.raises(SaeError, match="is damaged: "):
        Sae.load(folder)


def is_mapped(tensor, path):
    """Return whether a tensor lies in a part of memory that is a file's."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < stop:
            return line.endswith(str(path))
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="memory maps are listed on Linux alone")
def test_weights_stay_in_the_file_until_they_are_used(rows, tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in gemma().items()}
    folder = write_gemma_2(tmp_path / "resid_post" / "layer_4_width_16k_l0_small", tensors)
    sae = Sae.load(folder, dtype=None)
    assert sae.W_enc.dtype == torch.bfloat16
    assert all(is_mapped(tensor, folder / "params.safetensors") for tensor in sae.parameters())
    assert not is_mapped(Sae.load(folder).W_dec, folder / "params.safetensors")
    converted = Sae.load(folder, dtype=torch.float64)
    assert converted.W_dec.dtype == torch.float64
    x = rows()
    torch.testing.assert_close(converted(x), expected({n: t.float() for n, t in tensors.items()}, x))
    assert Sae.load(folder, device="meta").W_dec.device.type == "meta"
