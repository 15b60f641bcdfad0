"""Load language models and tokenizers as Hugging Face stores them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from .capture import capture as capture
from .capture import resolve_hook_points as resolve_hook_points
from .capture import splice as splice
from .device import choose_device
from .errors import ModelError
from .paths import expand_home

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def has_fast_bfloat16(device: str | torch.device) -> bool:
    """Tell whether the device multiplies bfloat16 matrices in hardware."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def model_dtype(dtype: str, device: str | torch.device) -> torch.dtype:
    """Return the data type to run a model in; "auto" is bfloat16 where the device has it, else float32."""
    if dtype == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    if dtype not in DTYPES:
        raise ModelError(f"expected model dtype auto, {', '.join(DTYPES)}; got '{dtype}'")
    return DTYPES[dtype]


def load_model(
    name_or_path: str, dtype: str = "auto", device: str | torch.device = "cpu", revision: str | None = None
) -> PreTrainedModel:
    """Load a pretrained model, ready for inference: evaluation mode, no gradients.

    Decoders load with their language-modelling head, encoders (the BERT family) bare. Raises
    `ModelError` when there is no such model, `ConfigError` when the device is not there.
    """
    name_or_path = expand_home(name_or_path)
    device = choose_device(str(device))
    _quiet_unless_terminal()
    config = load_model_config(name_or_path, revision)
    loader = AutoModel if is_encoder(config) else AutoModelForCausalLM
    try:
        model = loader.from_pretrained(name_or_path, dtype=model_dtype(dtype, device), revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load model '{name_or_path}': {_first_sentence(error)}") from None
    model.to(device=device)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return model.eval().requires_grad_(False)


def load_model_config(name_or_path: str, revision: str | None = None) -> PretrainedConfig:
    """Load a model's configuration alone, or raise `ModelError`."""
    try:
        return AutoConfig.from_pretrained(expand_home(name_or_path), revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"no model '{name_or_path}': expected a folder with config.json and weights, or a Hugging Face id "
            f"that can be reached; {_first_sentence(error)}"
        ) from None


def load_tokenizer(name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, or raise `ModelError`."""
    try:
        return AutoTokenizer.from_pretrained(expand_home(name_or_path), revision=revision)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"cannot load the tokenizer of '{name_or_path}': {_first_sentence(error)}") from None


def is_encoder(config: PretrainedConfig) -> bool:
    """Tell whether a configuration is a bidirectional encoder's (BERT, RoBERTa, ...)."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return True
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


def _quiet_unless_terminal() -> None:
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip()
