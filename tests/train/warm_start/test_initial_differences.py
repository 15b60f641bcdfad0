"""What training cannot take from the SAE that it starts from is said in a line, and crosscoders are matched by name."""

import json

import numpy as np
import pytest
import torch

from thresher.shared import ActivationStoreWriter, Sae
from thresher.shared.core.errors import SaeError
from thresher.train import TrainConfig, train
from thresher.train.architectures import make_architecture, make_config
from thresher.train.stream.normalization import Normalization, normalization_across
from thresher.train.warm_start import read_initial

D, N, HOOK, OUT = 6, 19, "blocks.0.resid_post", "blocks.0.mlp_out"


def make(architecture, *others, config=None, metadata=None, hook_point=HOOK, n_hooks=1, unit=True):
    generator = torch.Generator().manual_seed(0)
    d = D * n_hooks
    shapes = {"W_enc": (d, N), "W_dec": (N, d), "b_dec": (d,), "W_skip": (d, d)}
    names = ("W_enc", "b_enc", "W_dec", "b_dec", *others)
    tensors = {name: torch.randn(shapes.get(name, (N,)), generator=generator) for name in names}
    if unit:
        tensors["W_dec"] /= tensors["W_dec"].norm(dim=1, keepdim=True)
    return Sae(architecture, tensors, hook_point=hook_point, config=config, metadata=metadata)


def architecture(name, **changes):
    keys = {"topk": {"k": 3}, "batch_topk": {"k": 3}, "jumprelu": {"l0_coefficient": 0.1}, "crosscoder": {}}
    config = make_config(**{"hook_point": HOOK, "d_sae": N, "architecture": name} | keys.get(name, {}) | changes)
    d_in = D * len(config.wiring.reads)
    return make_architecture(config, d_in, D if config.hook_point_out else d_in)


def told(name, sae, **changes):
    return architecture(name, **changes).differences(sae, Normalization(torch.zeros(D), 0.5, 1.0))


def test_no_note_is_printed_if_nothing_differs():
    assert told("topk", make("topk", config={"k": 3})) == []
    assert told("standard", make("standard", unit=False), l1_coefficient=1.0) == []
    sae = make("jumprelu", "threshold")
    sae.threshold[:] = 0.4
    assert told("jumprelu", sae) == told("batch_topk", sae) == []


def test_thresholds_that_are_averaged_are_reported_with_their_range():
    sae = make("jumprelu", "threshold", config={"k": 5})
    sae.threshold.copy_(torch.linspace(1, 3, N))
    assert told("batch_topk", sae) == [
        "it keeps k = 5 latents, this one 3",
        "its thresholds, 1 to 3, become one, their mean of 2",
    ]
    _, buffers = architecture("batch_topk").imported(sae, Normalization(torch.zeros(D), 0.5, 1.0))
    assert float(buffers["threshold"]) == pytest.approx(2 * 0.5)


def test_thresholds_that_are_raised_and_norms_that_are_folded_are_reported():
    sae = make("jumprelu", "threshold", unit=False)
    sae.threshold.copy_(torch.linspace(1, 3, N))
    sae.threshold[:4] = -0.25
    norms = sae.W_dec.norm(dim=1)
    least = float((sae.threshold * norms).min())
    assert told("jumprelu", sae) == [
        f"its decoder norms, {float(norms.min()):.3g} to {float(norms.max()):.3g}, move into the encoder: latents are "
        "scaled by them, and reconstructions stay",
        f"4 of its 19 thresholds are below 2e-08 (the least is {least:.3g}) and start there",
    ]


def test_a_start_that_is_not_used_is_reported():
    sae = make("jumprelu", "threshold")
    sae.threshold.data.fill_(0.1)
    said = "initial_l0 = 5 is not used: thresholds and biases start at the SAE's"
    assert said in told("jumprelu", sae, initial_l0=5)
    assert told("jumprelu", sae, initial_threshold=0.5) == [said.replace("l0 = 5", "threshold = 0.5")]
    assert told("jumprelu", sae, initial_threshold=0.5, resample_every_tokens=10) == []


def test_another_hook_point_or_a_falling_k_is_reported():
    assert told("topk", make("topk", config={"k": 3}, hook_point="blocks.1.resid_post")) == [
        "it is of 'blocks.1.resid_post', this one of 'blocks.0.resid_post'"
    ]
    metadata = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    assert told("topk", make("topk", config={"k": 3}, metadata=metadata)) == [
        "it is of a model loaded with center_writing_weights = true, this one of the model as it is"
    ]
    assert told("topk", make("topk", config={"k": 3}), k_anneal_steps=10) == [
        "k_anneal_steps keeps 6 latents at first, and 3 at the end"
    ]
    sae = make("transcoder", metadata={"hook_name_out": "blocks.0.hook_attn_out"})
    assert told("transcoder", sae, l1_coefficient=1.0, hook_point_out=OUT) == [
        "it reconstructs 'blocks.0.attn_out', this one 'blocks.0.mlp_out'"
    ]


def test_a_transcoder_without_its_output_is_refused(tmp_path):
    make("transcoder").save(tmp_path / "sae")
    config = make_config(
        hook_point=HOOK,
        hook_point_out=OUT,
        d_sae=N,
        architecture="transcoder",
        l1_coefficient=1.0,
        name="x",
        init_from=str(tmp_path / "sae"),
    )
    with pytest.raises(SaeError, match=r"'x' cannot start from .* does not say which hook point it reconstructs"):
        read_initial(config, None, make_architecture(config, D, D))


def crosscoder(order):
    return architecture("crosscoder", hook_points=order, hook_point=order[0], l1_coefficient=1.0)


def test_a_crosscoders_hook_points_are_matched_by_name(tmp_path):
    places, order = ["a", "b", "c"], ("c", "a", "b")
    sae = make("crosscoder", config={"hook_points": places, "apply_b_dec_to_input": False}, n_hooks=3)
    rows = {name: torch.randn(20, D) for name in places}
    ours = crosscoder(order)
    by_hook = {name: Normalization(torch.randn(D), 0.5 + number, 1.0) for number, name in enumerate(places)}
    kind = normalization_across(ours.config, by_hook)
    again = ours.to_sae(*ours.imported(sae, kind), kind, {})
    expected = dict(zip(places, sae(torch.cat([rows[name] for name in places], 1)).chunk(3, 1), strict=True))
    found = again(torch.cat([rows[name] for name in order], 1))
    torch.testing.assert_close(found, torch.cat([expected[name] for name in order], 1), rtol=1e-4, atol=1e-4)
    assert ours.differences(sae, kind) == ["its hook points ['a', 'b', 'c'] are put in this SAE's order"]
    sae.save(tmp_path / "sae")
    others = crosscoder(("c", "a", "d"))
    config = make_config(
        hook_point="c", d_sae=N, architecture="crosscoder", name="x", hook_points=("c", "a", "d"), l1_coefficient=1.0
    )
    with pytest.raises(SaeError, match="the crosscoder is of a, b, c; expected c, a, d, in any order"):
        read_initial(config, str(tmp_path / "sae"), others)


def test_a_run_says_what_differs(tmp_path, capsys):
    rows = torch.randn(64, 8, D)
    with ActivationStoreWriter(tmp_path / "store", {HOOK: D}, 8) as writer:
        writer.append({HOOK: rows}, held_out=np.arange(64) % 5 == 0)
    sae = make("topk", config={"k": 5}, hook_point="blocks.7.resid_post")
    sae.save(tmp_path / "sae")
    table = {"architecture": "topk", "hook_point": HOOK, "d_sae": N, "k": 3, "name": "x"}
    train(
        TrainConfig(
            store=str(tmp_path / "store"),
            output=str(tmp_path / "out"),
            init_from=str(tmp_path / "sae"),
            batch_size=32,
            tokens=64,
            warmup_steps=1,
            device="cpu",
            sae=[table],
        )
    )
    printed = [line for line in capsys.readouterr().err.split("\n") if line.startswith("note: ")]
    assert printed == [
        f"note: SAE 'x' starts from '{tmp_path}/sae', but it is of 'blocks.7.resid_post', this one of '{HOOK}'",
        f"note: SAE 'x' starts from '{tmp_path}/sae', but it keeps k = 5 latents, this one 3",
    ]
    assert json.loads((tmp_path / "out" / "x" / "cfg.json").read_text())["k"] == 3
