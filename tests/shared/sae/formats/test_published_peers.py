"""Files that other libraries write are read as those compute, and they read what is written here. Runs them."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from thresher.shared.sae import Sae

pytestmark = pytest.mark.peers

CIRCUIT_TRACER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
try:
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt, load_gemma_scope_2_clt
    from circuit_tracer.transcoder.single_layer_transcoder import (
        SingleLayerTranscoder, load_gemma_scope_2_transcoder, load_gemma_scope_transcoder, load_relu_transcoder
    )
except ImportError as error:
    sys.exit(print(f"absent: {error}"))
root, cpu, D, N, L = Path(sys.argv[1]), torch.device("cpu"), 8, 20, 3
torch.manual_seed(0)
x, rows = torch.randn(60, D), torch.randn(L, 60, D)
out = {"x": x, "rows": rows}
def shaken(module):
    for tensor in module.parameters():
        tensor.data = torch.randn_like(tensor)
    return module
def described(name, kind):
    (root / name).mkdir()
    (root / name / "config.yaml").write_text(
        f"model_name: a/model\\nmodel_kind: {kind}\\nfeature_input_hook: mlp.hook_in\\n"
        "feature_output_hook: hook_mlp_out\\n"
    )
    return root / name
for name, skip, jump in (("relu", False, False), ("jump", False, True), ("jump skip", True, True)):
    function = JumpReLU(torch.rand(N), 0.1) if jump else torch.nn.functional.relu
    plt = shaken(SingleLayerTranscoder(D, N, function, 2, skip, device=cpu, dtype=torch.float32))
    if jump:
        plt.activation_function.threshold.data.abs_()
    plt.to_safetensors(str(described(name, "transcoder_set") / "layer_2.safetensors"))
    out[name + ".latents"], out[name] = plt.encode(x).detach(), plt(x).detach()
for name, function in (("clt relu", "relu"), ("clt jump", "jump_relu")):
    clt = shaken(CrossLayerTranscoder(L, N, D, function, lazy_decoder=False, device=cpu, dtype=torch.float32))
    if function == "jump_relu":
        clt.activation_function.threshold.data.abs_()
    clt.to_safetensors(str(described(name, "cross_layer_transcoder")))
    out[name + ".latents"], out[name] = clt.encode(rows).detach(), clt(rows).detach()
ours = root / "ours"
plt = load_relu_transcoder(str(ours / "plt" / "layer_4.safetensors"), 4, cpu)
out["ours plt.latents"], out["ours plt"] = plt.encode(x).detach(), plt(x).detach()
clt = load_clt(str(ours / "clt"), device=cpu, dtype=torch.float32, lazy_decoder=False)
out["ours clt.latents"], out["ours clt"] = clt.encode(rows).detach(), clt(rows).detach()
plt = load_gemma_scope_transcoder(str(ours / "gemma" / "params.npz"), 4, cpu)
out["ours gemma.latents"], out["ours gemma"] = plt.encode(x).detach(), plt(x).detach()
plt = load_gemma_scope_2_transcoder(str(ours / "gemma 2" / "params.safetensors"), 4, cpu)
out["ours gemma 2.latents"], out["ours gemma 2"] = plt.encode(x).detach(), plt(x).detach()
folder = ours / "gemma 2 clt"
# The library leaves out the layer of the largest number: one more is named, and not read.
paths = {i: str(folder / f"params_layer_{i}.safetensors") for i in range(L)} | {L: ""}
clt = load_gemma_scope_2_clt(paths, device=cpu, dtype=torch.float32)
latents = clt.encode(rows)  # its forward asks for the input of its skip paths, and does not give it
out["ours gemma 2 clt.latents"] = latents.detach()
out["ours gemma 2 clt"] = clt.decode(latents.to_sparse(), rows).detach()
save_file({key: tensor.contiguous() for key, tensor in out.items()}, root / "out.safetensors")
print("done")
"""


def close(value, expected, said=""):
    torch.testing.assert_close(value.detach(), expected, rtol=1e-5, atol=1e-4, msg=lambda text: f"{said}: {text}")


def skip_if_absent(printed):
    if "absent" in printed:
        pytest.skip(printed.strip())


def test_circuit_tracer_and_we_read_each_other(make_sae, make_cross_layer, tmp_path, run_peers):
    ours = tmp_path / "ours"
    saved = {
        "ours plt": make_sae("jumprelu_skip_transcoder"),
        "ours clt": make_cross_layer(),
        "ours gemma": make_sae("jumprelu_transcoder"),
        "ours gemma 2": make_sae("jumprelu_skip_transcoder"),
        "ours gemma 2 clt": make_cross_layer(skip=True),
    }
    saved["ours plt"].save(ours / "plt", "circuit-tracer")
    saved["ours clt"].save(ours / "clt", "circuit-tracer")
    saved["ours gemma"].save(ours / "gemma", "gemma-scope")
    saved["ours gemma 2"].save(ours / "gemma 2", "gemma-scope-2")
    saved["ours gemma 2 clt"].save(ours / "gemma 2 clt", "gemma-scope-2")
    skip_if_absent(run_peers("-c", CIRCUIT_TRACER, tmp_path))
    theirs = load_file(tmp_path / "out.safetensors")
    x, rows = theirs["x"], theirs["rows"].transpose(0, 1).flatten(1)
    for name in ("relu", "jump", "jump skip"):
        sae = Sae.load(tmp_path / name / "layer_2.safetensors")
        close(sae.encode(x), theirs[f"{name}.latents"], name)
        close(sae(x), theirs[name], name)
        assert (sae.reads, sae.writes, sae.metadata["model_name"]) == (
            ("blocks.2.mlp_in",),
            ("blocks.2.mlp_out",),
            "a/model",
        )
    for name in ("clt relu", "clt jump"):
        saved[name] = Sae.load(tmp_path / name)
        assert saved[name].writes == tuple(f"blocks.{i}.mlp_out" for i in range(3))
    for name, sae in saved.items():
        across = sae.wiring_kind == "cross_layer"
        latents, y_hat = (
            value.transpose(0, 1).flatten(1) if across else value for value in (theirs[f"{name}.latents"], theirs[name])
        )
        close(sae.encode(rows if across else x), latents, name)
        close(sae(rows if across else x), y_hat, name)


LLAMASCOPIUM = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
try:
    from llamascopium.models.clt import CLTConfig, CrossLayerTranscoder
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder
    from llamascopium.models.sparse_dictionary import SparseDictionary
except ImportError as error:
    sys.exit(print(f"absent: {error}"))
root, D, N, L = Path(sys.argv[1]), 8, 24, 3
torch.manual_seed(0)
x, rows = torch.randn(60, D), torch.randn(60, L, D)
out = {"x": x, "rows": rows}
def shaken(module):
    for tensor in module.parameters():
        tensor.data = torch.randn_like(tensor)
    return module
def saved(name, model):
    model.save_pretrained(root / name)
    model.cfg.save_hyperparameters(root / name)
READS, WRITES = "blocks.5.hook_resid_mid", "blocks.5.hook_mlp_out"
for act in ("relu", "jumprelu", "topk"):
    for weighed in (True, False):
        for writes in (READS, WRITES):
            name = f"{act} {weighed} {writes}"
            model = shaken(SparseAutoEncoder(SAEConfig(
                hook_point_in=READS, hook_point_out=writes, d_model=D, expansion_factor=N / D, act_fn=act, top_k=5,
                sparsity_include_decoder_norm=weighed, norm_activation="dataset-wise")))
            norms = {READS: 64.0, writes: 3.0 if writes != READS else 64.0}
            model.set_dataset_average_activation_norm(norms)
            saved(name, model)
            scaled = x * (D**0.5 / norms[READS])
            latents = model.encode(scaled)
            out[name + ".latents"] = latents.detach()
            out[name + ".norms"] = model.decoder_norm().detach()
            out[name] = (model.decode(latents) * (norms[writes] / D**0.5)).detach()
for act in ("relu", "jumprelu", "topk"):
    name = f"{act} token-wise"
    model = shaken(SparseAutoEncoder(SAEConfig(
        hook_point_in=READS, hook_point_out=READS, d_model=D, expansion_factor=N / D, act_fn=act, top_k=5,
        sparsity_include_decoder_norm=False, norm_activation="token-wise")))
    saved(name, model)
    scaled, factors = model.normalize_activations({READS: x}, return_scale_factor=True)
    latents = model.encode(scaled[READS])
    out[name + ".latents"] = latents.detach()
    out[name] = model.denormalize_activations({READS: model.decode(latents)}, factors)[READS].detach()
for act in ("relu", "jumprelu"):
    for weighed in (True, False):
        name = f"clt {act} {weighed}"
        hooks = [[f"blocks.{i}.{hook}" for i in range(L)] for hook in ("ln2.hook_normalized", "hook_mlp_out")]
        model = shaken(CrossLayerTranscoder(CLTConfig(
            hook_points_in=hooks[0], hook_points_out=hooks[1], d_model=D, expansion_factor=N / D, act_fn=act,
            sparsity_include_decoder_norm=weighed, norm_activation="dataset-wise")))
        norms = {hook: 2.0 + i for i, hook in enumerate(hooks[0] + hooks[1])}
        model.set_dataset_average_activation_norm(norms)
        saved(name, model)
        s_in, s_out = (torch.tensor([D**0.5 / norms[hook] for hook in names])[:, None] for names in hooks)
        latents = model.encode(rows * s_in)
        out[name + ".latents"] = latents.detach()
        out[name] = (model.decode(latents, batch_first=True) / s_out).detach()
model = SparseDictionary.from_pretrained(str(root / "ours" / "token-wise"))
scaled, factors = model.normalize_activations({model.cfg.hook_point_in: x}, return_scale_factor=True)
out["ours token-wise"] = model.denormalize_activations(
    {model.cfg.hook_point_in: model(scaled[model.cfg.hook_point_in])}, factors)[model.cfg.hook_point_in].detach()
for name in ("standard", "jumprelu", "topk", "jumprelu_transcoder", "clt"):
    model = SparseDictionary.from_pretrained(str(root / "ours" / name))
    out["ours " + name] = (model.decode(model.encode(rows), batch_first=True) if name == "clt" else model(x)).detach()
save_file({key: tensor.contiguous() for key, tensor in out.items()}, root / "out.safetensors")
print("done")
"""


def test_language_model_saes_and_we_read_each_other(make_sae, make_cross_layer, tmp_path, run_peers):
    ours = {name: make_sae(name) for name in ("standard", "jumprelu", "topk", "jumprelu_transcoder")}
    ours["clt"] = make_cross_layer()
    ours["token-wise"] = make_sae("jumprelu", normalize_activations="constant_norm_rescale")
    for name, sae in ours.items():
        sae.save(tmp_path / "ours" / name, "llamascopium")
    skip_if_absent(run_peers("-c", LLAMASCOPIUM, tmp_path))
    theirs = load_file(tmp_path / "out.safetensors")
    x, rows = theirs["x"], theirs["rows"].flatten(1)
    for name in theirs:
        if name.endswith((".latents", ".norms")) or name in ("x", "rows"):
            continue
        if name.startswith("ours "):
            sae = ours[name.removeprefix("ours ")]
            close(sae(rows if name == "ours clt" else x), theirs[name].flatten(1), name)
            continue
        sae, latents, given = Sae.load(tmp_path / name), theirs[f"{name}.latents"].flatten(1), x
        assert sae.folded or name.endswith("token-wise")
        if name.startswith("clt"):
            given = rows
            assert sae.reads[1] == "blocks.1.mlp_in_normalized"
        if name.startswith("topk True"):
            latents = latents * theirs[f"{name}.norms"]  # folded: ours are those that the k largest are chosen of
        close(sae.encode(given), latents, name)
        close(sae(given), theirs[name].flatten(1), name)


SAELENS = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
root = Path(sys.argv[1])
repositories = json.loads(sys.argv[2])
x, out = load_file(root / "x.safetensors")["x"], {}
def local(repo_id, filename, subfolder=None, **_):
    path = root / repo_id / (subfolder or "") / filename
    if not path.exists():
        raise loaders.EntryNotFoundError(str(path))
    return str(path)
loaders.hf_hub_download = local
loaders.get_safetensors_tensor_shapes = lambda repo_id, path: {
    name: list(tensor.shape) for name, tensor in load_file(root / repo_id / path).items()
}
for name, (loader, repo, folder, overrides) in repositories.items():
    load = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader]
    cfg, state, _ = load(repo, folder, "cpu", False, overrides | {"dtype": "float32"})
    cfg = loaders.handle_config_defaulting(cfg)
    kind = SAE.get_sae_config_class_for_architecture(cfg["architecture"]).from_dict(cfg)
    sae = SAE.get_sae_class_for_architecture(kind.architecture())(kind)
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    if cfg["normalize_activations"] == "expected_average_only_in":
        sae.fold_activation_norm_scaling_factor(8**0.5 / 64)
    given = x.view(len(x), 2, -1) if cfg["reshape_activations"] == "hook_z" else x
    out[name + ".latents"], out[name] = sae.encode(given).detach(), sae(given).detach().reshape(x.shape)
    out[name + ".hook"] = torch.tensor(list(sae.cfg.metadata.hook_name.encode()))
save_file({key: tensor.contiguous() for key, tensor in out.items()}, root / "out.safetensors")
"""
SIZES = {"d_in": 8, "d_sae": 20}


def test_published_files_are_read_as_saelens_reads_them(make_sae, rows, tmp_path, run_peers):
    """Files laid out as their publishers do, which SAELens has a loader for each of."""
    generator = torch.Generator().manual_seed(3)
    wide, tall = torch.randn(20, 8, generator=generator), torch.randn(8, 20, generator=generator)
    b_enc, b_dec = torch.randn(20, generator=generator), torch.randn(8, generator=generator)
    cases = {}
    for kind in ("res", "mlp", "att"):
        repo, folder = f"google/gemma-scope-2b-pt-{kind}", "layer_12/width_16k/average_l0_82"
        (tmp_path / repo / folder).mkdir(parents=True)
        arrays = {"W_enc": tall, "W_dec": wide, "b_enc": b_enc, "b_dec": b_dec, "threshold": b_enc.abs()}
        np.savez(tmp_path / repo / folder / "params.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})
        cases[kind] = ("gemma_2", repo, folder, SIZES | {"device": "cpu"})
    for name, site, extra in (
        ("gemma 2", "resid_post/layer_7_width_16k_l0_small", {}),
        ("gemma 2 z", "attn_out/layer_7_width_16k_l0_small", {}),
        (
            "gemma 2 affine",
            "transcoder/layer_7_width_16k_l0_small_affine",
            {"affine_skip_connection": torch.randn(8, 8)},
        ),
    ):
        folder = tmp_path / "google/gemma-scope-2-1b-pt" / site
        folder.mkdir(parents=True)
        tensors = {"w_enc": tall, "w_dec": wide, "b_enc": b_enc, "b_dec": b_dec, "threshold": b_enc.abs()}
        save_file(tensors | extra, folder / "params.safetensors")
        cases[name] = ("gemma_3", "google/gemma-scope-2-1b-pt", site, {})
    repo, folder = "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L5R-8x"
    (tmp_path / repo / folder / "checkpoints").mkdir(parents=True)
    settings = {
        "d_model": 8,
        "d_sae": 20,
        "hook_point_in": "blocks.5.hook_resid_post",
        "hook_point_out": "blocks.5.hook_resid_post",
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 64.0, "out": 64.0},
        "jump_relu_threshold": 0.4,
        "apply_decoder_bias_to_pre_encoder": False,
    }
    (tmp_path / repo / folder / "hyperparams.json").write_text(json.dumps(settings))
    linear = {"encoder.weight": wide, "encoder.bias": b_enc, "decoder.weight": tall, "decoder.bias": b_dec}
    save_file(linear, tmp_path / repo / folder / "checkpoints" / "final.safetensors")
    cases["llama"] = ("llama_scope", repo, folder, {})
    for name, repo, file, tensors, loader, overrides in (
        (
            "qwen",
            "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_5",
            "layer3.sae.pt",
            {"W_enc": wide, "W_dec": tall, "b_enc": b_enc, "b_dec": b_dec},
            "qwen_scope",
            SIZES,
        ),
        (
            "goodfire",
            "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
            "Llama-3.1-8B-Instruct-SAE-l19.pth",
            {key.replace("oder.", "oder_linear."): tensor for key, tensor in linear.items()},
            "goodfire",
            SIZES,
        ),
        (
            "deepseek",
            "some/DeepSeek-R1-Distill-Llama-8B-SAE-l19",
            "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
            linear,
            "deepseek_r1",
            SIZES,
        ),
    ):
        (tmp_path / repo).mkdir(parents=True)
        torch.save(tensors, tmp_path / repo / file)
        cases[name] = (loader, repo, file, overrides)
    x = rows()
    save_file({"x": x}, tmp_path / "x.safetensors")
    run_peers("-c", SAELENS, tmp_path, json.dumps(cases))
    theirs = load_file(tmp_path / "out.safetensors")
    for name, (_, repo, path, _) in cases.items():
        sae = Sae.load(tmp_path / repo / path)
        hook = bytes(theirs[f"{name}.hook"].tolist()).decode()
        from thresher.shared.model.hook_points import canonical_hook_point

        # SAELens names the branch before Gemma's norm, where Google's own files name what the norm returns.
        assert sae.hook_point == canonical_hook_point(hook).replace("mlp_branch", "mlp_in"), name
        close(sae.encode(x), theirs[f"{name}.latents"], name)
        close(sae(x), theirs[name], name)


WRITTEN = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from dictionary_learning.utils import load_dictionary
from sparsify import SparseCoder
root = Path(sys.argv[1])
x, out = load_file(root / "x.safetensors")["x"], {}
for folder in sorted((root / "sparsify").iterdir()):
    out["sparsify " + folder.name] = SparseCoder.load_from_disk(folder)(x).sae_out.detach()
for folder in sorted((root / "dictionary_learning").iterdir()):
    module, config = load_dictionary(str(folder), "cpu")
    out["dictionary_learning " + folder.name] = module(x).detach()
save_file({key: tensor.contiguous() for key, tensor in out.items()}, root / "out.safetensors")
"""


def test_sparsify_and_dictionary_learning_read_what_is_written(make_sae, rows, tmp_path, run_peers):
    x, saes = rows(), {}
    for architecture in ("topk", "topk_transcoder", "topk_skip_transcoder"):
        saes[f"sparsify {architecture}"] = make_sae(architecture)
    for architecture in ("standard", "topk", "jumprelu", "gated"):
        saes[f"dictionary_learning {architecture}"] = make_sae(architecture)
    for name, sae in saes.items():
        format_name, architecture = name.split()
        sae.save(tmp_path / format_name / architecture, format_name)
    save_file({"x": x}, tmp_path / "x.safetensors")
    run_peers("-c", WRITTEN, tmp_path)
    theirs = load_file(tmp_path / "out.safetensors")
    assert theirs.keys() == saes.keys()
    for name, sae in saes.items():
        close(sae(x), theirs[name], name)
