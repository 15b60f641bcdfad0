"""Published transcoders in a model: each is given the tensor that its release names, on its side of the norm's gain."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Olmo2Config, Olmo2ForCausalLM

from thresher.shared.core.errors import HookPointError
from thresher.shared.intervene.sae_model import SaeModel
from thresher.shared.sae import Sae

D, N, SIZES = 16, 24, {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
TOKENS = [[3, 7, 11, 2, 5, 19]]


def transcoder(reads):
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,), "threshold": (N,)}
    tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["threshold"] = tensors["threshold"].abs()
    metadata = {"hook_name_out": "blocks.1.mlp_out"}
    return Sae("jumprelu_transcoder", tensors, hook_point=reads, metadata=metadata)


def with_gains(model):
    """Give the norms gains that are not one."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.named_parameters():
        if "norm" in name:
            tensor.data = torch.randn(tensor.shape, generator=generator)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def gemma():
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    return with_gains(Gemma2ForCausalLM(Gemma2Config(**SIZES, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2)))


@pytest.mark.parametrize("scope", [1, 2])
def test_each_gemma_scope_reads_its_own_side_of_the_gain(scope, gemma, tmp_path):
    sae = transcoder("blocks.1.mlp_in_normalized" if scope == 1 else "blocks.1.mlp_in")
    if scope == 1:
        path = sae.save(tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_1" / "width_16k" / "x", "gemma-scope")
    else:
        path = sae.save(tmp_path / "x", "gemma-scope-2")
    seen, norm = {}, gemma.model.layers[1].pre_feedforward_layernorm
    handle = norm.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    run = SaeModel.open(gemma, [path], skip_first_token=False).run(TOKENS)
    handle.remove()
    x = seen["x"].double()
    normalised = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    given = normalised if scope == 1 else normalised * (1 + norm.weight.double())
    torch.testing.assert_close(given, seen["y"].double() if scope == 2 else given, rtol=1e-4, atol=1e-5)
    pre_acts = given @ sae.W_enc.double() + sae.b_enc.double()
    expected = pre_acts * (pre_acts > sae.threshold)
    (latents,) = run.latents.values()
    torch.testing.assert_close(latents.to_dense().double(), expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_the_place_is_refused(tmp_path):
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    olmo = Olmo2ForCausalLM(Olmo2Config(**SIZES, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()
    sae = transcoder("blocks.1.mlp_in_normalized")
    path = sae.save(tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_1" / "width_16k" / "x", "gemma-scope")
    with pytest.raises(HookPointError, match="mlp_in_normalized"):
        SaeModel.open(olmo, [path])
