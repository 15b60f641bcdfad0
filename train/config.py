"""The training stage's configuration."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from ..shared.core.config import MAX_SEED, Cache, CacheBytes, Config, Device, Roles
from ..shared.model.wiring import Wiring

HookPoints = str | tuple[str, ...]
"""One hook point, or several whose rows are concatenated."""


class SaeConfig(Config, frozen=True, kw_only=True):
    """The keys that all `[[sae]]` tables share, after grids are expanded.

    Each architecture adds its own keys in a subclass, in its file in `train/architectures`.
    """

    hook_point: Annotated[
        str, Meta(description="Hook point to read and write, unless `reads` or `hook_points` is given.")
    ]
    d_sae: Annotated[int, Meta(ge=1, description="Number of latents; of a cross-layer transcoder, per layer.")]
    architecture: Annotated[str, Meta(description="Name of the architecture.")] = "topk"
    name: Annotated[
        str | None, Meta(description="Name of the SAE's folder; may contain other keys, as in topk-k{k}.")
    ] = None
    lr: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="Peak learning rate; the recipe's if not given."),
    ] = None
    beta1: Annotated[
        Annotated[float, Meta(ge=0, lt=1)] | None,
        Meta(description="Adam's decay rate of gradients; the recipe's if not given."),
    ] = None
    beta2: Annotated[
        Annotated[float, Meta(ge=0, lt=1)] | None,
        Meta(description="Adam's decay rate of squared gradients; the recipe's if not given."),
    ] = None
    decoder_lr_scale: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="Factor of the decoder's learning rate; the recipe's if not given."),
    ] = None
    weight_decay: Annotated[
        float, Meta(ge=0, description="AdamW's decay of the weight matrices, times the learning rate; 0 is Adam.")
    ] = 0.0
    lr_decay: Annotated[
        Literal["linear", "cosine"] | None,
        Meta(description="Shape of the learning rate's decay; the run's if not given."),
    ] = None
    decay_fraction: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        Meta(description="Last fraction of the run, over which the learning rate decays; the run's if not given."),
    ] = None
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED, description="Seed of the initial weights.")] = 0
    init_from: Annotated[
        str | None,
        Meta(
            description="Trained SAE to start from, of any format that docs/formats.md lists: a folder, a file or "
            "hf://USER/REPO/path@revision."
        ),
    ] = None
    dead_after_tokens: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(
            description="A latent is dead when it has not fired for this many tokens; a tenth of the run, at most 10 "
            "million, if not given."
        ),
    ] = None
    clip_grad_norm: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="Largest norm of the gradient; it is not clipped if not given."),
    ] = None
    resample_every_tokens: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(
            description="Tokens between resamplings of dead latents, in the first half of the run; never if not given."
        ),
    ] = None
    freeze: Annotated[
        tuple[str, ...] | None,
        Meta(
            description="Parameters that keep their initial values, such as W_dec: a baseline that any SAE should beat."
        ),
    ] = None
    hook_points: Annotated[
        tuple[str, ...] | None, Meta(description="Several hook points of equal width to read and write: a crosscoder.")
    ] = None
    reads: Annotated[
        HookPoints | None,
        Meta(description="Hook point to read, or several of equal width, if `writes` names others."),
    ] = None
    writes: Annotated[
        HookPoints | None, Meta(description="Hook point to reconstruct from `reads`, or several of equal width.")
    ] = None
    skip: Annotated[
        bool | None, Meta(description="Add a linear path from `reads` to `writes`, which starts at zero.")
    ] = None
    cross_layer: Annotated[
        bool | None,
        Meta(
            description="Train a transcoder per pair of `reads` and `writes`, both in the order of the layers; its "
            "d_sae latents also write to all later `writes`."
        ),
    ] = None
    hook_point_out: Annotated[
        str | None, Meta(description="Older spelling of `writes`, for a transcoder or skip_transcoder.")
    ] = None
    ema_decay: Annotated[
        Annotated[float, Meta(gt=0, lt=1)] | None,
        Meta(description="Decay of a running mean of the weights, which is then saved; none if not given."),
    ] = None

    unused: ClassVar[tuple[str, ...]] = ("hook_point_out",)
    """Keys of this class that the architecture does not use."""
    always_skips: ClassVar[bool] = False
    """Whether the architecture has a skip path without `skip = true`."""

    @property
    def name_ending(self) -> str:
        """The end of the default name, after `{architecture}-{hook_point}-{d_sae}`."""
        return ""

    @property
    def n_latents(self) -> int:
        """Return the number of latents; a cross-layer transcoder's are counted over all layers."""
        return self.d_sae * (len(self.reads) if self.cross_layer and isinstance(self.reads, tuple) else 1)

    @property
    def wiring(self) -> Wiring:
        """Return what is read and what is written, in whichever way the table spells it."""
        reads = self.hook_points if self.reads is None else self.reads
        writes = self.hook_point_out if self.writes is None else self.writes
        skip = self.skip is True or self.always_skips
        return Wiring.of(self.hook_point if reads is None else reads, writes, skip, self.cross_layer is True)


class TrainConfig(Config, frozen=True, kw_only=True):
    """What to train, on which store, and for how long."""

    store: Annotated[str, Meta(description="Activation store: a folder, or a URL such as s3://bucket/prefix.")]
    output: Annotated[str, Meta(description="Folder for the SAEs, one sub-folder each.")]
    sae: Annotated[
        list[Any],
        Meta(
            min_length=1, description="The sweep, as [[sae]] tables: a list is a grid, `samples` draws random values."
        ),
    ]
    batch_size: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="Activations per step; 4096, or fewer in short runs, if not given."),
    ] = None
    tokens: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="Activations to train on; `epochs` passes if not given. More continue a finished run."),
    ] = None
    epochs: Annotated[float, Meta(gt=0, description="Passes over the store when `tokens` is not given.")] = 1.0
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED, description="Seed of the order of the activations.")] = 0
    recipe: Annotated[
        Literal["auto", "published"],
        Meta(
            description="Settings that tables leave open: auto chooses them for the run's length and widths, published "
            "takes those of the literature, for runs of 10^5 steps."
        ),
    ] = "auto"
    warmup_steps: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(
            description="Steps over which the learning rate grows from zero; a twentieth of the run, at most 1000, if "
            "not given, and 1000 with recipe = published."
        ),
    ] = None
    decay_fraction: Annotated[
        float, Meta(ge=0, le=1, description="Last fraction of the run, over which the learning rate decays to zero.")
    ] = 0.2
    lr_decay: Annotated[
        Literal["linear", "cosine"],
        Meta(
            description="Shape of the decay: linear, or half a cosine; decay_fraction = 1 is a whole cosine schedule."
        ),
    ] = "linear"
    init_from: Annotated[
        str | None,
        Meta(
            description="Trained SAE to start every SAE from, or a run's output: each starts from the SAE of its name."
        ),
    ] = None
    documents: Annotated[
        Literal["even", "odd"] | None,
        Meta(
            description="Train on half of the documents, those of even or odd number in the store: two runs show what "
            "depends on the data (default: all)."
        ),
    ] = None
    normalize_activations: Annotated[
        Literal["expected_average_only_in", "none"],
        Meta(
            description="Scale centred inputs to a mean norm of sqrt(d_in), or only centre them; folded into the saved "
            "weights."
        ),
    ] = "expected_average_only_in"
    max_row_norm: Annotated[
        float,
        Meta(
            ge=0,
            description="In training, shorten rows (with jumprelu, their errors) whose distance from the mean is "
            "larger than this many times the median distance, so that a few tokens with massive activations do not "
            "make up the loss; 0 shortens none.",
        ),
    ] = 10.0
    rotation: Annotated[
        Literal["pca", "none"] | None,
        Meta(
            description="pca: train along the principal axes of each hook point's rows, and rotate the saved weights "
            "back; if not given, the recipe's, and not for transcoders."
        ),
    ] = None
    compute_dtype: Annotated[
        Literal["bfloat16", "float32"], Meta(description="Precision of the encoder's matrix product.")
    ] = "bfloat16"
    device: Device = "auto"
    kernels: Annotated[
        Literal["auto", "reference"],
        Meta(description="auto: Triton kernels on CUDA, native operations on a CPU; reference: plain PyTorch."),
    ] = "auto"
    cuda_graphs: Annotated[
        bool,
        Meta(description="On CUDA, replay steps whose shapes have settled as graphs; false launches every kernel."),
    ] = True
    window_bytes: Annotated[
        int, Meta(ge=1, description="Memory for shuffling, in bytes per hook point; a larger window mixes more.")
    ] = 2 << 30
    roles: Roles = None
    cache: Cache = None
    cache_bytes: CacheBytes = None
    checkpoint_every_tokens: Annotated[int, Meta(ge=1, description="Tokens between checkpoints.")] = 50_000_000
    keep_checkpoints: Annotated[
        int, Meta(ge=1, description="Checkpoints to keep, including the one at the end of the run.")
    ] = 2
    save_every_tokens: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(
            description="Tokens between SAEs that are saved as they are then, as folders in each SAE's checkpoints "
            "(default: none)."
        ),
    ] = None
    log_every_steps: Annotated[int, Meta(ge=1, description="Steps between lines of metrics.jsonl.")] = 1
    tensorboard: Annotated[bool, Meta(description="Also write TensorBoard event files, if it is installed.")] = False
    wandb: Annotated[
        Literal["off", "offline", "online"],
        Meta(description="Also log to Weights & Biases, if it is installed; offline needs no network."),
    ] = "off"
    wandb_project: Annotated[str, Meta(description="Project of the Weights & Biases runs, one per SAE.")] = "thresher"
    parallel: Annotated[
        Literal["spread", "data", "latents"],
        Meta(
            description="Under torchrun: spread the SAEs over processes, train each on slices of every batch, or shard "
            "each over its latents."
        ),
    ] = "spread"
    dry_run: Annotated[bool, Meta(description="Print the plan and stop.")] = False
