"""Run a model in vLLM, write the residual stream of some layers, and make a store of it.

    python examples/harvest_with_vllm.py MODEL TEXT_FILE OUTPUT [LAYER,LAYER,...]

Needs a GPU, and vLLM in this environment (pip install vllm). Each paragraph of the text is one request. Layer `i` is
the residual stream after `i` blocks.
"""

from __future__ import annotations

import sys
from pathlib import Path

from thresher.shared.store.command import main as store_command


def extract(model: str, paragraphs: list[str], folder: Path, layers: list[int]) -> None:
    """Write one safetensors file per paragraph, by vLLM's own extraction of hidden states."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        raise SystemExit("error: vLLM is not installed; pip install vllm, on a machine with a GPU") from None
    engine = LLM(
        model=model,
        enable_chunked_prefill=False,
        enable_prefix_caching=False,
        speculative_config={
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": layers}},
        },
        kv_transfer_config={
            "kv_connector": "ExampleHiddenStatesConnector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": str(folder)},
        },
    )
    engine.generate(paragraphs, SamplingParams(max_tokens=1))


def main(model: str, text: Path, output: Path, layers: list[int]) -> int:
    paragraphs = [part.strip() for part in text.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    states = output / "hidden_states"
    extract(model, paragraphs, states, layers)
    ids = ",".join(map(str, layers))
    return store_command(["import", str(states), "--store", str(output / "store"), "--layers", ids, "--model", model])


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    wanted = [int(layer) for layer in sys.argv[4].split(",")] if len(sys.argv) > 4 else [1]
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), wanted))
