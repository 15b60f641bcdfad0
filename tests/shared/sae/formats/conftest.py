"""SAEs of every kind with random weights, and rows."""

import pytest
import torch

from thresher.shared.sae import CrossLayerTranscoder, Sae
from thresher.shared.sae.formats.kinds import find_kind

D, N, LAYERS = 8, 20, 3
HOOKS = {"sae": ("blocks.4.resid_post", ""), "transcoder": ("blocks.4.mlp_in", "blocks.4.mlp_out")}


@pytest.fixture
def rows():
    """The function that returns rows of some width."""

    def make(width=D, n=60):
        return torch.randn(n, width, generator=torch.Generator().manual_seed(1))

    return make


@pytest.fixture
def make_sae():
    """The function that returns an SAE of an architecture, by name."""

    def make(architecture, **config):
        kind, generator = find_kind(architecture), torch.Generator().manual_seed(0)
        shapes = {"W_enc": (D, N), "W_dec": (N, D), "b_dec": (D,), "W_skip": (D, D)}
        tensors = {name: torch.randn(shapes.get(name, (N,)), generator=generator) for name in kind.tensor_names}
        if "threshold" in tensors:
            tensors["threshold"] = tensors["threshold"].abs()
        reads, writes = HOOKS[kind.wiring]
        config = {"apply_b_dec_to_input": kind.wiring == "sae"} | config
        config |= {"k": 5} if kind.chooses_k else {}
        if kind.is_tied:
            tensors["W_dec"] = torch.nn.functional.normalize(tensors["W_dec"], dim=1)
        metadata = {"model_name": "google/gemma-3-1b-pt"} | ({"hook_name_out": writes} if writes else {})
        return Sae(architecture, tensors, hook_point=reads, config=config, metadata=metadata)

    return make


@pytest.fixture
def make_cross_layer():
    """The function that returns a cross-layer transcoder of three layers."""

    def make(activation="jumprelu", skip=False):
        generator, tensors = torch.Generator().manual_seed(0), {}

        def random(*shape):
            return torch.randn(*shape, generator=generator)

        for i in range(LAYERS):
            tensors |= {f"W_enc_{i}": random(N, D), f"b_enc_{i}": random(N)}
            tensors |= {f"W_dec_{i}": random(N, LAYERS - i, D), f"b_dec_{i}": random(D)}
            tensors |= {f"threshold_{i}": random(N).abs()} if activation == "jumprelu" else {}
        tensors |= {f"W_skip_{i}": random(D, D) for i in range(LAYERS if skip else 0)}
        config = {"activation": activation} | {
            key: [f"blocks.{i}.{kind}" for i in range(LAYERS)]
            for key, kind in (("reads", "mlp_in"), ("writes", "mlp_out"))
        }
        return CrossLayerTranscoder(tensors, config=config, metadata={"model_name": "google/gemma-3-1b-pt"})

    return make
