"""`engine = "vllm"`: vLLM runs the model, and its own hidden-state extraction writes the residual stream.

Each context is one request of one generated token. vLLM's connector writes a file per request, which is read as an
import reads such files, and removed. https://docs.vllm.ai/en/latest/features/speculative_decoding/extract_hidden_states/
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor
from transformers import AutoModelForCausalLM

from ...shared.core.errors import ConfigError, HookPointError, ModelError, one_line
from ...shared.model.hook_points import ResolvedHookPoint, block_and_kind, unique_canonical
from ...shared.model.language_model import DTYPES, is_encoder, load_model_config, model_dtype
from ...shared.model.probe.blocks import find_blocks
from ...shared.store.foreign.vllm import hidden_states_of
from ..config import HarvestConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ENDS = {"resid_pre": (0, "input"), "resid_post": (1, "output")}
_UNUSED = ("adapter", "attn_implementation", "device_map", "max_memory", "workers")
_INSTALL = "pip install 'thresher[vllm]', on a machine with a GPU"


class VllmEngine:
    """A model in vLLM that returns the residual stream after some numbers of blocks.

    `layers` maps each hook point to its `eagle_aux_hidden_state_layer_ids`: id `i` is the stream after `i` blocks.
    """

    def __init__(self, config: HarvestConfig, layers: Mapping[str, int], dtype: torch.dtype) -> None:
        self.layers = layers
        self._ids = sorted(set(layers.values()))
        folder = tempfile.mkdtemp(prefix="thresher-vllm-", dir=config.offload_folder)
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._generate, self._load = _start(config, self._ids, dtype, Path(folder))

    def run(self, tokens: Int32[np.ndarray, "batch context"]) -> list[Path]:
        """Run the model over contexts, and return the files of their hidden states."""
        return self._generate(tokens)

    def read(
        self, tokens: Int32[np.ndarray, "batch context"], paths: list[Path]
    ) -> dict[str, Float[Tensor, "batch context d_in"]]:
        """Return the activations of contexts from the files of `run`, and remove these."""
        rows = []
        for row, path in zip(tokens, paths, strict=True):
            rows.append(hidden_states_of(path, self._load(path), row, len(self._ids)))
            with suppress(FileNotFoundError):
                path.unlink()
        states = torch.stack(rows)  # [batch, context, layers, hidden]
        return {name: states[:, :, self._ids.index(layer)] for name, layer in self.layers.items()}


def describe_model(config: HarvestConfig) -> PreTrainedModel:
    """Return the model without weights, as transformers builds it: its class, sizes and the names of its modules.

    Raises:
        ConfigError: the harvest has a setting that does not apply to vLLM.
        ModelError: the model cannot be found, or predicts no next token.
    """
    defaults = HarvestConfig(model="-", hook_points=["-"], store="-")
    unused = [key for key in _UNUSED if getattr(config, key) != getattr(defaults, key)]
    if config.device not in ("auto", "cuda"):
        unused.append("device")
    if unused:
        raise ConfigError(f"{', '.join(unused)}: expected none of these with engine = 'vllm', which does not use them")
    found = load_model_config(config.model, config.revision, config.trust_remote_code)
    if is_encoder(found):
        raise ModelError(f"'{config.model}' predicts no next token; engine = 'vllm' runs causal language models")
    dtype = model_dtype(config.model_dtype, "cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(found, dtype=dtype, trust_remote_code=config.trust_remote_code).eval()


def stream_points(model: PreTrainedModel, names: Iterable[str]) -> tuple[dict[str, ResolvedHookPoint], dict[str, int]]:
    """Return the hook points of the residual stream with these names, and vLLM's layer id of each.

    Raises `HookPointError` for any other hook point, which vLLM does not give.
    """
    blocks = find_blocks(model)
    width = model.config.get_text_config().hidden_size
    points, layers = {}, {}
    for name in unique_canonical(names):
        layer, kind = block_and_kind(name) or (-1, "")
        if kind not in _ENDS or blocks is None or layer >= len(blocks.modules):
            last = len(blocks.modules) - 1 if blocks is not None else 0
            raise HookPointError(
                f"engine = 'vllm' gives the residual stream alone, not '{name}': blocks.N.resid_pre or "
                f"blocks.N.resid_post with N from 0 to {last}; leave engine out for other hook points"
            )
        later, side = _ENDS[kind]
        path = f"{blocks.path}.{layer}"
        identity = f"vLLM's hidden state after {layer + later} blocks"
        points[name] = ResolvedHookPoint(name, path, side, layer, width, identity=identity)  # pyright: ignore
        layers[name] = layer + later
    return points, layers


def engine_settings(config: HarvestConfig, layers: list[int], dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM`."""
    name = next(name for name, value in DTYPES.items() if value == dtype)
    return {
        "model": config.model,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "dtype": name,
        "seed": 0,
        "tensor_parallel_size": config.tensor_parallel,
        "max_model_len": config.context_size + 1,  # and the generated token
        "max_num_seqs": config.batch_size,
        "max_num_batched_tokens": max(config.batch_size, 2) * (config.context_size + 1),
        "enable_chunked_prefill": False,  # a file holds what one step computed
        "enable_prefix_caching": False,  # a cached prefix is not computed, and has no hidden states
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": layers}},
        },
        "kv_transfer_config": {
            "kv_connector": "ExampleHiddenStatesConnector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": str(folder)},
        },
    }


def _start(
    config: HarvestConfig, layers: list[int], dtype: torch.dtype, folder: Path
) -> tuple[Callable[[np.ndarray], list[Path]], Callable[[Path], Mapping[str, Tensor] | None]]:
    """Start vLLM; return what runs a batch, and what reads a file that may still be written (None: read it at once)."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        raise ModelError(f"engine = 'vllm' needs vLLM, which is not installed: {_INSTALL}") from None
    try:
        from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as connector
    except ImportError:
        raise ModelError(
            f"this version of vLLM cannot extract hidden states; install a newer one: {_INSTALL}"
        ) from None
    try:
        engine: Any = LLM(**engine_settings(config, layers, dtype, folder))
    except Exception as error:  # vLLM raises many kinds for models and machines it does not support
        raise ModelError(f"vLLM cannot run '{config.model}': {one_line(error)}") from error
    once = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)

    def generate(tokens: np.ndarray) -> list[Path]:
        outputs = engine.generate([{"prompt_token_ids": row.tolist()} for row in tokens], once, use_tqdm=False)
        paths = [(output.kv_transfer_params or {}).get("hidden_states_path") for output in outputs]
        found = [Path(path) for path in paths if path is not None]
        if len(found) < len(paths):
            raise ModelError("vLLM returned no hidden states for a context; its version may not support the model")
        return found

    return generate, getattr(connector, "load_hidden_states", lambda path: None)
