"""SAELens's files are read as SAELens 6 reads them. Runs SAELens in its own environment."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from thresher.shared import Sae
from thresher.shared.core.errors import SaeError

pytestmark = pytest.mark.peers

D, N, HEADS = 12, 30, 3
OLD = {
    "architecture": "standard",
    "d_in": D,
    "d_sae": N,
    "dtype": "torch.float32",
    "device": "cpu",
    "hook_name": "blocks.1.hook_resid_post",
    "hook_head_index": None,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "normalize_activations": "none",
    "sae_lens_training_version": "3.22.1",
}
NEW = {
    "architecture": "standard",
    "d_in": D,
    "d_sae": N,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {"sae_lens_version": "6.54.0", "hook_name": "blocks.1.hook_resid_post"},
}
TOPK = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}
TRANSCODER = {"architecture": "transcoder", "d_out": D, "apply_b_dec_to_input": False}
PURSUIT = {"architecture": "matching_pursuit"}
Z = {"hook_name": "blocks.1.attn.hook_z"}

READ = {
    "old standard": (OLD, ()),
    "old without architecture": ({key: OLD[key] for key in OLD if key != "architecture"}, ()),
    "old topk": (OLD | TOPK, ()),
    "old topk by architecture": (OLD | TOPK | {"architecture": "topk"}, ()),
    "old topk, relu by name": (OLD | {"architecture": "topk", "activation_fn_kwargs": {"k": 4}}, ()),
    "old gated": (OLD | {"architecture": "gated"}, ("b_gate", "b_mag", "r_mag")),
    "old jumprelu": (OLD | {"architecture": "jumprelu"}, ("threshold",)),
    "old null normalisation": (OLD | {"normalize_activations": None}, ()),
    "old false normalisation": (OLD | {"normalize_activations": False}, ()),
    "old without b_dec at the input": (OLD | {"apply_b_dec_to_input": False}, ()),
    "old scaling factor of ones": (OLD, ("ones",)),
    "old scaling factor that is not there": (OLD | {"finetuning_scaling_factor": True}, ()),
    "old heads": (OLD | Z, ()),
    "old hook_point": ({key: OLD[key] for key in OLD if key != "hook_name"} | {"hook_point": OLD["hook_name"]}, ()),
    "new topk": (NEW | {"architecture": "topk", "k": 4}, ()),
    "new topk by norms": (NEW | {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True}, ()),
    "new jumprelu": (NEW | {"architecture": "jumprelu"}, ("threshold",)),
    "new abstopk": (NEW | {"architecture": "abstopk", "k": 4}, ()),
    "new abstopk by norms": (NEW | {"architecture": "abstopk", "k": 4, "rescale_acts_by_decoder_norm": True}, ()),
    "new matching pursuit": (NEW | PURSUIT, ()),
    "new matching pursuit, few": (NEW | PURSUIT | {"max_iterations": 3, "residual_threshold": 0.5}, ()),
    "new matching pursuit, again": (NEW | PURSUIT | {"max_iterations": 6, "stop_on_duplicate_support": False}, ()),
    "new matching pursuit without b_dec": (NEW | PURSUIT | {"apply_b_dec_to_input": False}, ()),
    "new heads": (NEW | {"reshape_activations": "hook_z", "metadata": Z}, ()),
    "new transcoder": (NEW | TRANSCODER, ()),
    "new skip transcoder": (NEW | TRANSCODER | {"architecture": "skip_transcoder"}, ("W_skip",)),
}
for kind in ("layer_norm", "constant_norm_rescale"):
    READ |= {
        f"old {kind}": (OLD | {"normalize_activations": kind}, ()),
        f"old topk {kind}": (OLD | TOPK | {"normalize_activations": kind, "apply_b_dec_to_input": False}, ()),
        f"new gated {kind}": (
            NEW | {"architecture": "gated", "normalize_activations": kind},
            ("b_gate", "b_mag", "r_mag"),
        ),
        f"new jumprelu {kind}": (NEW | {"architecture": "jumprelu", "normalize_activations": kind}, ("threshold",)),
        f"new abstopk {kind}": (NEW | {"architecture": "abstopk", "k": 4, "normalize_activations": kind}, ()),
        f"new matching pursuit {kind}": (NEW | PURSUIT | {"normalize_activations": kind}, ()),
        f"new heads {kind}": (
            NEW | {"reshape_activations": "hook_z", "metadata": Z, "normalize_activations": kind},
            (),
        ),
        f"new skip transcoder {kind}": (
            NEW | TRANSCODER | {"architecture": "skip_transcoder", "normalize_activations": kind},
            ("W_skip",),
        ),
    }
OURS = (
    *("old heads", "old topk layer_norm", "new jumprelu constant_norm_rescale", "new skip transcoder layer_norm"),
    *("new abstopk by norms", "new abstopk layer_norm", "new matching pursuit, few", "new matching pursuit layer_norm"),
    "new matching pursuit without b_dec",
)
"""What is saved again, for SAELens to load."""
REFUSED = {
    "scaling factor that is not used": (OLD, ("scaling_factor",)),
    "transcoder that subtracts": (NEW | TRANSCODER | {"apply_b_dec_to_input": True}, ()),
    "heads of another hook": (NEW | {"reshape_activations": "hook_z"}, ()),
    "no architecture": ({key: NEW[key] for key in NEW if key != "architecture"}, ()),
    "unknown architecture": (NEW | {"architecture": "banana"}, ()),
    "unknown normalisation": (NEW | {"normalize_activations": "banana"}, ()),
    "unknown dtype": (NEW | {"dtype": "banana"}, ()),
    "no d_sae": ({key: NEW[key] for key in NEW if key != "d_sae"}, ()),
    "surplus tensor": (NEW, ("threshold",)),
    "gated by name, topk by activation": (OLD | TOPK | {"architecture": "gated"}, ("b_gate", "b_mag", "r_mag")),
    "topk without k": (OLD | {"architecture": "topk"}, ()),
}
SCRIPT = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from sae_lens import SAE
root, x, out, refused = Path(sys.argv[1]), load_file(sys.argv[1] + "/x.safetensors")["x"], {}, []
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    try:
        sae = SAE.load_from_disk(folder)
    except Exception as error:
        refused.append(folder.name)
        continue
    heads = sae.cfg.reshape_activations == "hook_z"
    rows = x.view(*x.shape[:-1], 3, -1) if heads else x
    out[folder.name + ".latents"] = sae.encode(rows).detach()
    x_hat = sae(rows)
    assert x_hat.shape == rows.shape
    out[folder.name + ".x_hat"] = x_hat.detach().reshape(x.shape).contiguous()
save_file(out, root / "out.safetensors")
print(json.dumps(refused))
"""


def write(folder, config, others):
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, N), "W_dec": (N, D), "b_dec": (D,), "W_skip": (D, D)}
    names = ("W_enc", "b_enc", "W_dec", "b_dec", *others)
    tensors = {name: torch.randn(shapes.get(name, (N,)), generator=generator) for name in names}
    if config.get("architecture") == "gated":
        del tensors["b_enc"]
    if config.get("architecture") == "matching_pursuit":
        del tensors["W_enc"], tensors["b_enc"]
        tensors["W_dec"] = torch.nn.functional.normalize(tensors["W_dec"], dim=1)
    if "ones" in tensors:
        del tensors["ones"]
        tensors["scaling_factor"] = torch.ones(N)
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(tensors, folder / "sae_weights.safetensors")


def test_files_of_every_version_are_read_as_saelens_reads_them(tmp_path, run_peers):
    x = torch.randn(2, 8, D, generator=torch.Generator().manual_seed(1))
    save_file({"x": x}, tmp_path / "x.safetensors")
    for name, (config, others) in (READ | REFUSED).items():
        write(tmp_path / name, config, others)
    for name in OURS:
        Sae.load(tmp_path / name).save(tmp_path / f"ours of {name}")
    refused = json.loads(run_peers("-c", SCRIPT, tmp_path))
    assert set(refused) == set(REFUSED)
    for name in REFUSED:
        with pytest.raises(SaeError):
            Sae.load(tmp_path / name)
    theirs = load_file(tmp_path / "out.safetensors")
    for name in (*READ, *(f"ours of {name}" for name in OURS)):
        sae = Sae.load(tmp_path / name)
        torch.testing.assert_close(sae.encode(x), theirs[f"{name}.latents"], rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(sae(x), theirs[f"{name}.x_hat"], rtol=1e-5, atol=1e-5, msg=name)
