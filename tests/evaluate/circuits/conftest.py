"""Transcoders of random weights for every MLP of a tiny model."""

from __future__ import annotations

import pytest
import torch

from thresher.shared.sae import CrossLayerTranscoder, Sae

from ...tiny_models import LAYERS, WIDTH


@pytest.fixture(scope="session")
def make_transcoders():
    """The function that makes transcoders in float64, each with a skip path or not, for some layers."""

    def make(architecture="topk_transcoder", layers=range(LAYERS), read="mlp_in", d_sae=40, b_dec=0.1):
        found = []
        for layer in layers:
            generator = torch.Generator().manual_seed(layer)
            draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: B023, E731
            tensors = {"W_enc": draw(WIDTH, d_sae) / WIDTH**0.5, "b_enc": 0.1 * draw(d_sae)}
            tensors |= {"W_dec": draw(d_sae, WIDTH) / WIDTH**0.5, "b_dec": b_dec * draw(WIDTH)}
            if "jumprelu" in architecture:
                tensors["threshold"] = torch.full((d_sae,), 0.3, dtype=torch.float64)
            if "skip" in architecture:
                tensors["W_skip"] = draw(WIDTH, WIDTH) / WIDTH**0.5
            config = {"k": 6} if "topk" in architecture else {}
            name = f"blocks.{layer}.{read}"
            metadata = {"hook_name_out": f"blocks.{layer}.mlp_out"}
            found.append(Sae(architecture, tensors, hook_point=name, config=config, metadata=metadata))
        return found

    return make


@pytest.fixture(scope="session")
def make_cross_layer():
    """The function that makes a cross-layer transcoder in float64."""

    def make(n=LAYERS, d_sae=20, **config):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: 0.2 * torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        tensors = {}
        for i in range(n):
            tensors |= {f"W_enc_{i}": draw(d_sae, WIDTH), f"b_enc_{i}": draw(d_sae), f"b_dec_{i}": draw(WIDTH)}
            tensors |= {f"W_dec_{i}": draw(d_sae, n - i, WIDTH), f"W_skip_{i}": draw(WIDTH, WIDTH)}
        config = {
            "reads": [f"blocks.{i}.mlp_in" for i in range(n)],
            "writes": [f"blocks.{i}.mlp_out" for i in range(n)],
        } | ({"activation": "relu"} | config)
        return CrossLayerTranscoder(tensors, config=config)

    return make
