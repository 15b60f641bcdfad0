"""The SAEBench adapter, by the checks that SAEBench makes of a custom SAE."""

from __future__ import annotations

import pytest
import torch

from thresher.evaluate.saebench import SaeBenchSae, layer_of, saebench_sae
from thresher.shared.core.errors import HookPointError, SaeError


@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_interface(make_sae, tmp_path, architecture):
    original = make_sae(architecture, seed=1)
    original.W_dec.data *= 3.0 if architecture == "topk" else torch.linspace(0.5, 2, 32)[:, None]
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))
    expected = original.forward(x)
    sae = saebench_sae(original.save(tmp_path / "sae"), "gpt2", context_size=12)
    assert sae.check_decoder_norms()
    assert sae.W_dec.shape == (sae.cfg.d_sae, sae.cfg.d_in)
    assert sae.W_enc.shape == (sae.cfg.d_in, sae.cfg.d_sae)
    assert sae.b_enc.shape == (32,)
    assert sae.b_dec.shape == (16,)
    assert (sae.cfg.hook_name, sae.cfg.hook_layer) == ("blocks.1.hook_resid_post", 1)
    assert sae.cfg.model_name == "gpt2"
    assert sae.cfg.architecture_str == sae.cfg.to_dict()["architecture"] == architecture
    assert sae.b_mag.shape == (32,)
    latents = sae.encode(x)
    torch.testing.assert_close(sae(x.reshape(-1, 16)).reshape(x.shape), sae.decode(latents))
    torch.testing.assert_close(sae(x), expected, rtol=1e-4, atol=1e-5)


def test_moves_and_casts(make_sae):
    sae = SaeBenchSae(make_sae(), "gpt2").to(dtype=torch.bfloat16)
    assert sae.dtype == torch.bfloat16
    assert sae.cfg.dtype == "bfloat16"
    assert sae.encode(torch.randn(3, 16)).dtype == torch.bfloat16
    assert sae.check_decoder_norms()
    assert sae.device == torch.device("cpu")


def test_what_cannot_be_adapted(make_sae):
    uneven = make_sae()
    uneven.W_dec.data[0] *= 2
    with pytest.raises(SaeError, match="unit norm"):
        SaeBenchSae(uneven, "gpt2")
    uneven.normalize_activations = "layer_norm"
    with pytest.raises(SaeError, match="decodes latents without the rows that they are of"):
        SaeBenchSae(uneven, "gpt2")
    with pytest.raises(HookPointError, match=r"blocks\.2\.resid_post"):
        layer_of("transformer.h.0.mlp")
