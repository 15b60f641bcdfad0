"""Models in GGUF files. Needs no PyTorch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...core.errors import ModelError


def gguf_file(model: str) -> Path | None:
    """Return the path of a model that is a GGUF file, or None.

    Raises:
        ModelError: what reads such files is not installed.
    """
    path = Path(model)
    if path.suffix != ".gguf" or not path.is_file():
        return None
    if find_spec("gguf") is None or find_spec("accelerate") is None:
        raise ModelError(f"to read '{model}', install gguf and accelerate: pip install 'thresher[gguf]'")
    return path


def gguf_options(model: str) -> tuple[str, dict[str, str]]:
    """Return the arguments by which transformers loads a model: its folder or id, and `gguf_file` for a GGUF file."""
    path = gguf_file(model)
    return (model, {}) if path is None else (str(path.parent), {"gguf_file": path.name})


def dequantized() -> dict[str, Any]:
    """Return what makes transformers unpack a GGUF file's weights, and not take the model for a quantised one.

    Releases without this option always unpack them, and do not mark the model.
    """
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}
