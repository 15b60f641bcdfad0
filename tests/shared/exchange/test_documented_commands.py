"""Every command that docs/formats.md shows, run as it is written on small files of the same names."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from thresher.shared import ActivationStoreWriter
from thresher.shared.core.cli import main
from thresher.shared.sae import CrossLayerTranscoder, Sae

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

DOCUMENT = (Path(__file__).parents[3] / "docs" / "formats.md").read_text()
COMMANDS = re.findall(r"^(thresher .*?)(?:\s+#.*)?$", DOCUMENT, flags=re.M) + re.findall(
    r"`(thresher sae .*? .*?)`", DOCUMENT
)
D, N, HOOK = 8, 24, "blocks.2.resid_post"
SAID = {
    "average_l0_82": "blocks.12.resid_post",
    "layer_13_width_16k_l0_small": "blocks.13.resid_post",
    "L15R-8x": "blocks.15.resid_post",
    "layer14.sae.pt": "blocks.14.resid_post",
    "--dry_run": "would upload topk/sae_weights.safetensors",
    "--approximate": "approximated with threshold",
}
"""What the output of some commands says, by a part of the command."""


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(architecture="topk", reads=HOOK, writes=""):
    shapes = {"W_enc": (D, N), "W_dec": (N, D), "b_dec": (D,), "b_enc": (N,), "threshold": (N,)}
    tensors = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    tensors |= {"W_dec": torch.nn.functional.normalize(tensors["W_dec"]), "threshold": tensors["threshold"].abs()}
    metadata = {"model_name": "a/model"} | ({"hook_name_out": writes} if writes else {})
    return Sae(architecture, tensors, hook_point=reads, config={"k": 4}, metadata=metadata)


def make_cross_layer():
    tensors = {}
    for i in range(2):
        tensors |= {f"W_enc_{i}": draw(N, D), f"b_enc_{i}": draw(N), f"W_dec_{i}": draw(N, 2 - i, D)}
        tensors |= {f"b_dec_{i}": draw(D), f"threshold_{i}": draw(N).abs()}
    places = {
        key: [f"blocks.{i}.{kind}" for i in range(2)] for key, kind in (("reads", "mlp_in"), ("writes", "mlp_out"))
    }
    return CrossLayerTranscoder(tensors, config={"activation": "jumprelu"} | places)


def put(hub, repository, root):
    files = [path for path in root.rglob("*") if path.is_file()]
    hub.repositories[repository] = {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def published(hub, tmp_path):
    """Small files of the repositories that the document names, on the local Hub."""
    root = tmp_path / "published"
    place = root / "gemma" / "gemma-scope-2b-pt-res"
    make("jumprelu").save(place / "layer_12" / "width_16k" / "average_l0_82", "gemma-scope")
    put(hub, "google/gemma-scope-2b-pt-res", place)
    place = root / "gemma" / "gemma-scope-2-1b-pt"
    sae = make("jumprelu", "blocks.13.resid_post")
    sae.save(place / "resid_post" / "layer_13_width_16k_l0_small", "gemma-scope-2")
    make_cross_layer().save(place / "clt" / "width_262k_l0_medium", "gemma-scope-2")
    put(hub, "google/gemma-scope-2-1b-pt", place)
    place = root / "llama"
    folder = place / "Llama3_1-8B-Base-L15R-8x"
    (folder / "checkpoints").mkdir(parents=True)
    settings = {"d_model": D, "d_sae": N, "norm_activation": "dataset-wise", "jump_relu_threshold": 0.3}
    settings |= {f"hook_point_{end}": "blocks.15.hook_resid_post" for end in ("in", "out")}
    settings["dataset_average_activation_norm"] = {"in": 5.0, "out": 5.0}
    (folder / "hyperparams.json").write_text(json.dumps(settings))
    saved = {
        "encoder.weight": draw(N, D),
        "encoder.bias": draw(N),
        "decoder.weight": draw(D, N),
        "decoder.bias": draw(D),
    }
    save_file(saved, folder / "checkpoints" / "final.safetensors")
    put(hub, "fnlp/Llama3_1-8B-Base-LXR-8x", place)
    place = root / "qwen"
    place.mkdir()
    qwen = {"W_enc": draw(64, D), "W_dec": draw(D, 64), "b_enc": draw(64), "b_dec": draw(D)}
    torch.save(qwen, place / "layer14.sae.pt")
    put(hub, "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", place)
    return hub


def test_every_command_runs(published, token, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("topk", "topk-k32"):
        make().save(tmp_path / "runs" / "demo" / "saes" / name)
    make("transcoder", "blocks.0.mlp_in", "blocks.0.mlp_out").save(tmp_path / "transcoder")
    with ActivationStoreWriter(
        tmp_path / "runs" / "demo" / "store", {HOOK: D}, context_size=16, dtype="float32"
    ) as writer:
        for number in range(20):
            writer.append({HOOK: draw(1, 16, D, seed=number)}, held_out=[number % 2 == 0])
    put(published, "me/demo", tmp_path / "runs" / "demo" / "saes")
    assert len(COMMANDS) > 15
    for command in COMMANDS:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        source = "transcoder" if "circuit-tracer" in command else "runs/demo/saes/topk"
        words = shlex.split(command.replace("SOURCE", source).replace("USER/NAME", "me/demo"))
        if words[1] == "evaluate":
            words += ["--model", "false", "--feature_rows", "0", "--allow_other_model", "true"]
        code = main(words[1:])
        printed = capsys.readouterr()
        assert code == 0, (command, printed.err)
        for part, said in SAID.items():
            assert part not in command or said in printed.out, (command, printed.out)
        if words[2] == "convert":
            assert any((tmp_path / words[4]).rglob("*"))
