"""SAELens loads from the Hub what was pushed to it. Runs SAELens in its own environment, on this process's server."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from thresher.shared import ActivationStore
from thresher.shared.core.cli import main as thresher
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


SNIPPETS = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
root, out = Path(sys.argv[1]), {}
rows = load_file(root / "x.safetensors")
for name, snippet in json.loads((root / "snippets.json").read_text()).items():
    said = {}
    exec(snippet, said)
    sae = said["sae"]
    x = rows[sae.cfg.metadata.hook_name]
    out[name + ".latents"], out[name] = sae.encode(x).detach(), sae(x).detach()
save_file(out, root / "out.safetensors")
"""
ROOT = Path(__file__).parents[3]


def test_the_demos_sweep_comes_back_through_saelens(hub, token, tmp_path, run_peers, monkeypatch):
    """A shorter harvest, the demo's six SAEs and their evaluation; loaded as the model card says."""
    monkeypatch.chdir(ROOT)
    run, store = tmp_path / "runs", str(tmp_path / "runs" / "store")
    options = ["--model", str(ROOT / "models" / "stdlib-lm"), "--tokens", "40_000", "--holdout_fraction", "0.4"]
    assert thresher(["harvest", "configs/harvest/demo.toml", "--store", store, *options]) == 0
    assert thresher(["train", "configs/train/demo.toml", "--store", store, "--output", str(run / "saes")]) == 0
    options = ["--store", store, "--saes", str(run / "saes"), "--output", str(run / "evaluation")]
    assert thresher(["evaluate", *options, "--feature_rows", "0", "--max_rows", "1024", "--model_rows", "64"]) == 0
    assert main(["push", str(run / "saes"), "--repo", "me/demo"]) == 0
    card = hub.repositories["me/demo"]["README.md"].decode()
    names = sorted(path.parent.name for path in (run / "saes").glob("*/cfg.json"))
    assert len(names) == 6
    row = {row["name"]: row for row in json.loads((run / "evaluation" / "metrics.json").read_text())}[names[-1]]
    low, high = row["confidence_95"]["explained_variance"]
    assert f"{row['explained_variance']:.4f} ({low:.4f} to {high:.4f})" in card
    opened = ActivationStore.open(store)
    rows = {hook: opened.read(hook, 0, 512).float() for hook in opened.hook_points}
    ours, theirs = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    said = {"x": rows["blocks.2.resid_post"]}
    exec(ours, said)
    first = re.search(r"me/demo/([^\"]+)", ours)[1]
    assert torch.equal(said["latents"], Sae.load(run / "saes" / first).encode(said["x"]))
    snippets = {name: theirs.replace(first, name) for name in names}
    (tmp_path / "snippets.json").write_text(json.dumps(snippets))
    hooked = {hook.replace("resid", "hook_resid"): x for hook, x in rows.items()}
    save_file({name: x.contiguous() for name, x in hooked.items()}, tmp_path / "x.safetensors")
    on = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    run_peers("-c", SNIPPETS, tmp_path, **on)
    found = load_file(tmp_path / "out.safetensors")
    for name in names:
        sae = Sae.load(run / "saes" / name)
        x = rows[sae.hook_point]
        for value, expected in ((found[f"{name}.latents"], sae.encode(x)), (found[name], sae(x))):
            # Rounding may decide between two latents of nearly the same size, in a few rows of a thousand.
            near = (value - expected).norm(dim=1) < 1e-5 * expected.norm(dim=1).clamp_min(1)
            assert near.float().mean() > 0.995, name
