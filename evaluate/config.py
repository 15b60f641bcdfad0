"""The configuration of `thresher evaluate`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from ..shared.core.config import MAX_SEED, Cache, CacheBytes, Config, Device, Roles


class EvaluateConfig(Config, frozen=True, kw_only=True):
    """Judge SAEs on the held-out contexts of a store and, spliced, in the model."""

    store: Annotated[
        str,
        Meta(
            description="Activation store whose held-out contexts are used: a folder, or a URL as s3://bucket/prefix."
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
            description="Model to splice the SAEs into, and its tokenizer where the store keeps none; by default those "
            "that the store names; false for none."
        ),
    ] = None
    model_dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"] | None,
        Meta(description="Data type of the model; by default the one the store was harvested in."),
    ] = None
    adapter: Annotated[
        str | bool | None,
        Meta(description="PEFT adapter to merge into the model; by default the one harvested with; false for none."),
    ] = None
    trust_remote_code: Annotated[
        bool, Meta(description="Run Python code that comes with the model and its tokenizer; read it first.")
    ] = False
    attn_implementation: Annotated[
        str | None, Meta(description="How attention is computed; by default as in the harvest.")
    ] = None
    device: Device = "auto"
    roles: Roles = None
    cache: Cache = None
    cache_bytes: CacheBytes = None
    max_rows: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="Held-out rows to use, spread evenly over them; by default all."),
    ] = None
    model_rows: Annotated[
        Annotated[int, Meta(ge=1)], Meta(description="Held-out tokens to run the model on, at most, spread evenly.")
    ] = 65536
    batch_size: Annotated[int, Meta(ge=1, description="Contexts per forward pass of the model.")] = 8
    block_rows: Annotated[int, Meta(ge=1, description="Rows read from the store at a time, in whole contexts.")] = 8192
    dictionary: Annotated[
        bool, Meta(description="Measure decoder directions: neighbours within each SAE, matches between SAEs.")
    ] = True
    n_neighbours: Annotated[int, Meta(ge=1, description="Nearest decoder neighbours to write for each latent.")] = 5
    probe_tasks: Annotated[
        int, Meta(ge=0, description="Next-token tasks for k-sparse probing, on at most `model_rows` rows; 0 for none.")
    ] = 0
    feature_rows: Annotated[
        int,
        Meta(ge=0, description="Rows of the whole store that the feature index is built from; 0 for no index."),
    ] = 1_000_000
    export: Annotated[
        list[Literal["neuronpedia"]],
        Meta(description="Formats to export the feature index to: `neuronpedia` writes SAEDashboard's JSON batches."),
    ] = []
    allow_other_model: Annotated[
        bool, Meta(description="Evaluate SAEs that were trained on another model than the store's.")
    ] = False
    bootstrap_samples: Annotated[
        int, Meta(ge=0, description="Resamples of the documents for the confidence intervals; 0 for none.")
    ] = 1000
    seed: Annotated[
        int, Meta(ge=0, le=MAX_SEED, description="Seed of the resampling and of the rows that probes draw.")
    ] = 0
