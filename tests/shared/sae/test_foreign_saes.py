"""SAEs that other libraries saved: read as they compute, or refused by the name of what is not understood."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from thresher.shared import Sae
from thresher.shared.core.errors import MissingFileError, SaeError, ThresherError

D, N = 6, 10
SAELENS_5 = {
    "architecture": "standard", "d_in": D, "d_sae": N, "dtype": "torch.float32", "device": "cpu",
    "model_name": "gpt2-small", "hook_name": "blocks.1.hook_resid_post", "hook_layer": 1, "hook_head_index": None,
    "activation_fn_str": "relu", "activation_fn_kwargs": {}, "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False, "normalize_activations": "none", "sae_lens_training_version": "3.22.1",
    "prepend_bos": True, "context_size": 128, "dataset_path": "a/b", "dataset_trust_remote_code": True,
    "neuronpedia_id": None, "model_from_pretrained_kwargs": {}, "seqpos_slice": [None],
}  # fmt: skip
SAELENS_6 = {
    "architecture": "standard", "d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu",
    "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
    "metadata": {"sae_lens_version": "6.54.0", "hook_name": "blocks.1.hook_resid_post", "model_name": "m",
    "other": 3},
}  # fmt: skip
TOPK = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}


def weights(*others, d_out=D):
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, d_out), "b_dec": (d_out,), "W_skip": (d_out, D)}
    names = ("W_enc", "b_enc", "W_dec", "b_dec", *others)
    return {name: torch.randn(shapes.get(name, (N,)), generator=generator) for name in names}


def write(folder, config, tensors, weights_name="sae_weights.safetensors", config_name="cfg.json"):
    folder.mkdir(exist_ok=True)
    (folder / config_name).write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / weights_name)
    return folder


def rows():
    return torch.randn(40, D, generator=torch.Generator().manual_seed(1))


def pre_activations(tensors, x, subtract=True):
    parts = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    return (x.double().numpy() - subtract * parts["b_dec"]) @ parts["W_enc"] + parts["b_enc"]


def decoded(latents, tensors):
    return latents @ tensors["W_dec"].double().numpy() + tensors["b_dec"].double().numpy()


def close(value, expected):
    np.testing.assert_allclose(value.detach().numpy(), expected, rtol=1e-5, atol=1e-5)


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize(
    "config",
    [
        SAELENS_5 | TOPK,
        SAELENS_5 | TOPK | {"architecture": "topk"},
        without(SAELENS_5, "architecture", "activation_fn_str")
        | {"activation_fn": "topk", "activation_fn_kwargs": {"k": 3}},
        SAELENS_5 | {"architecture": "topk", "activation_fn_kwargs": {"k": 3}},
    ],
    ids=["by activation_fn_str", "both", "no architecture", "by architecture"],
)
def test_topk_of_old_files_is_topk(config, tmp_path):
    tensors, x = weights(), rows()
    pre_acts = pre_activations(tensors, x)
    third = np.sort(pre_acts, axis=1)[:, -3:-2]
    latents = np.where(pre_acts >= third, pre_acts.clip(0), 0)
    sae = Sae.load(write(tmp_path / "sae", config, tensors))
    assert (sae.architecture, sae.config["k"]) == ("topk", 3)
    close(sae.encode(x), latents)
    close(sae(x), decoded(latents, tensors))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"normalize_activations": None},
        {"normalize_activations": False},
        {"architecture": ...},
        {"dtype": "bfloat16"},
    ],
)
def test_old_standard_files_are_read_with_their_hook_point(change, tmp_path):
    config = {key: value for key, value in (SAELENS_5 | change).items() if value is not ...}
    tensors, x = weights(), rows()
    sae = Sae.load(write(tmp_path / "sae", config, tensors))
    close(sae(x), decoded(pre_activations(tensors, x).clip(0), tensors))
    assert sae.hook_point == "blocks.1.resid_post"
    again = json.loads((sae.save(tmp_path / "again") / "cfg.json").read_text())
    assert again["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    assert again["metadata"]["model_name"] == "gpt2-small"
    assert torch.equal(Sae.load(tmp_path / "again")(x), sae(x))


def test_the_first_files_name_their_hook_point_otherwise(tmp_path):
    config = without(SAELENS_5, "hook_name", "hook_layer", "hook_head_index", "architecture", "activation_fn_str")
    config |= {
        "hook_point": "blocks.4.hook_resid_pre",
        "hook_point_layer": 4,
        "hook_point_head_index": None,
        "use_ghost_grads": True,
        "noise_scale": 0.1,
        "mse_loss_normalization": "dense_batch",
        "l1_coefficient": 8e-5,
    }
    sae = Sae.load(write(tmp_path / "sae", config, weights()))
    assert (sae.hook_point, sae.config["l1_coefficient"]) == ("blocks.4.resid_pre", 8e-5)


def test_the_scaling_factor_of_fine_tuning_is_folded(tmp_path):
    tensors, x, factor = weights(), rows(), torch.rand(N) + 0.5
    fine_tuned = SAELENS_5 | {"finetuning_scaling_factor": True}
    sae = Sae.load(write(tmp_path / "sae", fine_tuned, tensors | {"scaling_factor": factor}))
    latents = pre_activations(tensors, x).clip(0)
    close(sae.encode(x), latents)
    close(sae(x), decoded(latents * factor.double().numpy(), tensors))
    for config in (SAELENS_5, fine_tuned):
        sae = Sae.load(write(tmp_path / "sae", config, tensors | {"scaling_factor": torch.ones(N)}))
        close(sae(x), decoded(latents, tensors))
    with pytest.raises(SaeError, match="the tensor scaling_factor with finetuning_scaling_factor False, expected true"):
        Sae.load(write(tmp_path / "sae", SAELENS_5, tensors | {"scaling_factor": factor}))


def test_saes_of_heads_are_read_and_saved_as_saelens_runs_them(tmp_path):
    tensors, x = weights(), rows()
    old = SAELENS_5 | {"hook_name": "blocks.1.attn.hook_z"}
    new = SAELENS_6 | {"reshape_activations": "hook_z", "metadata": {"hook_name": "blocks.1.attn.hook_z"}}
    for config in (old, old | {"reshape_activations": "hook_z"}, new):
        sae = Sae.load(write(tmp_path / "sae", config, tensors))
        assert sae.hook_point == "blocks.1.attn_z"
        close(sae(x), decoded(pre_activations(tensors, x).clip(0), tensors))
        saved = json.loads((sae.save(tmp_path / "again") / "cfg.json").read_text())
        assert (saved["reshape_activations"], saved["metadata"]["hook_name"]) == ("hook_z", "blocks.1.attn.hook_z")
    assert (
        json.loads(
            (Sae.load(write(tmp_path / "sae", SAELENS_5, tensors)).save(tmp_path / "r") / "cfg.json").read_text()
        )["reshape_activations"]
        == "none"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, "activation_fn 'tanh-relu', which is not supported"),
        ({"activation_fn_str": "topk"}, r"has k None, expected a whole number"),
        ({"architecture": "gated"} | TOPK, "architecture 'gated' with activation_fn 'topk'"),
        ({"activation_fn_kwargs": {"k": 3}}, "activation_fn_kwargs with k, which an SAE of architecture 'standard'"),
        (TOPK | {"activation_fn_kwargs": {"k": 3, "postact_fn": "x"}}, "activation_fn_kwargs with postact_fn"),
        (TOPK | {"k": 4}, "k 4 and, in activation_fn_kwargs, 3"),
        (TOPK | {"activation_fn_kwargs": {"k": 11}}, "k is 11, expected 1 to d_sae = 10"),
        ({"k": 3}, "has k = 3, which this version does not know"),
        ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm = True, which this version does"),
        ({"normalize_activations": True}, "'expected_average_only_in', expected one of: none, layer_norm, .*; fold it"),
        ({"architecture": "abstopk"}, "has k None, expected a whole number"),
        ({"architecture": "temporal"}, "whose latents depend on the tokens before"),
        ({"architecture": "matching_pursuit"}, "has the tensor W_enc, which an SAE of architecture 'matching_pursuit'"),
        ({"architecture": "matching_pursuit", "max_iterations": 0}, "max_iterations 0, expected a whole number"),
        ({"architecture": "matching_pursuit", "residual_threshold": "x"}, "residual_threshold 'x', expected a number"),
        ({"architecture": "matching_pursuit", "stop_on_duplicate_support": 1}, "stop_on_duplicate_support 1, expected"),
        ({"max_iterations": 5}, "has max_iterations = 5, which this version does not know"),
        ({"architecture": "batchtopk"}, "a checkpoint of training that SAELens saves as jumprelu"),
        ({"normalize_activations": "covariance_whitening"}, "fold it with SAELens's fold_activation_whitening"),
        ({"normalize_activations": "constant_scalar_rescale"}, "no other is known of this kind of SAE"),
        ({"reshape_activations": "hook_z"}, "'hook_z' at hook 'blocks.1.hook_resid_post', expected one"),
        ({"reshape_activations": "heads"}, "reshape_activations 'heads'"),
        ({"hook_head_index": 3}, "hook_head_index = 3: it is of a single head"),
        ({"hook_point_head_index": 0, "hook_head_index": 0}, "hook_head_index = 0: it is of a single head"),
        ({"hook_point": "blocks.2.hook_resid_post"}, "two values of hook_name"),
        ({"metadata": {"hook_name": "blocks.2.hook_resid_post"}}, "and, in its metadata, 'blocks.2.hook_resid_post'"),
        ({"a_new_scale": 2.0}, "has a_new_scale = 2.0, which this version does not know"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"architecture": None}, "architecture 'None' is not supported"),
        ({"apply_b_dec_to_input": None}, "apply_b_dec_to_input None, expected true or false"),
        ({"d_out": 7}, "has d_out = 7"),
    ],
)  # fmt: skip
def test_what_changes_the_function_is_refused_by_name(changes, message, tmp_path):
    with pytest.raises(SaeError, match=message):
        Sae.load(write(tmp_path / "sae", SAELENS_5 | changes, weights()))


def test_keys_without_a_value_are_accepted(tmp_path):
    neutral = {"new_1": None, "new_2": False, "new_3": "none", "new_4": {}, "d_out": D}
    config = SAELENS_6 | neutral
    config["metadata"] = SAELENS_6["metadata"] | {"a_new_note": {"x": 1}}
    sae = Sae.load(write(tmp_path / "sae", config, weights()))
    assert sae.metadata["a_new_note"] == {"x": 1}
    with pytest.raises(SaeError, match="architecture 'None' is not supported"):
        Sae.load(write(tmp_path / "sae", without(SAELENS_6, "architecture"), weights()))


def test_the_configuration_wins_over_what_training_noted(tmp_path):
    sae = Sae("topk", weights(), config={"k": 2})
    config = json.loads((sae.save(tmp_path / "sae") / "cfg.json").read_text())
    assert config["metadata"]["thresher"]["config"]["k"] == 2
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config | {"k": 5}))
    assert int((Sae.load(tmp_path / "sae").encode(rows()) != 0).sum(1).max()) > 2


def test_a_changed_hook_name_is_not_passed_over(tmp_path):
    for hook_point in ("blocks.1.mlp_in", "blocks.1.hook_resid_post", "model.layers.1.mlp"):
        folder = Sae("standard", weights(), hook_point=hook_point).save(tmp_path / "sae")
        assert Sae.load(folder).hook_point == hook_point
        config = json.loads((folder / "cfg.json").read_text())
        config["metadata"]["hook_name"] = "blocks.1.ln2.hook_normalized"
        (folder / "cfg.json").write_text(json.dumps(config))
        if hook_point == "blocks.1.mlp_in":
            assert Sae.load(folder).hook_point == hook_point
            continue
        with pytest.raises(SaeError, match=r"but thresher\.hook_point '.*' in its metadata; expected the same place"):
            Sae.load(folder)


def test_a_transcoder_says_what_it_reconstructs(tmp_path):
    config = SAELENS_6 | {"architecture": "transcoder", "d_out": D, "apply_b_dec_to_input": False}
    metadata = config["metadata"]
    sae = Sae.load(write(tmp_path / "sae", config, weights()))
    with pytest.raises(SaeError, match="does not say which hook point it reconstructs; add hook_name_out"):
        _ = sae.target_hook_point
    config["metadata"] = metadata | {"hook_name_out": "blocks.1.hook_mlp_out"}
    assert Sae.load(write(tmp_path / "sae", config, weights())).target_hook_point == "blocks.1.mlp_out"
    with pytest.raises(SaeError, match="transcoder with apply_b_dec_to_input = true"):
        Sae.load(write(tmp_path / "sae", config | {"apply_b_dec_to_input": True}, weights()))
    assert Sae.load(write(tmp_path / "sae", SAELENS_6, weights())).target_hook_point == "blocks.1.resid_post"


@pytest.mark.parametrize("name", ["threshold", "log_threshold", "W_skip", "b_gate", "finetuning_scaling_factor"])
def test_tensors_that_would_be_left_out_are_refused(name, tmp_path):
    with pytest.raises(SaeError, match=f"has the tensor {name}, which an SAE of architecture 'standard' does not use"):
        Sae.load(write(tmp_path / "sae", SAELENS_5, weights(name)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    tensors = weights()
    tensors["W_dec"][3, :2] = value
    with pytest.raises(SaeError, match=r"W_dec in sae_weights\.safetensors has 2 of 60 values that are NaN"):
        Sae.load(write(tmp_path / "sae", SAELENS_5, tensors))


def test_large_finite_weights_whose_sum_overflows_are_read(tmp_path):
    tensors = weights()
    tensors["b_enc"][:] = 3e38
    assert float(Sae.load(write(tmp_path / "sae", SAELENS_5, tensors)).b_enc[0]) == np.float32(3e38)
    tensors["b_enc"] = tensors["b_enc"].double() * 2
    with pytest.raises(SaeError, match=r"b_enc .* has 10 of 10 values that are NaN or infinite in float32"):
        Sae.load(write(tmp_path / "sae", SAELENS_5, tensors))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_weights_of_any_precision_are_read_as_they_are(dtype, tmp_path):
    tensors = {name: tensor.to(dtype) for name, tensor in weights().items()}
    sae = Sae.load(write(tmp_path / "sae", SAELENS_5, tensors))
    assert torch.equal(sae.W_enc.double(), tensors["W_enc"].double().float().double())
    assert sae.W_enc.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_weights_that_are_no_numbers_of_an_sae_are_refused(dtype, tmp_path):
    tensors = weights()
    tensors["W_enc"] = tensors["W_enc"].to(dtype)
    with pytest.raises(SaeError, match=r"W_enc .*holds torch\.\w+, expected floating-point numbers"):
        Sae.load(write(tmp_path / "sae", SAELENS_5, tensors))


# sparsify and dictionary_learning

SPARSIFY = {
    "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": N, "k": 3,
    "multi_topk": True, "skip_connection": False, "transcode": False, "signed": False, "d_in": D,
}  # fmt: skip


def sparsify_weights():
    t = weights()
    return {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}


def write_sparsify(folder, config=SPARSIFY, tensors=None):
    return write(folder, config, tensors or sparsify_weights(), "sae.safetensors")


def test_sparsify_is_loaded_by_its_files(tmp_path):
    tensors, x = weights(), rows()
    pre_acts = pre_activations(tensors, x).clip(0)
    latents = np.where(pre_acts >= np.sort(pre_acts, axis=1)[:, -3:-2], pre_acts, 0)
    sae = Sae.load(write_sparsify(tmp_path / "layers.3.mlp"))
    close(sae(x), decoded(latents, tensors))
    assert sae.hook_point == "layers.3.mlp"
    assert Sae.load(write_sparsify(tmp_path / "any")).hook_point == ""
    named = SPARSIFY | {"hook_name": "blocks.3.hook_resid_post", "hook_layer": 3}
    assert Sae.load(write_sparsify(tmp_path / "any", named)).hook_point == "blocks.3.resid_post"
    first = {"expansion_factor": 2, "normalize_decoder": True, "k": 3, "signed": False, "d_in": N // 2}
    with pytest.raises(SaeError, match=r"W_enc has shape \(6, 10\), expected \(5, 10\)"):
        Sae.load(write_sparsify(tmp_path / "any", first))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"signed": True}, "has signed = True, which is not supported"),
        ({"skip_connection": True}, "has skip_connection = True without transcode"),
        ({"transcode": True, "skip_connection": True}, "its weights lack W_skip"),
        ({"activation": "groupmax"}, "activation = 'groupmax'"),
        ({"k": 11}, "k is 11, expected 1 to d_sae = 10"),
        ({"num_latents": 0}, r"W_enc has shape \(6, 10\), expected \(6, 192\)"),
        ({"scale_by": 2}, "has scale_by = 2, which this version does not know"),
    ],
)
def test_sparsify_settings_that_change_the_function_are_refused(changes, message, tmp_path):
    with pytest.raises(SaeError, match=message):
        Sae.load(write_sparsify(tmp_path / "sae", SPARSIFY | changes))
    with pytest.raises(SaeError, match="has the tensor W_skip"):
        Sae.load(write_sparsify(tmp_path / "sae", SPARSIFY, sparsify_weights() | {"W_skip": torch.zeros(D, D)}))


DICTIONARY = {
    "trainer": {
        "trainer_class": "TopKTrainer",
        "dict_class": "AutoEncoderTopK",
        "activation_dim": D,
        "dict_size": N,
        "k": 3,
        "layer": 4,
        "lm_name": "a/model",
        "submodule_name": "resid_post_layer_4",
        "lr": 1e-3,
        "steps": 100,
    },
    "buffer": {"d_submodule": D, "io": "out", "n_ctxs": 4, "ctx_len": 16, "device": "cpu"},
}


def dictionary_weights():
    t = weights()
    linear = {
        "encoder.weight": t["W_enc"].T,
        "encoder.bias": t["b_enc"],
        "decoder.weight": t["W_dec"].T,
        "b_dec": t["b_dec"],
    }
    return linear | {"k": torch.tensor(3, dtype=torch.int32), "threshold": torch.tensor(-1.0)}


def write_dictionary(folder, config=DICTIONARY, tensors=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tensors or dictionary_weights(), folder / "ae.pt")
    return folder


def test_an_archive_of_dictionary_learning_is_read_as_it_is_saved(tmp_path):
    """Its encoder is the transpose of a tensor, so not contiguous."""
    tensors, x = weights(), rows()
    assert not dictionary_weights()["encoder.weight"].is_contiguous()
    pre_acts = pre_activations(tensors, x).clip(0)
    latents = np.where(pre_acts >= np.sort(pre_acts, axis=1)[:, -3:-2], pre_acts, 0)
    folder = write_dictionary(tmp_path / "sae")
    for path in (folder, folder / "ae.pt"):
        sae = Sae.load(path)
        close(sae(x), decoded(latents, tensors))
        assert (sae.hook_point, sae.metadata["model_name"]) == ("blocks.4.resid_post", "a/model")
    assert torch.equal(Sae.load(sae.save(tmp_path / "again"))(x), sae(x))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("trainer", {"dict_class": "CrossCoder"}, "class 'CrossCoder'; expected one of: AutoEncoder,"),
        ("trainer", {"k": 4}, "k is 4 in config.json and 3 in the weights"),
        ("trainer", {"normalize_inputs": True}, "has normalize_inputs = True, which this version does not know"),
        ("trainer", {"dict_size": 11}, r"W_enc has shape \(6, 10\), expected \(6, 11\)"),
        ("buffer", {"io": "in_and_out"}, "maps a module's input to its output"),
    ],
)
def test_dictionary_learning_settings_that_change_the_function_are_refused(part, changes, message, tmp_path):
    config = DICTIONARY | {part: DICTIONARY[part] | changes}
    with pytest.raises(SaeError, match=message):
        Sae.load(write_dictionary(tmp_path / "sae", config))
    with pytest.raises(SaeError, match=r"has the tensor encoder\.scale, which this version does not know"):
        Sae.load(
            write_dictionary(tmp_path / "sae", DICTIONARY, dictionary_weights() | {"encoder.scale": torch.ones(1)})
        )


# Malformed files

TRANSCODER = SAELENS_6 | {"architecture": "transcoder", "d_out": D, "apply_b_dec_to_input": False}
CROSSCODER = SAELENS_6 | {"architecture": "crosscoder", "hook_points": ["a", "b"], "apply_b_dec_to_input": False}
READERS = {
    "SAELens 5": (write, SAELENS_5 | TOPK, weights()),
    "SAELens 6": (write, SAELENS_6, weights()),
    "topk": (write, SAELENS_6 | {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True}, weights()),
    "transcoder": (write, TRANSCODER, weights()),
    "crosscoder": (write, CROSSCODER, weights()),
    "sparsify": (write_sparsify, SPARSIFY, sparsify_weights()),
    "dictionary_learning": (write_dictionary, DICTIONARY, dictionary_weights()),
}
VALUES = [None, "x", -1, 0, True, 1e9, 3.5, [], [1], {}, {"x": 1}, float("nan"), 10**30]


def replaced(config):
    """Yield the configuration with each value, at any depth, replaced by every other kind, and without it."""
    for key in config:
        yield key, {name: value for name, value in config.items() if name != key}
        for value in VALUES:
            yield key, config | {key: value}
        if isinstance(config[key], dict):
            for inner, changed in replaced(config[key]):
                yield f"{key}.{inner}", config | {key: changed}


@pytest.mark.parametrize("reader", READERS)
def test_a_malformed_configuration_gives_an_error_of_ours_or_the_same_sae(reader, tmp_path):
    writer, config, tensors = READERS[reader]
    folder = writer(tmp_path / "sae", config, tensors)
    (path,) = folder.glob("c*.json")
    x, expected = rows(), Sae.load(folder)(rows())
    refused = 0
    for key, changed in replaced(config):
        path.write_text(json.dumps(changed))
        try:
            sae = Sae.load(folder)
            Sae.load(sae.save(tmp_path / "again"))
        except ThresherError:
            refused += 1
            continue
        if key not in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "transcode"):
            assert torch.equal(sae(x), expected), (key, changed.get(key))
    assert refused > 40


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_give_an_error_of_ours(reader, tmp_path):
    writer, config, tensors = READERS[reader]
    folder = writer(tmp_path / "sae", config, tensors)
    (path,) = folder.glob("c*.json")
    good = path.read_bytes()
    for content in (b"", b"{", b"[]", b"null", good.decode().encode("utf-16"), b"\xff" + good, b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(SaeError, match="is not"):
            Sae.load(folder)
    with pytest.raises(SaeError, match=r"no SAE can be read at 'x+': File name too long"):
        Sae.load("x" * 300)
    path.unlink()
    path.mkdir()
    with pytest.raises(MissingFileError, match=f"but no {path.name}"):
        Sae.load(folder)
    path.rmdir()
    path.write_bytes(good)
    (file,) = (entry for entry in folder.iterdir() if entry != path)
    saved = file.read_bytes()
    lying = (10**9).to_bytes(8, "little") + saved[8:]
    for content in (b"", saved[: len(saved) // 2], saved[:-1], lying, saved[:8] + b"\xff" * 40 + saved[48:]):
        file.write_bytes(content)
        with pytest.raises(SaeError):
            Sae.load(folder)
