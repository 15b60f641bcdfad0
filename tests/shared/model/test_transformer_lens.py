"""Hook points hold what TransformerLens's hooks of the corresponding names hold, in both of its kinds of model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from thresher.shared.model.capture import capture, resolve_hook_points
from thresher.shared.model.hook_points import KINDS, canonical_hook_point
from thresher.shared.sae.formats.files import saelens_hook_name

from ...tiny_models import build

pytestmark = pytest.mark.peers

SCRIPT = """
import sys
import torch
from safetensors.torch import save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights, convert_llama_weights
from transformers import AutoModelForCausalLM

folder, path, *names = sys.argv[1:]
hf = AutoModelForCausalLM.from_pretrained(folder).eval()
config = hf.config
gpt2 = config.model_type == "gpt2"
own = dict(act_fn="gelu_new", normalization_type="LN", eps=1e-5, d_mlp=4 * config.hidden_size) if gpt2 else dict(
    act_fn="silu", normalization_type="RMS", eps=config.rms_norm_eps, d_mlp=config.intermediate_size, gated_mlp=True,
    final_rms=True, n_key_value_heads=config.num_key_value_heads, positional_embedding_type="rotary",
    rotary_dim=config.hidden_size // config.num_attention_heads, rotary_adjacent_pairs=False)
hooked = HookedTransformer(HookedTransformerConfig(
    n_layers=config.num_hidden_layers, d_model=config.hidden_size, n_ctx=32, n_heads=config.num_attention_heads,
    d_head=config.hidden_size // config.num_attention_heads, d_vocab=config.vocab_size, use_hook_mlp_in=True, **own))
hooked.load_state_dict((convert_gpt2_weights if gpt2 else convert_llama_weights)(hf, hooked.cfg), strict=False)
bridge = TransformerBridge.boot_transformers(folder, hf_model=hf)
tokens = torch.arange(5, 19).reshape(2, 7)
out = {}
for kind, model in (("hooked", hooked), ("bridge", bridge)):
    _, cache = model.run_with_cache(tokens)
    for name in names:
        if name in cache:
            out[f"{kind}.{name}"] = cache[name].detach().flatten(2).contiguous().clone()
save_file(out, path)
"""


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_values_are_those_of_transformer_lens(model_type, tmp_path, run_peers):
    model = build(model_type, num_key_value_heads=4) if model_type == "llama" else build(model_type)
    model.save_pretrained(tmp_path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:60]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<s>", *alphabet])}, []))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>").save_pretrained(tmp_path)
    ours = {f"blocks.1.{kind}": saelens_hook_name(f"blocks.1.{kind}") for kind in KINDS}
    run_peers("-c", SCRIPT, tmp_path, tmp_path / "out.safetensors", *ours.values())
    theirs = load_file(tmp_path / "out.safetensors")
    values = capture(model, torch.arange(5, 19).reshape(2, 7), resolve_hook_points(model, ours))
    kinds = {}
    for name, spelling in ours.items():
        assert canonical_hook_point(spelling) == name
        for kind in ("hooked", "bridge"):
            if f"{kind}.{spelling}" in theirs:
                torch.testing.assert_close(values[name], theirs[f"{kind}.{spelling}"], rtol=1e-4, atol=1e-4)
                kinds.setdefault(name.rpartition(".")[2], []).append(kind)
    assert set(kinds) == set(KINDS)
    assert kinds["mlp_in"] == ["bridge"], "only the bridge has a hook of the MLP's own input"
    assert kinds["mlp_in_normalized"] == ["hooked", "bridge"]
    assert kinds["mlp_branch"][0] == "hooked"
