"""The settings of a harvest: the model, the text, the hook points and the store."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from ..shared.core.config import Config, DeviceMap, MaxMemory, OffloadFolder
from ..shared.store.format.layout import CHUNK_BYTES, SHARD_BYTES

Level = Annotated[int, Meta(ge=0, le=22)]
_Positive = Annotated[int, Meta(ge=1)]


class HarvestConfig(Config, frozen=True, kw_only=True):
    """Configuration of one harvest."""

    model: Annotated[
        str,
        Meta(
            description="Folder or Hugging Face id of the language model; or synthetic:LAW for rows that are sums of "
            "known features (docs/ground-truth.md)."
        ),
    ]
    hook_points: Annotated[
        list[str],
        Meta(
            min_length=1,
            description="Hook points to read, such as blocks.2.resid_post; `thresher hooks MODEL` lists them.",
        ),
    ]
    store: Annotated[
        str, Meta(min_length=1, description="Activation store to write: a folder, or a URL such as s3://bucket/prefix.")
    ]
    dataset: Annotated[
        str,
        Meta(
            description="python-stdlib; a file or folder of text, JSONL, CSV, Parquet or Arrow; or a Hugging Face "
            "dataset (docs/text.md)."
        ),
    ] = "python-stdlib"
    tokens: Annotated[
        int,
        Meta(ge=1, description="Rows to harvest, rounded up to whole contexts; a store with fewer rows is extended."),
    ] = 1_000_000
    context_size: Annotated[int, Meta(ge=2, description="Tokens per context.")] = 256
    batch_size: Annotated[int, Meta(ge=1, description="Contexts per forward pass.")] = 32
    holdout_fraction: Annotated[
        float, Meta(ge=0, lt=1, description="Fraction of the documents to hold out from training, chosen by hash.")
    ] = 0.05
    holdout: Annotated[
        Literal["documents", "contexts"],
        Meta(
            description="What to hold out: documents; or, for text with few documents, runs of contexts. The context "
            "before and the one after each run are left out of the store."
        ),
    ] = "documents"
    seed: Annotated[int, Meta(ge=0, description="Seed for the order of files.")] = 0
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], Meta(description="Data type of the stored activations.")
    ] = "bfloat16"
    codec: Annotated[
        Literal["none", "lz4", "zstd", "int8"], Meta(description="Compression of the stored activations.")
    ] = "lz4"
    codec_level: Annotated[Level | None, Meta(description="Compression level (default: the codec's).")] = None
    chunk_bytes: Annotated[int, Meta(ge=1, description="Target bytes per chunk, the unit of shuffling.")] = CHUNK_BYTES
    shard_bytes: Annotated[int, Meta(ge=1, description="Target bytes per shard, a file of chunks.")] = SHARD_BYTES
    cache: Annotated[
        str | None,
        Meta(description="Folder for shards to upload to an object store (default: the user's cache folder)."),
    ] = None
    threads: Annotated[_Positive | None, Meta(description="Compression threads (default: one per core).")] = None
    workers: Annotated[
        _Positive | None, Meta(description="Batches to run at once on a CPU, each on one core (default: one per core).")
    ] = None
    model_dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Meta(description="Data type of the model; auto uses bfloat16 if the device supports it."),
    ] = "auto"
    device: Annotated[
        str,
        Meta(
            description="auto, cpu, cuda or cuda:N; auto uses CUDA if available. Under torchrun each process uses its "
            "own GPU."
        ),
    ] = "auto"
    engine: Annotated[
        Literal["transformers", "vllm"],
        Meta(description="What runs the model; vllm gives the residual stream alone (docs/vllm.md)."),
    ] = "transformers"
    device_map: DeviceMap = None
    max_memory: MaxMemory = None
    offload_folder: OffloadFolder = None
    tensor_parallel: Annotated[
        int,
        Meta(
            ge=1,
            description="Processes that hold one model together, by transformers' tensor parallelism, under torchrun "
            "(docs/large-models.md); with vllm, its GPUs.",
        ),
    ] = 1
    revision: Annotated[str | None, Meta(description="Branch, tag or commit of the model.")] = None
    adapter: Annotated[
        str | None,
        Meta(
            description="Folder or Hugging Face id of a PEFT adapter, such as LoRA, to merge into the model "
            "(default: the one in the model's folder, if any)."
        ),
    ] = None
    trust_remote_code: Annotated[
        bool, Meta(description="Run the Python code of the model and its tokenizer; read it first.")
    ] = False
    attn_implementation: Annotated[
        str | None,
        Meta(
            description="Implementation of attention: eager, sdpa, flash_attention_2, ... (default: transformers' "
            "choice for the model)."
        ),
    ] = None
    dataset_config: Annotated[str | None, Meta(description="Configuration name of a dataset.")] = None
    dataset_revision: Annotated[str | None, Meta(description="Branch, tag or commit of the dataset.")] = None
    split: Annotated[
        str,
        Meta(description="Split of a Hugging Face dataset, or of local data files whose names tell their split."),
    ] = "train"
    files: Annotated[
        Annotated[list[str], Meta(min_length=1)] | None,
        Meta(description="Patterns of the files to read in a folder or dataset, such as *.jsonl (default: all)."),
    ] = None
    on_bad_document: Annotated[
        Literal["error", "skip"],
        Meta(description="What to do about a damaged document or file: stop with an error, or skip and count it."),
    ] = "error"
    text_column: Annotated[
        str,
        Meta(
            description="Column with the text, messages or token ids in JSONL, CSV, Parquet, Arrow and datasets; a "
            "nested column is written with dots, as in data.text."
        ),
    ] = "text"
    special_tokens: Annotated[
        Literal["text", "tokens"],
        Meta(
            description="How to tokenize special tokens that occur in the text: text treats them as plain text, "
            "tokens as special tokens (messages always do)."
        ),
    ] = "text"
    chat_template: Annotated[
        str | None,
        Meta(
            description="Template for a column of messages: a file or the template itself (default: the tokenizer's)."
        ),
    ] = None
    streaming: Annotated[bool, Meta(description="Read a Hugging Face dataset while it downloads.")] = False
    bos_token: Annotated[
        str | None, Meta(description="Token to put before each document (default: the tokenizer's BOS, CLS or EOS).")
    ] = None
    bos_every_context: Annotated[
        bool,
        Meta(
            description="Also start contexts that continue a document with a BOS: the first position's norm is an "
            "outlier, and a BOS is masked."
        ),
    ] = True

    @property
    def n_contexts(self) -> int:
        """The number of contexts that hold `tokens` rows."""
        return -(-self.tokens // self.context_size)
