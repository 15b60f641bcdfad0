"""Load language models and tokenizers in Hugging Face's format."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
)
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from ..core.compute.device import choose_device
from ..core.errors import ModelError, ThresherError, one_line
from ..core.paths import expand_home
from ..core.terminal.logs import adopt_library_logs
from ..core.terminal.progress import library_bars
from .capture import capture as capture
from .capture import resolve_hook_points as resolve_hook_points
from .capture import splice as splice
from .loading.adapters import ModelParts, adapted_base, apply_adapter, model_parts
from .loading.checkpoint_keys import check_checkpoint_keys
from .loading.gguf import dequantized, gguf_file, gguf_options
from .loading.packages import local_model
from .loading.placement import Spread, input_device, remove_with, spreading
from .loading.tensor_parallel import Team, check_divides, dividing
from .loading.tokenizer_files import needs_no_vocabulary, vocabulary_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LOADING = threading.RLock()
"""Held while a model is loaded: transformers changes global state meanwhile, and two at once lose weights."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

NOT_TEXT = ("pixel_values", "input_features", "input_values", "decoder_input_ids")
EXPECTED = "expected a decoder such as GPT-2 or Llama, or an encoder such as BERT"


def has_fast_bfloat16(device: str | torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices in hardware."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def model_dtype(dtype: str, device: str | torch.device) -> torch.dtype:
    """Return the data type to run a model in; "auto" is bfloat16 if the hardware supports it, else float32."""
    if dtype == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    if dtype not in DTYPES:
        raise ModelError(f"expected model dtype auto, {', '.join(DTYPES)}, got '{dtype}'")
    return DTYPES[dtype]


def load_model(
    name_or_path: str,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    *,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    spread: Spread | None = None,
    team: Team | None = None,
) -> PreTrainedModel:
    """Load a pretrained model for inference: in evaluation mode, without gradients.

    Decoders are loaded with their language-modelling head, encoders (the BERT family) without a head. An adapter,
    either named or in the model's folder, is merged into the weights. With `spread`, the model is spread over devices
    instead of `device`; with `team`, it is divided among the team's processes, which all call this function.

    Raises:
        ModelError: the model does not exist, its weights do not match its configuration exactly, it does not run
            on tokens alone, or it cannot be divided.
        ConfigError: the device is not available.
    """
    name_or_path, adapter = local_model(name_or_path), expand_home(adapter)
    device = choose_device(str(device))
    torch_dtype = model_dtype(dtype, device)
    parts = _find_parts(name_or_path, revision, adapter)
    base_revision, adapter_revision = _revisions(name_or_path, revision, parts)
    config = load_model_config(parts.base, base_revision, trust_remote_code)
    _check_reads_tokens(config, name_or_path)
    loader = AutoModel if is_encoder(config) else AutoModelForCausalLM
    options: dict[str, Any] = {"revision": base_revision, "trust_remote_code": trust_remote_code}
    base, gguf = gguf_options(parts.base)
    if gguf:
        options |= gguf | dequantized()
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if parts.adapter is not None:
        options["adapter_kwargs"] = {"subfolder": "none"}  # otherwise transformers applies it without checking weights
    if parts.adapter is not None and (spread or team):
        raise ModelError(
            f"the adapter '{parts.adapter}' can only be merged into a model on one device; merge it first "
            "(merge_and_unload, save_pretrained), and give the folder of the merged model"
        )
    if team is not None:
        check_divides(config, name_or_path, team.n)
    try:
        with LOADING, only_errors_shown(), spreading(spread) as (spread_options, temporary):
            model, info = loader.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                base,
                dtype=torch_dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # check_checkpoint_keys reports them
                **options | spread_options | dividing(team, torch.device(device)),
            )
            remove_with(model, temporary)
            partial = loader is AutoModel or type(model.config) is not type(config)
            check_checkpoint_keys(model, info, name_or_path, partial)
            if parts.adapter is not None:
                model = apply_adapter(model, parts.adapter, adapter_revision)
            if spread is None and team is None:
                model.to(device=device)  # pyright: ignore[reportCallIssue, reportArgumentType]
            model.eval().requires_grad_(False)
            _check_runs_on_tokens(model, name_or_path)
    except ThresherError:
        raise
    except Exception as error:  # the libraries raise many kinds of errors for files they do not expect
        raise ModelError(f"cannot load model '{name_or_path}': {_reason(error, config)}") from error
    return model


def load_model_config(
    name_or_path: str, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """Load only a model's configuration, or raise `ModelError`."""
    name = local_model(name_or_path)
    if Path(name).is_file() and gguf_file(name) is None:
        raise ModelError(
            f"'{name_or_path}' is a file; expected the folder with config.json and the weights, or a .gguf file"
        )
    name, gguf = gguf_options(name)
    try:
        with only_errors_shown():
            return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code, **gguf)
    except Exception as error:  # as in load_model
        raise ModelError(
            f"no model '{name_or_path}': expected a folder with config.json and weights, or the id of a model that "
            f"Hugging Face serves; {_reason(error)}"
        ) from error


def load_tokenizer(
    name_or_path: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; for an adapter without a tokenizer, that of its base model.

    Raises `ModelError` if there is none. In that case transformers may build one from a few special tokens instead.
    """
    name = local_model(name_or_path)
    if gguf_file(name) is not None:
        return _tokenizer_of_gguf(name)
    if Path(name).is_file():
        raise ModelError(f"'{name_or_path}' is a file; expected the folder with the tokenizer, or a .gguf file")
    parts = _find_parts(name, revision, None)
    if parts.base != name and not _has_tokenizer(name, revision):
        name, revision = parts.base, _revisions(name, revision, parts)[0]
    no_tokenizer = (
        f"'{name_or_path}' contains no tokenizer: expected a vocabulary such as tokenizer.json beside config.json; "
        "save the model's tokenizer there too (tokenizer.save_pretrained)"
    )
    try:
        with only_errors_shown():
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # as in load_model
        found = vocabulary_files(name, revision) or []
        if Path(name).is_dir() and not found:
            raise ModelError(no_tokenizer) from error
        reason = _reason(error)
        if any(file.endswith(".model") for file in found) and find_spec("sentencepiece") is None:
            reason = "its vocabulary is a SentencePiece model; to read it, pip install sentencepiece protobuf"
        raise ModelError(f"cannot load the tokenizer of '{name_or_path}': {reason}") from error
    kind = type(tokenizer)
    if vocabulary_files(name, revision, kind) == [] and not needs_no_vocabulary(kind):
        raise ModelError(no_tokenizer)
    return tokenizer


def _tokenizer_of_gguf(name: str) -> PreTrainedTokenizerBase:
    folder, gguf = gguf_options(name)
    try:
        with only_errors_shown():
            return AutoTokenizer.from_pretrained(folder, **gguf)
    except Exception as error:  # as in load_model
        raise ModelError(f"cannot load the tokenizer of '{name}': {_reason(error)}") from error


def is_encoder(config: PretrainedConfig) -> bool:
    """Return whether a configuration belongs to a model that does not predict the next token (BERT, RoBERTa, ...)."""
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return False
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or _was_saved_bare(config):
        return True
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


def _was_saved_bare(config: PretrainedConfig) -> bool:
    """Return whether a decoder was saved without a head, like a text embedder, and has no tied embeddings."""
    bare = getattr(MODEL_MAPPING.get(type(config), None), "__name__", None)
    named = getattr(config, "architectures", None) or []
    return bare in named and not getattr(config, "tie_word_embeddings", False)


def _has_tokenizer(name: str, revision: str | None) -> bool:
    """Return whether an adapter's folder or repository contains a tokenizer."""
    if Path(name).is_dir():
        return bool(vocabulary_files(name))
    try:
        return cached_file(name, "tokenizer.json", revision=revision) is not None
    except OSError:
        return False


def _find_parts(name: str, revision: str | None, adapter: str | None) -> ModelParts:
    """Return base model and adapter, also if the name is the Hugging Face id of an adapter."""
    parts = model_parts(name, adapter)
    if parts.adapter is not None or Path(parts.base).exists():
        return parts
    try:
        found = find_adapter_config_file(parts.base, revision=revision)
    except Exception:  # no such model: loading its configuration reports this
        found = None
    return parts if found is None else adapted_base(Path(found), parts.base)


def _revisions(name: str, revision: str | None, parts: ModelParts) -> tuple[str | None, str | None]:
    """Return the revisions of base model and adapter; the requested one applies to what the name refers to.

    A folder has no revision: with an adapter's folder, the requested revision applies to the base model.
    """
    if parts.base == name:
        return revision, None
    if Path(name).is_dir():
        return revision or parts.base_revision, None
    return parts.base_revision, revision


def _check_reads_tokens(config: PretrainedConfig, name: str) -> None:
    """Raise `ModelError` if a configuration belongs to neither a decoder nor an encoder of text."""
    if any(str(kind).endswith("ForCausalLM") for kind in getattr(config, "architectures", None) or []):
        return  # includes decoders saved without their encoder, such as BartForCausalLM
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"'{name}' is an encoder-decoder ({config.model_type}); {EXPECTED}")
    built = MODEL_MAPPING.get(type(config), None)
    reads = getattr(built, "main_input_name", "input_ids")
    if reads != "input_ids" and not hasattr(config, "text_config"):
        raise ModelError(f"'{name}' ({config.model_type}) reads {reads}, not tokens; {EXPECTED}")


def _check_runs_on_tokens(model: PreTrainedModel, name: str) -> None:
    """Raise `ModelError` for a model that cannot run on tokens alone."""
    tokens = torch.zeros(1, 3, dtype=torch.long, device=input_device(model))
    config = getattr(model.base_model, "config", None)
    options = {"use_cache": False} if hasattr(config, "use_cache") else {}
    try:
        with torch.no_grad():
            model.base_model(input_ids=tokens, **options)
    except Exception as error:
        others = [key for key in inspect.signature(model.base_model.forward).parameters if key in NOT_TEXT]
        reason = f": {_reason(error)}" if not others or isinstance(error, (ValueError, RuntimeError)) else ""
        reads = f" (it also reads {', '.join(others)})" if others else ""
        raise ModelError(
            f"'{name}' ({type(model).__name__}) cannot run on tokens alone{reads}{reason}; {EXPECTED}"
        ) from error


@contextmanager
def only_errors_shown() -> Iterator[None]:
    """Silence transformers' warnings, which our errors replace, and bars where `progress` shows none."""
    adopt_library_logs()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with library_bars():
            yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def _reason(error: Exception, config: PretrainedConfig | None = None) -> str:
    """Return an error's reason in one line, reworded with advice if the library's message does not fit."""
    if "trust_remote_code" in str(error):
        return "it comes with its own code; read that code, then set trust_remote_code = true"
    message = one_line(error)
    if "Repo id must be" in message:
        return "there is no such folder, and it is not a Hugging Face id"
    quantised: Any = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        return f"it is quantised ({method}); {message}; install what that needs, or give the unquantised model"
    return message
