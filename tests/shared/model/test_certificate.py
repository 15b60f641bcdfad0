"""In every causal class of transformers a canonical hook point holds what its name says, or is refused.

What the hook points hold is compared with plain cloning hooks on the blocks, with the library's hidden states, and with
sums of what was captured; none of that uses the measurements that choose the hook points.
"""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from thresher.shared.core.errors import HookPointError, NonFiniteError
from thresher.shared.model.capture import capture, resolve_hook_points, splice
from thresher.shared.model.certificate import certificate, measure
from thresher.shared.model.hook_points import KINDS

from ...tiny_models import TESTED, build, spread

LAYERS = (0, 1)
REFUSED = {
    "bart": {"resid_mid", "mlp_branch", "mlp_in_normalized"},
    "bert": {"resid_mid", "mlp_branch", "mlp_in_normalized"},
    "bloom": set(),
    "cohere": {"resid_mid", "mlp_branch"},
    "deepseek_v3": set(),
    "falcon": {"resid_mid", "mlp_branch"},
    "falcon_h1": {"attn_out", "attn_z"},
    "gemma2": set(),
    "gemma3_text": set(),
    "glm4": set(),
    "gpt2": set(),
    "gpt_neo": set(),
    "gpt_neox": {"resid_mid"},
    "gpt_oss": set(),
    "gptj": {"resid_mid", "mlp_branch"},
    "granite": set(),
    "granitemoeshared": {"mlp_out", "mlp_in", "mlp_branch", "mlp_in_normalized"},
    "llama": set(),
    "mamba": set(KINDS) - {"resid_pre", "resid_post"},
    "minicpm3": set(),
    "mixtral": set(),
    "mpt": set(),
    "nemotron": set(),
    "olmo2": {"mlp_branch", "mlp_in_normalized"},
    "openai-gpt": {"resid_mid", "mlp_branch", "mlp_in_normalized"},
    "phi": {"resid_mid", "mlp_branch"},
    "qwen3": set(),
    "starcoder2": set(),
    "xlnet": set(KINDS),
}
"""The kinds that model types do not have: parallel blocks, other parts beside attention, other shapes."""


def tokens():
    return torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(3))


def offered(model):
    """The hook points that the model has in these blocks, and why it refuses the others."""
    _, findings = measure(model, LAYERS)
    names = {found: f"blocks.{found[0]}.{found[1]}" for found in findings}
    refused = {names[key]: finding.reason for key, finding in findings.items() if finding.place is None}
    assert all(len(reason) > 20 for reason in refused.values()), "a refusal without a reason"
    if refused:
        with pytest.raises(HookPointError, match="no hook point"):
            resolve_hook_points(model, refused)
    held = [name for name in names.values() if name not in refused]
    return (resolve_hook_points(model, held) if held else {}), refused


def close(a, b, part, tolerance=1e-4):
    """Compare two tensors by the size of a part of them that must not be lost."""
    assert float(part.norm()) > 0
    assert float((a - b).norm() / part.norm()) < tolerance


def cloned(model, path):
    """What a module reads and returns, cloned by plain hooks."""
    seen = {}
    module = model.get_submodule(path)

    def before(_, args, kwargs):
        seen["input"] = kwargs.get("hidden_states", args[0] if args else None).clone()

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(
            lambda _, __, out: seen.update(output=(out if torch.is_tensor(out) else out[0]).clone())
        ),
    ]
    with torch.no_grad():
        model(input_ids=tokens())
    for handle in handles:
        handle.remove()
    return seen


def check_values(model, found, post_norm):
    values = capture(model, tokens(), found, truncate=False)
    for name, hook_point in found.items():
        (alone,) = capture(model, tokens(), {name: hook_point}).values()
        assert torch.equal(alone, values[name]), f"{name} depends on what else is read"
        assert alone.shape[-1] == hook_point.d_in
    for layer in LAYERS:
        at = {kind: values.get(f"blocks.{layer}.{kind}") for kind in KINDS}
        pre, mid, post, attn, mlp = (at[k] for k in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"))
        if pre is not None and post is not None:
            plain = cloned(model, found[f"blocks.{layer}.resid_pre"].module_path)
            close(plain["input"], pre, pre, 1e-6)
            close(plain["output"], post, post, 1e-6)
        if layer and pre is not None and f"blocks.{layer - 1}.resid_post" in values:
            assert torch.equal(values[f"blocks.{layer - 1}.resid_post"], pre)
        if attn is not None and mlp is not None and not post_norm:
            close(pre + attn + mlp, post, attn)
            close(pre + attn + mlp, post, mlp)
        if attn is not None and mid is not None:
            close(pre + attn, mid, attn)
        if mlp is not None and mid is not None:
            close(mid + mlp, post, mlp)
        if (normalized := at["mlp_in_normalized"]) is not None:
            assert float((normalized.square().mean(-1) - 1).abs().max()) < 1e-2, "not what a norm makes of its input"
    return values


def check_splices(model, found, values, post_norm):
    """Replace each hook point by noise and see that what follows is made of it alone."""
    for layer in LAYERS:
        points = {kind: found.get(f"blocks.{layer}.{kind}") for kind in KINDS}
        inner = {
            k: p for k, p in points.items() if p is not None and k in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        }
        for kind, point in points.items():
            if point is None or not point.splice:
                continue
            noise = torch.randn_like(values[point.name]) * values[point.name].std()
            with splice(model, point, lambda x, noise=noise: noise.clone()):
                after = capture(model, tokens(), {p.name: p for p in inner.values()}, truncate=False)
            at = {k: after[p.name] for k, p in inner.items()}
            if "resid_post" not in at or post_norm:
                continue
            if kind == "resid_post":
                assert torch.equal(at["resid_post"], noise)
            elif kind == "resid_mid" and "mlp_out" in at:
                close(at["resid_post"] - at["mlp_out"], noise, noise)
            elif "mlp_out" in at and "attn_out" in at:
                close(at["resid_pre"] + at["attn_out"] + at["mlp_out"], at["resid_post"], at["mlp_out"])
            if kind in ("mlp_branch", "mlp_in", "mlp_in_normalized") and {"attn_out", "mlp_out"} <= at.keys():
                assert torch.equal(at["attn_out"], values[points["attn_out"].name])
                assert not torch.equal(at["mlp_out"], values[points["mlp_out"].name])


def check(model_type):
    model = build(model_type)
    found, refused = offered(model)
    post_norm = "post-norm" in str(refused)
    values = check_values(model, found, post_norm)
    check_splices(model, found, values, post_norm)
    if f"blocks.{LAYERS[-1]}.resid_pre" in found and model_type in REFUSED and model_type != "mamba":
        hidden = model(input_ids=tokens(), output_hidden_states=True).hidden_states
        for layer in LAYERS:
            close(values[f"blocks.{layer}.resid_pre"], hidden[layer], hidden[layer], 1e-6)
    return {name.rpartition(".")[2] for name in found}


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_hook_point_holds_or_is_refused(model_type):
    assert check(model_type) == set(KINDS) - REFUSED[model_type]


@pytest.mark.long
@pytest.mark.parametrize("model_type", [t for t in TESTED if t not in REFUSED])
def test_a_hook_point_of_any_causal_class_holds_or_is_refused(model_type):
    check(model_type)


def test_a_scale_that_a_setting_explains_is_part_of_the_activation():
    model = build("granite")
    found = resolve_hook_points(model, ["blocks.1.attn_out", "blocks.1.mlp_out"])
    assert [point.scale for point in found.values()] == [0.22, 0.22]
    described = certificate(model, found)["hook_points"]["blocks.1.mlp_out"]
    assert described["derived"] == "model.layers.1.mlp times residual_multiplier"
    seen = cloned(model, "model.layers.1.mlp")
    assert torch.equal(capture(model, tokens(), found)["blocks.1.mlp_out"], seen["output"] * 0.22)


def test_a_scale_that_no_setting_explains_is_refused():
    model = build("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    plain = model.model.layers[1].forward

    def halved(hidden_states, **arguments):
        block = model.model.layers[1]
        attended, _ = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **arguments)
        mid = hidden_states + attended
        return mid + 0.5 * block.mlp(block.post_attention_layernorm(mid))

    model.model.layers[1].forward = halved
    with pytest.raises(HookPointError, match=r"adds 0\.5 times the output of model\.layers\.1\.mlp, which no setting"):
        resolve_hook_points(model, ["blocks.1.mlp_out"])
    model.model.layers[1].forward = plain
    assert resolve_hook_points(model, ["blocks.1.mlp_out"])


def test_only_what_the_model_writes_into_is_cloned():
    model = build("falcon")
    found = resolve_hook_points(model, [f"blocks.1.{kind}" for kind in ("attn_out", "mlp_out", "mlp_in", "resid_post")])
    assert [name for name, point in found.items() if point.clone] == ["blocks.1.mlp_out"]


@pytest.mark.parametrize("model_type", ["granite", "falcon", "bloom", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_same_hook_points(model_type, dtype):
    model = build(model_type)
    exact = offered(model)[0]
    rounded = offered(model.to(dtype))[0]
    assert rounded == exact
    assert certificate(model, rounded)["measured_in"] == "float32", "in a copy"


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bloom", "falcon", "nanochat"])
def test_untrained_weights_give_the_same_hook_points(model_type):
    spreaded = offered(build(model_type))[0]
    model = build(model_type, drawn=False)
    assert offered(model)[0] == spreaded


def test_a_large_model_is_measured_in_its_own_precision(monkeypatch):
    monkeypatch.setattr("thresher.shared.model.certificate.FLOAT32_COPY_PARAMETERS", 100)
    model = build("granite").bfloat16()
    found = resolve_hook_points(model, ["blocks.1.attn_out"])
    assert found["blocks.1.attn_out"].scale == 0.22
    assert certificate(model, found)["measured_in"] == "bfloat16"


def test_weights_that_are_not_finite_are_named():
    model = build("llama")
    model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.0 returns NaN"):
        resolve_hook_points(model, ["blocks.0.resid_post"])


def two_towers(kind):
    """A model of images and text, both towers of three layers and of one width."""
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=8, patch_size=4
    )
    text = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    if kind == "llava":
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text), image_token_index=63
        )
        return LlavaForConditionalGeneration(config)
    config = Gemma3Config(text_config=text, vision_config=SiglipVisionConfig(**vision).to_dict(), image_token_index=63)
    config.mm_tokens_per_image = 4
    return Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_the_blocks_of_the_text_are_found_beside_a_tower_of_as_many(kind):
    torch.manual_seed(0)
    model = spread(two_towers(kind))
    found = resolve_hook_points(model, ["blocks.1.resid_pre", "blocks.1.mlp_out", "blocks.2.resid_post"])
    assert all("vision" not in point.module_path for point in found.values())
    hidden = model(input_ids=tokens(), output_hidden_states=True).hidden_states
    close(capture(model, tokens(), found)["blocks.1.resid_pre"], hidden[1], hidden[1], 1e-6)
