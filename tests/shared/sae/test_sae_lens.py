"""SAELens loads what Thresher saves, and computes the same. Runs SAELens in its own environment."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from thresher.shared import Sae

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
