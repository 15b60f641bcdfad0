"""SAELens loads what Thresher saves, and computes the same. Runs SAELens in its own environment."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from thresher.shared import Sae
from thresher.shared.core.errors import SaeError

SCRIPT = """
import sys, torch
from safetensors.torch import load_file, save_file
from sae_lens import SAE
folder, x = sys.argv[1], load_file(sys.argv[2])["x"]
out = {}
for name in sys.argv[4:]:
    sae = SAE.load_from_disk(folder + "/" + name)
    latents = sae.encode(x)
    out[name + ".latents"], out[name + ".x_hat"] = latents.detach(), sae(x).detach()
    print(name, type(sae).__name__, sae.cfg.metadata.hook_name)
save_file(out, sys.argv[3])
"""
pytestmark = pytest.mark.peers

WRITER = """
import sys, torch, dataclasses
from pathlib import Path
from safetensors.torch import load_file, save_file
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
root = Path(sys.argv[1])
torch.manual_seed(0)
x, out = torch.randn(40, 12), {}
out["x"] = x
def filled(sae):
    for name, tensor in sae.named_parameters():
        tensor.data = torch.randn_like(tensor) * 0.4
        if name == "W_dec":
            tensor.data = torch.nn.functional.normalize(tensor.data, dim=1)
    for name in ("threshold", "log_threshold"):
        if hasattr(sae, name):
            getattr(sae, name).data = torch.rand(30) + 0.1 if name == "threshold" else torch.randn(30)
    return sae
def config(cls):
    wanted = {"d_in": 12, "d_sae": 30, "d_out": 12, "k": 4}
    wanted["apply_b_dec_to_input"] = "transcoder" not in cls.__name__.lower()
    wanted |= {"matryoshka_widths": [10, 30], "decoder_init_norm": 1.0}
    return cls(**{field.name: wanted[field.name] for field in dataclasses.fields(cls) if field.name in wanted})
for name, (cls, config_cls) in SAE_CLASS_REGISTRY.items():
    if name == "temporal":
        continue
    sae = filled(cls(config(config_cls)))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = "blocks.1.hook_resid_post", "gpt2-small"
    sae.save_model(root / name)
    out[name + ".latents"], out[name] = sae.encode(x).detach(), sae(x).detach()
for name, (cls, config_cls) in SAE_TRAINING_CLASS_REGISTRY.items():
    sae = filled(cls(config(config_cls)))
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(0.5)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.save_inference_model(root / ("trained " + name))
    from sae_lens import SAE
    again = SAE.load_from_disk(root / ("trained " + name))
    out["trained " + name + ".latents"], out["trained " + name] = again.encode(x).detach(), again(x).detach()
save_file({key: value.to_dense().contiguous() for key, value in out.items()}, root / "out.safetensors")
"""

CHECKPOINTS = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from sae_lens.registry import get_sae_training_class
from sae_lens.training.activation_scaler import ActivationScaler
root = Path(sys.argv[1])
torch.manual_seed(0)
x = torch.randn(400, 12) @ torch.randn(12, 12) + 3 * torch.randn(12)
out = {"x": x}
for name in ("standard", "gated", "topk", "jumprelu"):
    for kind in ("expected_average_only_in", "covariance_whitening"):
        for subtracts in (True, False):
            cls, config_cls = get_sae_training_class(name)
            config = config_cls(d_in=12, d_sae=30, normalize_activations=kind, apply_b_dec_to_input=subtracts,
                                **({"k": 4, "rescale_acts_by_decoder_norm": False} if name == "topk" else {}))
            sae = cls(config)
            for tensor in sae.parameters():
                tensor.data = torch.randn_like(tensor) * 0.4
            if name == "jumprelu":  # below zero, training would let latents be negative, unlike SAELens's inference
                sae.threshold.data.abs_()
            sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
            scaler = ActivationScaler()
            if kind == "covariance_whitening":
                scaler.estimate_whitening(12, iter([x]), 1)
            else:
                scaler.estimate_scaling_factor(12, iter([x]), 1)
            folder = root / f"{name} {kind} {subtracts}"
            sae.save_model(folder)
            scaler.save(str(folder / "activation_scaler.json"))
            with torch.no_grad():
                out[folder.name + ".latents"] = sae.encode(scaler(x))
                out[folder.name] = scaler.unscale(sae.decode(sae.encode(scaler(x))))
save_file({key: value.to_dense().contiguous() for key, value in out.items()}, root / "out.safetensors")
"""

KINDS = {
    "standard": ({}, "StandardSAE"),
    "topk": ({"k": 5}, "TopKSAE"),
    "jumprelu": ({}, "JumpReLUSAE"),
    "gated": ({}, "GatedSAE"),
    "transcoder": ({"d_out": 12}, "Transcoder"),
    "skip_transcoder": ({"d_out": 12}, "SkipTranscoder"),
    "jumprelu_transcoder": ({"d_out": 12}, "JumpReLUTranscoder"),
    "jumprelu_skip_transcoder": ({"d_out": 12}, "JumpReLUSkipTranscoder"),
}


def test_saelens_computes_what_we_compute(tmp_path, run_peers):
    torch.manual_seed(0)
    d_in, d_sae = 12, 40
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, 12), "b_dec": (12,), "W_skip": (12, d_in)}
    names = ("W_enc", "W_dec", "b_dec", "W_skip", "b_enc", "b_gate", "b_mag", "r_mag", "threshold")
    tensors = {name: torch.randn(shapes.get(name, (d_sae,))) for name in names}
    for kind, (config, _) in KINDS.items():
        Sae(kind, tensors, hook_point="blocks.1.resid_post", config=config).save(tmp_path / kind)
    x = torch.randn(33, d_in)
    save_file({"x": x}, tmp_path / "x.safetensors")
    printed = run_peers("-c", SCRIPT, tmp_path, tmp_path / "x.safetensors", tmp_path / "out.safetensors", *KINDS)
    assert printed.split("\n")[:-1] == [f"{kind} {name} blocks.1.hook_resid_post" for kind, (_, name) in KINDS.items()]
    theirs = load_file(tmp_path / "out.safetensors")
    for kind in KINDS:
        ours = Sae.load(tmp_path / kind)
        for name, value in (("latents", ours.encode(x)), ("x_hat", ours(x))):
            difference = (value - theirs[f"{kind}.{name}"]).norm() / value.norm()
            assert difference < 1e-5, (kind, name)
    assert json.loads((tmp_path / "topk" / "cfg.json").read_text())["rescale_acts_by_decoder_norm"] is False


def test_what_every_class_of_saelens_writes_is_read(tmp_path, run_peers):
    """Each class that it registers, apart from `temporal`, and what each of its training classes saves at the end."""
    run_peers("-c", WRITER, tmp_path)
    theirs = load_file(tmp_path / "out.safetensors")
    x = theirs.pop("x")
    names = [name for name in theirs if not name.endswith(".latents")]
    assert {"abstopk", "matching_pursuit", "jumprelu_skip_transcoder", "trained matryoshka_batchtopk"} < set(names)
    assert len(names) >= 18
    for name in names:
        sae = Sae.load(tmp_path / name)
        for value, expected in ((sae.encode(x), theirs[f"{name}.latents"]), (sae(x), theirs[name])):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5, msg=name)
        assert sae.hook_point == "blocks.1.resid_post"


def test_the_scaling_beside_checkpoints_is_folded(tmp_path, run_peers):
    """A factor and a whitening, estimated and saved by SAELens, which gives its latents of scaled rows."""
    run_peers("-c", CHECKPOINTS, tmp_path)
    theirs = load_file(tmp_path / "out.safetensors")
    x = theirs.pop("x")
    names = [name for name in theirs if not name.endswith(".latents")]
    assert len(names) == 16
    for name in names:
        sae = Sae.load(tmp_path / name)
        assert ("whitening" in sae.folded[0]) == ("whitening" in name)
        for value, expected in ((sae.encode(x), theirs[f"{name}.latents"]), (sae(x), theirs[name])):
            assert (value - expected).norm() < 1e-4 * expected.norm(), name
    folder = tmp_path / "gated covariance_whitening True"
    (folder / "activation_whitening.safetensors").unlink()
    with pytest.raises(SaeError, match="covariance_whitening"):
        Sae.load(folder)
