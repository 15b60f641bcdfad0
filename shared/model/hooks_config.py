"""The configuration of `thresher hooks`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from ..core.config import Config, Device, DeviceMap, MaxMemory, OffloadFolder


class HooksConfig(Config, frozen=True, kw_only=True):
    """The model, loaded with the same settings as for a harvest."""

    model: Annotated[str, Meta(description="Folder or Hugging Face id of the language model.")]
    model_dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Meta(description="Data type of the model. auto: bfloat16 if the device supports it in hardware, else float32."),
    ] = "auto"
    device: Device = "auto"
    device_map: DeviceMap = None
    max_memory: MaxMemory = None
    offload_folder: OffloadFolder = None
    revision: Annotated[str | None, Meta(description="Branch, tag or commit of the model.")] = None
    adapter: Annotated[
        str | None, Meta(description="Folder or Hugging Face id of a PEFT adapter to merge into the model.")
    ] = None
    trust_remote_code: Annotated[bool, Meta(description="Run the Python code that comes with the model.")] = False
    attn_implementation: Annotated[
        str | None, Meta(description="Attention implementation of transformers: eager, sdpa, flash_attention_2, ...")
    ] = None
