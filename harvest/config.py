"""What a harvest is: the model, the text, the hook points and the store."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from ..shared.core.config import Config
from ..shared.store.format.layout import CHUNK_BYTES, SHARD_BYTES

Level = Annotated[int, Meta(ge=0, le=22)]
Positive = Annotated[int, Meta(ge=1)]


class HarvestConfig(Config, frozen=True, kw_only=True):
    """Configuration of one harvest."""

    model: Annotated[str, Meta(description="Folder or Hugging Face id of the language model.")]
    hook_points: Annotated[
        list[str],
        Meta(
            min_length=1,
            description="Where to read activations, such as blocks.2.resid_post; `thresher hooks MODEL` lists them.",
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
        Meta(ge=1, description="Rows to harvest, rounded up to whole contexts; a store that holds fewer is extended."),
    ] = 1_000_000
    context_size: Annotated[int, Meta(ge=2, description="Tokens in a context.")] = 256
    batch_size: Annotated[int, Meta(ge=1, description="Contexts in a forward pass.")] = 32
    holdout_fraction: Annotated[
        float, Meta(ge=0, lt=1, description="Fraction of the documents, chosen by hash, never trained on.")
    ] = 0.05
    holdout: Annotated[
        Literal["documents", "contexts"],
        Meta(
            description="What is held out: documents; or, for text of few documents, runs of contexts, one context "
            "before and behind each left out of the store."
        ),
    ] = "documents"
    seed: Annotated[int, Meta(ge=0, description="Seed of the order of files.")] = 0
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], Meta(description="Data type of the stored activations.")
    ] = "bfloat16"
    codec: Annotated[
        Literal["none", "lz4", "zstd", "int8"], Meta(description="Compression of the stored activations.")
    ] = "lz4"
    codec_level: Annotated[Level | None, Meta(description="Level of the compression; the codec's own when absent.")] = (
        None
    )
    chunk_bytes: Annotated[int, Meta(ge=1, description="Target bytes of a chunk, the unit of shuffling.")] = CHUNK_BYTES
    shard_bytes: Annotated[int, Meta(ge=1, description="Target bytes of a shard, a file of chunks.")] = SHARD_BYTES
    cache: Annotated[
        str | None,
        Meta(description="Folder where shards wait to be uploaded to an object store; the user's cache when absent."),
    ] = None
    threads: Annotated[Positive | None, Meta(description="Threads that compress; one per core when absent.")] = None
    workers: Annotated[
        Positive | None, Meta(description="Batches that run at once on a CPU, one core each; one per core when absent.")
    ] = None
    model_dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Meta(description="Data type the model runs in; auto is bfloat16 where the device has it."),
    ] = "auto"
    device: Annotated[
        str,
        Meta(
            description="auto, cpu, cuda or cuda:N; auto is CUDA where there is any, "
            "of several processes on a machine each its own GPU."
        ),
    ] = "auto"
    revision: Annotated[str | None, Meta(description="Branch, tag or commit of the model.")] = None
    adapter: Annotated[
        str | None,
        Meta(
            description="Folder or Hugging Face id of a PEFT adapter, such as LoRA's, to merge into the model; "
            "by default the one in the model's folder, if any."
        ),
    ] = None
    trust_remote_code: Annotated[
        bool, Meta(description="Run Python code that comes with the model and its tokenizer; read it first.")
    ] = False
    attn_implementation: Annotated[
        str | None,
        Meta(
            description="How attention is computed: eager, sdpa, flash_attention_2, ...; transformers' choice for the "
            "model when absent."
        ),
    ] = None
    dataset_config: Annotated[str | None, Meta(description="Configuration name of a dataset.")] = None
    dataset_revision: Annotated[str | None, Meta(description="Branch, tag or commit of the dataset.")] = None
    split: Annotated[
        str,
        Meta(description="Split of a Hugging Face dataset, or of local data files that are named by split."),
    ] = "train"
    files: Annotated[
        Annotated[list[str], Meta(min_length=1)] | None,
        Meta(description="Patterns of the files to read in a folder or dataset, such as *.jsonl; all when absent."),
    ] = None
    on_bad_document: Annotated[
        Literal["error", "skip"],
        Meta(description="What a damaged document or file does: end the harvest, or be passed over and counted."),
    ] = "error"
    text_column: Annotated[
        str,
        Meta(
            description="Column of the text, messages or token ids in JSONL, CSV, Parquet, Arrow and datasets; "
            "dots lead into nested columns, as in data.text."
        ),
    ] = "text"
    special_tokens: Annotated[
        Literal["text", "tokens"],
        Meta(
            description="Special tokens that the text spells out: text tokenizes them as the plain text they are, "
            "tokens keeps each as the one special token (messages always do)."
        ),
    ] = "text"
    chat_template: Annotated[
        str | None,
        Meta(description="Template for a column of messages: a file, or its text; the tokenizer's own when absent."),
    ] = None
    streaming: Annotated[bool, Meta(description="Read a Hugging Face dataset as it downloads.")] = False
    bos_token: Annotated[
        str | None, Meta(description="Token put before each document; the tokenizer's BOS, CLS or EOS when absent.")
    ] = None
    bos_every_context: Annotated[
        bool,
        Meta(
            description="Also begin with a BOS the contexts that go on with a document: the first position's "
            "norm is an outlier, and as a BOS it is masked."
        ),
    ] = True

    @property
    def n_contexts(self) -> int:
        """Contexts that hold `tokens` rows."""
        return -(-self.tokens // self.context_size)
