"""The options of `thresher store import`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from ...core.config import Config

DEFAULT_CONTEXT = 128
Positive = Annotated[int, Meta(ge=1)]


class ImportConfig(Config, frozen=True):
    """Options of `import`."""

    source: Annotated[str, Meta(description="The folder or file to read.")]
    store: Annotated[str, Meta(description="The store to write: a folder, or a URL such as s3://bucket/prefix.")]
    format: Annotated[
        Literal["auto", "saelens", "saev", "llamascopium", "crosslayer-coding", "vllm", "safetensors"],
        Meta(description="What wrote the source; auto looks at its files."),
    ] = "auto"
    hook_points: Annotated[list[str] | None, Meta(description="Hook points to import (default: all).")] = None
    layers: Annotated[
        list[int] | None,
        Meta(description="vllm: the ids of the layers in each file (eagle_aux_hidden_state_layer_ids)."),
    ] = None
    aligned: Annotated[bool, Meta(description="crosslayer-coding: row r of all layers belongs to the same token.")] = (
        False
    )
    context_size: Annotated[
        Positive | None,
        Meta(description="Rows per context, for sources without contexts (default: 128)."),
    ] = None
    holdout_fraction: Annotated[
        float, Meta(ge=0, lt=1, description="Fraction of the documents, or of the contexts, to hold out from training.")
    ] = 0.05
    dtype: Annotated[
        Literal["source", "bfloat16", "float16", "float32"],
        Meta(description="Data type of the stored activations; source keeps every bit."),
    ] = "source"
    codec: Annotated[
        Literal["none", "lz4", "zstd", "int8"], Meta(description="Compression of the stored activations.")
    ] = "lz4"
    mask_token_ids: Annotated[list[int], Meta(description="Tokens whose rows are never used, such as the BOS.")] = []
    model: Annotated[str | None, Meta(description="The model of the activations, for the store's metadata.")] = None
    tokenizer: Annotated[str | None, Meta(description="The tokenizer of the tokens (default: the model's).")] = None
    cache: Annotated[str | None, Meta(description="Folder for shards to upload to an object store.")] = None
    threads: Annotated[Positive | None, Meta(description="Compression threads (default: one per core).")] = None
