"""Conversions from format to format keep what SAEs compute, on 1,000 rows of a store of a model's activations."""

from pathlib import Path

import pytest
import torch

from thresher.harvest.config import HarvestConfig
from thresher.harvest.run import harvest
from thresher.shared import ActivationStore
from thresher.shared.exchange.command import main
from thresher.shared.sae import CrossLayerTranscoder, Sae
from thresher.shared.sae.formats import find_saes
from thresher.shared.sae.formats.kinds import find_kind

ROOT = Path(__file__).parents[3]
D, N, LAYERS, ROWS = 256, 512, 2, 1000
STREAM, MLP_IN, MLP_OUT = "blocks.1.resid_post", "blocks.1.mlp_in", "blocks.1.mlp_out"
GEMMA = ("gemma-scope", "gemma-scope-2")
HELD = {
    "standard": ("saelens", "dictionary_learning", "llamascopium", *GEMMA),
    "topk": ("saelens", "sparsify", "dictionary_learning", "llamascopium"),
    "abstopk": ("saelens", "sparsify", "dictionary_learning", "llamascopium"),
    "jumprelu": ("saelens", "dictionary_learning", "llamascopium", *GEMMA),
    "gated": ("saelens", "dictionary_learning", *GEMMA),
    "topk_transcoder": ("saelens", "sparsify", "llamascopium"),
    "topk_skip_transcoder": ("saelens", "sparsify"),
    "jumprelu_transcoder": ("saelens", "llamascopium", "circuit-tracer", *reversed(GEMMA)),
    "jumprelu_skip_transcoder": ("saelens", "circuit-tracer", "gemma-scope-2"),
    "cross_layer": ("thresher", "circuit-tracer", "llamascopium", "gemma-scope-2"),
}
"""The formats that each kind is written in, one from the files of the other."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The function that returns rows of a hook point, in float32."""
    config = HarvestConfig(
        model=str(ROOT / "models" / "stdlib-lm"),
        dataset=str(ROOT / "docs"),
        files=["*.md"],
        hook_points=[STREAM, *(f"blocks.{i}.mlp_{end}" for i in range(LAYERS) for end in ("in", "out"))],
        store=str(tmp_path_factory.mktemp("conversions") / "store"),
        tokens=1280,
        context_size=64,
        batch_size=4,
        holdout_fraction=0.0,
    )
    harvest(config)
    store = ActivationStore.open(config.store)
    return lambda hook: store.read(hook, 0, store.n_rows).float()[torch.from_numpy(store.row_mask(0, store.n_rows))]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def make(architecture, x):
    """Return an SAE of random directions, whose biases are such that some latents of these rows fire."""
    kind = find_kind(architecture)
    W_dec = torch.nn.functional.normalize(draw(N, D), dim=1)
    mean = x.mean(0)
    transcodes = kind.wiring == "transcoder"
    tensors = {"W_dec": W_dec, "W_enc": W_dec.T.contiguous(), "b_dec": mean, "W_skip": 0.1 * draw(D, D, seed=1)}
    pre_acts = (x if transcodes else x - mean) @ tensors["W_enc"]
    tensors |= {name: -pre_acts.quantile(0.9, dim=0) for name in ("b_enc", "b_gate", "b_mag")}
    tensors["r_mag"] = 0.3 * draw(N, 1, seed=2)[:, 0]
    tensors["threshold"] = pre_acts.std(0)
    metadata = {"hook_name_out": MLP_OUT} if transcodes else {}
    config = {"apply_b_dec_to_input": not transcodes} | ({"k": 16} if kind.chooses_k else {})
    return Sae(architecture, tensors, hook_point=MLP_IN if transcodes else STREAM, config=config, metadata=metadata)


def make_cross_layer(x):
    tensors, places = {}, {}
    for i, part in enumerate(x.chunk(LAYERS, dim=1)):
        W_enc = torch.nn.functional.normalize(draw(N, D, seed=i), dim=1)
        pre_acts = part @ W_enc.T
        tensors |= {
            f"W_enc_{i}": W_enc,
            f"b_enc_{i}": -pre_acts.quantile(0.8, dim=0),
            f"threshold_{i}": pre_acts.std(0),
        }
        tensors |= {f"W_dec_{i}": draw(N, LAYERS - i, D, seed=i), f"b_dec_{i}": part.mean(0)}
    places = {f"{end}s": [f"blocks.{i}.mlp_{other}" for i in range(LAYERS)] for end, other in ENDS}
    return CrossLayerTranscoder(tensors, config={"activation": "jumprelu"} | places, metadata={"model_name": "m"})


ENDS = (("read", "in"), ("write", "out"))


@torch.no_grad()
def decided(sae, x):
    """Return the rows on which no latent is so near to firing or not firing that rounding may decide it."""
    if sae.wiring_kind == "cross_layer":
        threshold = torch.cat([sae.get_parameter(f"threshold_{i}") for i in range(LAYERS)])
        gap = (sae.pre_activations(x) - threshold).abs().amin(1)
    elif sae.selection in ("topk", "abstopk"):
        pre_acts = sae.pre_activations(x)
        ordered = (pre_acts.abs() if sae.is_signed else pre_acts).topk(int(sae.config["k"]) + 1).values
        gap = ordered[:, -2] - ordered[:, -1]
    else:
        gap = (sae.pre_activations(x) - (sae.threshold if sae.selection == "jumprelu" else 0)).abs().amin(1)
    return x[gap > 2e-6 * x.norm(dim=1)]


def near(value, expected):
    """Assert that rows differ by less than 1e-5 of their norm."""
    assert ((value - expected).norm(dim=1) < 1e-5 * expected.norm(dim=1).clamp_min(1e-3)).all()


@pytest.mark.parametrize("architecture", HELD)
def test_the_function_is_kept(architecture, rows, tmp_path, capsys):
    across, reads = architecture == "cross_layer", MLP_IN if "transcoder" in architecture else STREAM
    x = torch.cat([rows(f"blocks.{i}.mlp_in") for i in range(LAYERS)], 1) if across else rows(reads)
    sae = make_cross_layer(x) if across else make(architecture, x)
    x = decided(sae, x)[:ROWS]
    assert len(x) == ROWS
    latents, x_hat = sae.encode(x), sae(x)
    assert 2 < float((latents != 0).sum(1).float().mean()) < N / 2
    path = sae.save(places(architecture)[HELD[architecture][0]](tmp_path / "first"), HELD[architecture][0])
    for name in (*HELD[architecture][1:], HELD[architecture][0]):
        target = places(architecture)[name](tmp_path / "then" / name)
        assert main(["convert", str(path), str(target), "--format", name]) == 0, capsys.readouterr().err
        again = Sae.load(find_saes(target)[0][1])
        assert again.format == name
        near(again(x), x_hat)
        if not sae.is_signed:
            near(again.encode(x), latents)
        path = target


def places(architecture):
    """Return, by format, the function that returns a folder whose path says what a format needs it to say."""
    kind = "transcoders" if "transcoder" in architecture else "res"
    found = dict.fromkeys(HELD[architecture], lambda folder: folder)
    return (
        found
        | {"gemma-scope": lambda folder: folder / f"gemma-scope-2b-pt-{kind}" / "layer_1" / "x"}
        | ({"gemma-scope-2": lambda folder: folder / "clt" / "x"} if architecture == "cross_layer" else {})
    )
