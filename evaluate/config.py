"""The configuration of `thresher evaluate`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from ..shared.core.config import (
    MAX_SEED,
    Cache,
    CacheBytes,
    Config,
    Device,
    DeviceMap,
    MaxMemory,
    OffloadFolder,
    Roles,
)


class EvaluateConfig(Config, frozen=True, kw_only=True):
    """Evaluate SAEs on a store's held-out contexts, and in the model with each SAE spliced in."""

    store: Annotated[
        str,
        Meta(
            description="Activation store whose held-out contexts are used: a folder or a URL such as s3://bucket/prefix."
        ),
    ]
    saes: Annotated[
        str | Annotated[list[str], Meta(min_length=1)],
        Meta(
            description="Folder of a sweep, or a list of SAEs: folders, files or hf://USER/REPO/path@revision, of any "
            "format that docs/formats.md lists."
        ),
    ]
    output: Annotated[str, Meta(description="Folder for metrics.json, metrics.parquet and report.html.")]
    model: Annotated[
        str | bool | None,
        Meta(
            description="Model to splice the SAEs into; its tokenizer is used if the store contains none. Default: the "
            "model that the store names. false: run without a model."
        ),
    ] = None
    model_dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"] | None,
        Meta(description="Data type of the model. Default: the one used in the harvest."),
    ] = None
    adapter: Annotated[
        str | bool | None,
        Meta(description="PEFT adapter to merge into the model. Default: the one used in the harvest. false: none."),
    ] = None
    trust_remote_code: Annotated[
        bool, Meta(description="Run the Python code that comes with the model and its tokenizer. Read it first.")
    ] = False
    attn_implementation: Annotated[
        str | None, Meta(description="Attention implementation of transformers. Default: the one used in the harvest.")
    ] = None
    device: Device = "auto"
    device_map: DeviceMap = None
    max_memory: MaxMemory = None
    offload_folder: OffloadFolder = None
    roles: Roles = None
    cache: Cache = None
    cache_bytes: CacheBytes = None
    max_rows: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="Largest number of held-out rows to use, evenly spaced. Default: all."),
    ] = None
    model_rows: Annotated[
        Annotated[int, Meta(ge=1)],
        Meta(description="Largest number of held-out tokens to run the model on, evenly spaced."),
    ] = 65536
    batch_size: Annotated[int, Meta(ge=1, description="Contexts per forward pass of the model.")] = 8
    block_rows: Annotated[int, Meta(ge=1, description="Rows to read from the store at a time, in whole contexts.")] = (
        8192
    )
    dictionary: Annotated[
        bool, Meta(description="Compare decoder directions: neighbours within each SAE, matches between SAEs.")
    ] = True
    n_neighbours: Annotated[int, Meta(ge=1, description="Number of nearest decoder neighbours per latent.")] = 5
    suite: Annotated[
        Literal["standard", "full"],
        Meta(
            description="full: also both baselines, stability over seeds, the amortisation gap and first-letter probes."
        ),
    ] = "standard"
    baselines: Annotated[
        list[Literal["pca", "neurons"]],
        Meta(
            description="Dictionaries to evaluate beside the SAEs, at their L0: principal components, and the hook "
            "point's own basis."
        ),
    ] = []
    refine: Annotated[
        Literal["none", "leave_one_out"],
        Meta(
            description="leave_one_out: also evaluate each autoencoder with latents dropped that the rest of its "
            "reconstruction does without, and save it in the folder `refined` of the output."
        ),
    ] = "none"
    probe_tasks: Annotated[
        int,
        Meta(
            ge=0,
            description="Number of next-token tasks for k-sparse probing, on at most `model_rows` rows; 0 for none.",
        ),
    ] = 0
    probe_texts: Annotated[
        str | None,
        Meta(
            description='JSONL file of labelled texts for k-sparse probing, one {"text": ..., "label": ...} per line, '
            "of at most `model_rows` tokens."
        ),
    ] = None
    ground_truth_rows: Annotated[
        int,
        Meta(
            ge=0,
            description="New rows to draw from the law of a synthetic store, to compare latents with its features; "
            "0 for none.",
        ),
    ] = 100_000
    feature_rows: Annotated[
        int,
        Meta(ge=0, description="Number of rows of the whole store to build the feature index from; 0 for no index."),
    ] = 1_000_000
    export: Annotated[
        list[Literal["neuronpedia"]],
        Meta(description="Formats to export the feature index to: `neuronpedia` writes SAEDashboard's JSON batches."),
    ] = []
    allow_other_model: Annotated[
        bool, Meta(description="Evaluate SAEs that were trained on another model than the store's.")
    ] = False
    bootstrap_samples: Annotated[
        int,
        Meta(ge=0, description="Bootstrap resamples of the documents for confidence intervals; 0 for no intervals."),
    ] = 1000
    seed: Annotated[
        int, Meta(ge=0, le=MAX_SEED, description="Seed of the bootstrap and of the rows chosen for probing.")
    ] = 0
