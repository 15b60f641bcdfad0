"""What `thresher hooks` is given."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from ..core.config import Config, Device


class HooksConfig(Config, frozen=True, kw_only=True):
    """The model and how it is loaded, as for a harvest."""

    model: Annotated[str, Meta(description="Folder or Hugging Face id of the language model.")]
    model_dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Meta(description="Data type the model runs in; auto is bfloat16 where the device has it."),
    ] = "auto"
    device: Device = "auto"
    revision: Annotated[str | None, Meta(description="Branch, tag or commit of the model.")] = None
    adapter: Annotated[
        str | None, Meta(description="Folder or Hugging Face id of a PEFT adapter to merge into the model.")
    ] = None
    trust_remote_code: Annotated[bool, Meta(description="Run Python code that comes with the model.")] = False
    attn_implementation: Annotated[
        str | None, Meta(description="How attention is computed: eager, sdpa, flash_attention_2, ...")
    ] = None
