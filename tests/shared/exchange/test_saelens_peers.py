"""SAELens loads from the Hub what was pushed to it. Runs SAELens in its own environment, on this process's server."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from thresher.shared.exchange.command import main
from thresher.shared.sae import Sae

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")]

SCRIPT = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from sae_lens import SAE
root = Path(sys.argv[1])
x, out = load_file(root / "x.safetensors")["x"], {}
for name in sys.argv[2:]:
    sae = SAE.from_pretrained("me/demo", name)
    out[name + ".latents"], out[name] = sae.encode(x).detach(), sae(x).detach()
save_file(out, root / "out.safetensors")
"""


def test_a_pushed_sweep_is_loaded_by_saelens(hub, token, tmp_path, run_peers):
    D, N, saes = 6, 12, {}
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, N), "W_dec": (N, D), "b_dec": (D,)}
    for name in ("topk", "jumprelu", "standard", "gated", "topk-by-row"):
        names = ("W_enc", "W_dec", "b_dec", "b_enc", "threshold", "b_gate", "b_mag", "r_mag")
        tensors = {key: torch.randn(shapes.get(key, (N,)), generator=generator) for key in names}
        tensors["threshold"].abs_()
        config = {"k": 3} | ({"normalize_activations": "layer_norm"} if name == "topk-by-row" else {})
        architecture = name.removesuffix("-by-row")
        saes[name] = Sae(architecture, tensors, hook_point="blocks.1.resid_post", config=config)
        saes[name].save(tmp_path / "saes" / name)
    assert main(["push", str(tmp_path / "saes"), "--repo", "me/demo"]) == 0
    x = torch.randn(40, D, generator=generator)
    save_file({"x": x}, tmp_path / "x.safetensors")
    on = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    run_peers("-c", SCRIPT, tmp_path, *saes, **on)
    theirs = load_file(tmp_path / "out.safetensors")
    for name, sae in saes.items():
        torch.testing.assert_close(sae.encode(x), theirs[f"{name}.latents"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae(x), theirs[name], rtol=1e-5, atol=1e-5)
