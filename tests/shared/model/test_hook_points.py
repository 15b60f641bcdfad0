"""Hook points against hidden states and manual computation, in each family of architectures."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from thresher.shared.core.errors import HookPointError
from thresher.shared.model.capture import capture, resolve_hook_points, splice
from thresher.shared.model.hook_points import canonical_hook_point, find_blocks

SMALL = dict(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
    max_position_embeddings=32,
)  # fmt: skip
GROUPED = SMALL | dict(num_key_value_heads=1, head_dim=16, pad_token_id=0)
FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=24, n_layer=3, n_head=2, n_positions=32)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
    "gpt_neox_sequential": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, use_parallel_residual=False)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GROUPED)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**SMALL, pad_token_id=0)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=61, hidden_size=24, word_embed_proj_dim=24, ffn_dim=40, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=32,
        )
    ),
}  # fmt: skip


def build(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or parameter.ndim == 1:  # else norms start as the identity
            parameter.normal_(1 if "weight" in name else 0, 0.3)
    return model


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return build(family)


@pytest.fixture
def input_ids():
    return torch.randint(1, 61, (2, 7), generator=torch.Generator().manual_seed(1))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_canonical_names():
    assert canonical_hook_point("blocks.2.hook_resid_post") == "blocks.2.resid_post"
    assert canonical_hook_point("blocks.12.hook_mlp_out") == "blocks.12.mlp_out"
    assert canonical_hook_point("blocks.0.attn.hook_z") == "blocks.0.attn_z"
    assert canonical_hook_point("blocks.3.ln2.hook_normalized") == "blocks.3.mlp_in_normalized"
    assert canonical_hook_point("blocks.3.hook_mlp_in") == "blocks.3.mlp_branch"
    assert canonical_hook_point("blocks.3.mlp.hook_in") == "blocks.3.mlp_in"
    assert canonical_hook_point("blocks.03.resid_post") == "blocks.3.resid_post"
    for same in ("blocks.2.resid_post", "transformer.h.2.mlp", "hook_embed", "blocks.x.hook_resid_post"):
        assert canonical_hook_point(same) == same


def test_residual_stream_equals_hidden_states(model, input_ids):
    names = ["blocks.0.resid_pre", "blocks.1.resid_pre", "blocks.0.hook_resid_post", "blocks.1.resid_post"]
    activations = capture(model, input_ids, resolve_hook_points(model, names))
    hidden = model(input_ids, output_hidden_states=True).hidden_states
    close(activations["blocks.0.resid_pre"], hidden[0])
    close(activations["blocks.1.resid_pre"], hidden[1])
    close(activations["blocks.0.resid_post"], hidden[1])
    close(activations["blocks.1.resid_post"], hidden[2])


def test_parts_add_up_to_the_residual_stream(family, model, input_ids):
    if family == "opt":
        pytest.skip("OPT has no MLP module")
    kinds = ["resid_pre", "attn_out", "mlp_out", "resid_post"]
    hook_points = resolve_hook_points(model, [f"blocks.1.{kind}" for kind in kinds])
    pre, attn_out, mlp_out, post = capture(model, input_ids, hook_points).values()
    close(pre + attn_out + mlp_out, post)


def test_resid_mid_lies_between(family, model, input_ids):
    if family == "gpt_neox":
        with pytest.raises(HookPointError, match=r"no hook point 'blocks\.1\.resid_mid'"):
            resolve_hook_points(model, ["blocks.1.resid_mid"])
        return
    if family == "opt":
        pytest.skip("OPT names its second norm final_layer_norm, which is not a hook point of ours")
    hook_points = resolve_hook_points(model, [f"blocks.1.{kind}" for kind in ("resid_pre", "attn_out", "resid_mid")])
    pre, attn_out, mid = capture(model, input_ids, hook_points).values()
    close(pre + attn_out, mid)


def test_mlp_maps_mlp_in_to_what_it_adds(family, model, input_ids):
    if family == "opt":
        pytest.skip("OPT has no MLP module")
    hook_points = resolve_hook_points(model, ["blocks.2.mlp_in", "blocks.2.mlp_out"])
    mlp_in, mlp_out = capture(model, input_ids, hook_points).values()
    _, blocks = find_blocks(model)
    added = blocks[2].mlp(mlp_in)
    if family in ("gemma2", "olmo2"):
        added = blocks[2].post_feedforward_layernorm(added)
    close(added, mlp_out)


def test_attn_z_goes_into_the_output_projection(family, model, input_ids):
    hook_points = resolve_hook_points(model, ["blocks.0.attn_z", "blocks.0.attn_out"])
    z, attn_out = capture(model, input_ids, hook_points).values()
    projection = model.get_submodule(hook_points["blocks.0.attn_z"].module_path)
    assert hook_points["blocks.0.attn_z"].d_in == (32 if "head_dim" in GROUPED and z.shape[-1] == 32 else 24)
    projected = projection(z)
    if family in ("gemma2", "olmo2"):
        projected = find_blocks(model)[1][0].post_attention_layernorm(projected)
    close(projected, attn_out)


def test_truncation_runs_nothing_later(model, input_ids):
    hook_points = resolve_hook_points(model, ["blocks.1.resid_post", "blocks.0.attn_out"])
    whole = capture(model, input_ids, hook_points, truncate=False)
    ran = []
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
    truncated = capture(model, input_ids, hook_points)
    assert not any(path.startswith(f"{find_blocks(model)[0]}.2") or path == "lm_head" for path in ran)
    for name in hook_points:
        assert torch.equal(whole[name], truncated[name])
    assert list(truncated) == ["blocks.1.resid_post", "blocks.0.attn_out"]


@pytest.mark.parametrize("kind", ["resid_pre", "resid_post", "attn_out", "attn_z", "mlp_out"])
def test_splicing_the_identity_changes_nothing(family, model, input_ids, kind):
    if family == "opt" and kind == "mlp_out":
        pytest.skip("OPT has no MLP module")
    (hook_point,) = resolve_hook_points(model, [f"blocks.1.{kind}"]).values()
    clean = model(input_ids).logits
    with splice(model, hook_point, lambda x: x.clone()):
        assert torch.equal(model(input_ids).logits, clean)
    with splice(model, hook_point, lambda x: x + 1):
        assert not torch.equal(model(input_ids).logits, clean)
    assert torch.equal(model(input_ids).logits, clean)


def test_splicing_zeros_removes_the_part(family, model, input_ids):
    if family == "opt":
        pytest.skip("OPT has no MLP module")
    hook_points = resolve_hook_points(model, [f"blocks.1.{kind}" for kind in ("resid_pre", "attn_out", "resid_post")])
    with splice(model, hook_points["blocks.1.resid_post"], torch.zeros_like):
        no_stream = capture(model, input_ids, resolve_hook_points(model, ["blocks.2.resid_pre"]))
    assert not no_stream["blocks.2.resid_pre"].any()
    (mlp_out,) = resolve_hook_points(model, ["blocks.1.mlp_out"]).values()
    with splice(model, mlp_out, torch.zeros_like):
        pre, attn_out, post = capture(model, input_ids, hook_points).values()
    close(pre + attn_out, post)


def test_splicing_zero_logits_by_hand(input_ids):
    model = build("gpt2")
    (last,) = resolve_hook_points(model, ["blocks.2.resid_post"]).values()
    with splice(model, last, torch.zeros_like):
        logits = model(input_ids).logits
    close(logits, (model.transformer.ln_f.bias @ model.lm_head.weight.T).expand_as(logits))


def test_encoder_blocks(input_ids):
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL), add_pooling_layer=False).eval()
    names = [f"blocks.1.{kind}" for kind in ("resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post")]
    pre, attn_out, mlp_in, mlp_out, post = capture(model, input_ids, resolve_hook_points(model, names)).values()
    hidden = model(input_ids, output_hidden_states=True).hidden_states
    close(pre, hidden[1])
    close(post, hidden[2])
    layer = model.encoder.layer[1]
    close(layer.attention.output.LayerNorm(pre + attn_out), mlp_in)
    close(layer.output.LayerNorm(mlp_in + mlp_out), post)


def test_module_paths():
    model = build("gpt2")
    whole, relative = resolve_hook_points(model, ["transformer.h.1.mlp.c_fc", "h.1.mlp.c_fc"]).values()
    assert (whole.module_path, whole.layer, whole.d_in) == ("transformer.h.1.mlp.c_fc", 1, 96)
    assert relative.module_path == whole.module_path
    (embedding,) = resolve_hook_points(model, ["transformer.drop"]).values()
    assert embedding.layer is None


def test_unknown_hook_points_list_the_models():
    model = build("gpt2")
    for name in ("blocks.3.resid_post", "blocks.1.resid_middle", "nowhere"):
        with pytest.raises(HookPointError, match=rf"no hook point '{name}' in GPT2LMHeadModel.*0 to 2.*resid_post"):
            resolve_hook_points(model, [name])
    with pytest.raises(HookPointError, match="name at least one"):
        resolve_hook_points(model, [])
    with pytest.raises(HookPointError, match="one activation of shape"):
        resolve_hook_points(model, ["transformer.h.1.mlp.act", "transformer.wpe"])
    with pytest.raises(HookPointError, match="one activation of shape"):
        resolve_hook_points(model, ["transformer"])  # it gives an object of several


def test_a_hook_point_that_never_runs():
    model = build("gpt2")
    with pytest.raises(HookPointError, match="got none"):
        resolve_hook_points(model, ["lm_head"])


def test_splicing_zeros_at_resid_mid_equals_a_forward_from_there(input_ids):
    model = build("gpt2")
    (mid,) = resolve_hook_points(model, ["blocks.1.resid_mid"]).values()
    with splice(model, mid, torch.zeros_like):
        logits = model(input_ids).logits
    block = model.transformer.h[1]
    stream = torch.zeros(2, 7, 24)
    stream = stream + block.mlp(block.ln_2(stream))
    stream = model.transformer.h[2](stream)
    stream = stream if torch.is_tensor(stream) else stream[0]
    close(logits, model.lm_head(model.transformer.ln_f(stream)))


def test_splicing_at_mlp_branch_leaves_the_skip_path_alone(input_ids):
    model = build("llama")
    names = ["blocks.1.resid_mid", "blocks.1.mlp_branch", "blocks.1.resid_post"]
    mid, branch, post = resolve_hook_points(model, names).values()
    values = capture(model, input_ids, {"mid": mid, "branch": branch})
    assert torch.equal(values["mid"], values["branch"])
    block = model.model.layers[1]
    with splice(model, branch, torch.zeros_like):
        (after,) = capture(model, input_ids, {"post": post}).values()
    close(after, values["mid"] + block.mlp(block.post_attention_layernorm(torch.zeros_like(values["mid"]))))
