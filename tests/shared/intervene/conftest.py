"""Tiny models in float64 and SAEs of random weights that fit them."""

from __future__ import annotations

import pytest
import torch

from thresher.shared.sae import CrossLayerTranscoder, Sae

from ...tiny_models import WIDTH, build


def random_weights(d_in, d_out, d_sae, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    W_dec = draw(d_sae, d_out) / d_out**0.5
    return {"W_enc": draw(d_in, d_sae) / d_in**0.5, "b_enc": -0.1 + 0.1 * draw(d_sae), "W_dec": W_dec} | {
        "b_dec": 0.1 * draw(d_out)
    }


@pytest.fixture(scope="session")
def make():
    """The function that makes an SAE of random weights in float64, of a kind, at one or several hook points."""

    def sae(
        architecture="topk", reads="blocks.1.resid_post", writes=None, seed=0, d_sae=48, k=16, width=WIDTH, norm=""
    ):
        several = isinstance(reads, list)
        n = len(reads) if several else 1
        tensors = random_weights(n * width, n * width, d_sae, seed)
        if "jumprelu" in architecture:
            tensors["threshold"] = torch.full((d_sae,), 0.3, dtype=torch.float64)
        if architecture == "gated":
            tensors["b_gate"] = tensors.pop("b_enc")
            tensors |= {"r_mag": tensors["b_gate"] / 2, "b_mag": tensors["b_gate"] + 0.1}
        if "skip" in architecture:
            tensors["W_skip"] = 0.1 * random_weights(n * width, n * width, n * width, seed + 1)["W_dec"]
        config = {"k": k} if "topk" in architecture else {}
        config |= {"normalize_activations": norm} if norm else {}
        if several:
            config |= {"hook_points": reads, "apply_b_dec_to_input": False}
        metadata = {} if writes is None else {"hook_name_out": writes}
        hook_point = " + ".join(reads) if several else reads
        return Sae(architecture, tensors, hook_point=hook_point, config=config, metadata=metadata)

    return sae


@pytest.fixture(scope="session")
def make_cross_layer():
    """The function that makes a cross-layer transcoder of random weights in float64 over a model's MLPs."""

    def transcoder(n=4, d_sae=20, seed=0, skip=False):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: 0.2 * torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        tensors = {}
        for i in range(n):
            tensors |= {f"W_enc_{i}": draw(d_sae, WIDTH), f"b_enc_{i}": draw(d_sae), f"b_dec_{i}": draw(WIDTH)}
            tensors[f"W_dec_{i}"] = draw(d_sae, n - i, WIDTH)
            tensors |= {f"W_skip_{i}": draw(WIDTH, WIDTH)} if skip else {}
        config = {
            "reads": [f"blocks.{i}.mlp_in" for i in range(n)],
            "writes": [f"blocks.{i}.mlp_out" for i in range(n)],
            "activation": "relu",
        }
        return CrossLayerTranscoder(tensors, config=config)

    return transcoder


@pytest.fixture(scope="session")
def gpt2():
    """A tiny GPT-2 in float64."""
    return build("gpt2").double()


@pytest.fixture(scope="session")
def tokens():
    """Two texts of ten tokens."""
    return torch.randint(1, 60, (2, 10), generator=torch.Generator().manual_seed(3))
