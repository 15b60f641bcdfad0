"""Find, identify and apply a PEFT adapter, such as LoRA, which changes the weights of a base model.

Importing this module imports neither PyTorch nor PEFT.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...core.errors import ModelError, one_line
from ...core.paths import expand_home

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "model.safetensors.index.json")


class ModelParts(NamedTuple):
    """A base model and the adapter to merge into it, each a folder or a Hugging Face id."""

    base: str
    adapter: str | None
    base_revision: str | None = None
    """Branch, tag or commit of the base model, from the adapter's configuration."""


def model_parts(model: str, adapter: str | None = None) -> ModelParts:
    """Split a model into base model and adapter, as far as local files tell.

    A folder with `adapter_config.json` is an adapter of the model in the same folder or, if that folder has no model
    weights, of the model that the file names. Raises `ModelError` if there are two adapters.
    """
    model = expand_home(model)
    adapter = expand_home(adapter)
    folder = Path(model)
    if not (folder / ADAPTER_CONFIG).is_file():
        return ModelParts(model, adapter)
    if adapter is not None and Path(adapter).resolve() != folder.resolve():
        raise ModelError(
            f"expected one adapter, got two: '{model}' contains one, and adapter = '{adapter}' names another; "
            "give the base model's folder as model"
        )
    if any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        return ModelParts(model, model)
    parts = adapted_base(folder / ADAPTER_CONFIG, model)
    if (Path(parts.base) / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"expected one adapter, got two: '{model}' is one, and the folder of its base model '{parts.base}' has "
            f"another; merge that one into its model first, or move {ADAPTER_CONFIG} out of that folder"
        )
    return parts


def adapted_base(adapter_config: Path, adapter: str) -> ModelParts:
    """Return an adapter and the base model that its configuration file names, or raise `ModelError`."""
    try:
        settings = json.loads(adapter_config.read_text(encoding="utf-8"))
        base, revision = settings["base_model_name_or_path"], settings.get("revision")
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        base, revision = None, None
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"'{adapter_config}' names no base model: expected JSON with base_model_name_or_path; "
            f"give the base model as model, and '{adapter_config.parent}' as adapter"
        )
    return ModelParts(expand_home(base), adapter, revision)


def apply_adapter(model: PreTrainedModel, adapter: str, revision: str | None = None) -> PreTrainedModel:
    """Merge an adapter's weights into the model and return it; its modules keep their names.

    Raises `ModelError` if PEFT is not installed, if the adapter cannot be merged, or if its weights do not all fit the
    model.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError:
        raise ModelError(
            f"the adapter '{adapter}' needs PEFT, which is not installed: pip install 'thresher[adapters]'; "
            "or give a model without an adapter"
        ) from None
    if getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(f"the adapter '{adapter}' cannot be merged into a quantised model; give the unquantised model")
    try:
        config = PeftConfig.from_pretrained(adapter, revision=revision)
        if config.is_prompt_learning:
            raise ModelError(
                f"the adapter '{adapter}' is {config.peft_type}, which adds tokens to the text; "
                "expected one that changes weights, such as LoRA"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = PeftModel(model, config)
            loaded = wrapped.load_adapter(adapter, "default", revision=revision)
            unmatched = [*loaded.missing_keys, *loaded.unexpected_keys]
            if unmatched:
                raise ModelError(
                    f"the adapter '{adapter}' does not fit {type(model).__name__}: {len(unmatched)} of its weights "
                    f"have no counterpart, such as {unmatched[0]}; give the adapter of this model"
                )
            return wrapped.merge_and_unload(safe_merge=True)  # pyright: ignore[reportReturnType, reportCallIssue]
    except ModelError:
        raise
    except Exception as error:  # PEFT raises many kinds of errors for files it does not expect
        raise ModelError(
            f"cannot apply the adapter '{adapter}' to {type(model).__name__}: {one_line(error)}"
        ) from error
