"""A first run on a user's model and text: choose its settings, try them, and write them with what they take."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thresher.evaluate.config import EvaluateConfig
from thresher.harvest.config import HarvestConfig
from thresher.harvest.estimate import check_disk, estimate, human_bytes
from thresher.init_command import InitConfig
from thresher.init_estimate import measure_run
from thresher.shared.core.config import Config
from thresher.shared.core.disk import check_output, write_file
from thresher.shared.core.errors import ConfigError, ModelError
from thresher.shared.core.paths import user_path
from thresher.shared.core.terminal.results import print_result
from thresher.shared.model.language_model import is_encoder, load_model_config
from thresher.shared.synthetic.law import is_synthetic
from thresher.toml_comments import commented_toml
from thresher.train.config import SaeConfig, TrainConfig

_STAGES = ("harvest", "train", "evaluate")
EXPANSION = 8
KS = [16, 32, 64]
_log = logging.getLogger(__name__)


def write_first_run(config: InitConfig, start_seconds: float = 0.0) -> list[Path]:
    """Write harvest.toml, train.toml and evaluate.toml into the output folder, and print what they take.

    `start_seconds` is what a command takes to start: the time of its imports.

    Raises:
        ConfigError: one of the files exists, or the settings do not fit the model.
        ModelError: the model cannot be loaded.
        DiskSpaceError: the store does not fit on the disk.
    """
    if is_synthetic(config.model):
        raise ConfigError(
            f"`thresher init` is for language models; configs/ has the configurations of '{config.model}'"
        )
    folder = user_path(config.output)
    paths = [folder / f"{stage}.toml" for stage in _STAGES]
    there = [str(path) for path in paths if path.exists()]
    if there:
        verb, them = ("exists", "it") if len(there) == 1 else ("exist", "them")
        raise ConfigError(f"{', '.join(there)} {verb} already; choose another output, or remove {them} first")
    harvest, evaluate = choose_harvest(config), choose_evaluation(config)
    if config.measure:
        _log.info(f"measuring on '{config.model}': a short harvest, some steps of training, and parts of an evaluation")
        train, taken = measure_run(harvest, lambda widths: choose_training(config, widths), evaluate, start_seconds)
        lines = taken.lines(harvest, evaluate)
    else:
        train = choose_training(config, dict.fromkeys(harvest.hook_points, _hidden_size(config.model)))
        lines = _unmeasured_lines(harvest, _hidden_size(config.model))
    contents = _file_contents(harvest, train, evaluate, lines)
    check_output(folder, None)
    for path, content in zip(paths, contents, strict=True):
        write_file(path, content.encode())
    print_result("\n".join([*lines, "wrote the configurations; look at them, then run:"]))
    for stage, path in zip(_STAGES, paths, strict=True):
        print_result(f"  thresher {stage} {shlex.quote(str(path))}")
    return paths


def choose_harvest(config: InitConfig) -> HarvestConfig:
    """Return the settings of the harvest; by default, of the residual stream after the middle block."""
    hook_points = config.hook_points
    if hook_points is None:
        n_blocks = getattr(load_model_config(config.model).get_text_config(), "num_hidden_layers", None)
        if not isinstance(n_blocks, int):
            raise ModelError(
                f"the configuration of '{config.model}' does not say how many blocks it has; give --hook_points, which "
                f"`thresher hooks {config.model}` lists"
            )
        hook_points = [f"blocks.{n_blocks // 2}.resid_post"]
    return HarvestConfig(
        model=config.model,
        dataset=config.dataset,
        hook_points=hook_points,
        context_size=config.context_size,
        tokens=config.tokens,
        holdout=config.holdout,
        device=config.device,
        store=f"{config.output}/store",
    )


def choose_training(config: InitConfig, widths: Mapping[str, int]) -> TrainConfig:
    """Return the settings of training: TopK SAEs of three sparsities at each hook point."""
    saes = []
    for name, width in widths.items():
        d_sae = config.d_sae or EXPANSION * width
        ks = [k for k in KS if k < d_sae] or [1]
        saes.append({"architecture": "topk", "hook_point": name, "d_sae": d_sae, "k": ks})
    return TrainConfig(
        store=f"{config.output}/store",
        output=f"{config.output}/saes",
        device=config.device,
        sae=saes,
    )


def choose_evaluation(config: InitConfig) -> EvaluateConfig:
    """Return the settings of the evaluation; a model that predicts no next token is left out of it."""
    return EvaluateConfig(
        store=f"{config.output}/store",
        saes=f"{config.output}/saes",
        output=f"{config.output}/evaluation",
        model=False if is_encoder(load_model_config(config.model)) else None,
        device=config.device,
    )


def _file_contents(
    harvest: HarvestConfig, train: TrainConfig, evaluate: EvaluateConfig, estimated: list[str]
) -> tuple[str, str, str]:
    """Return the text of the three files."""
    return (
        commented_toml(
            HarvestConfig,
            ["One run of the model, whose activations are stored.", *estimated],
            _values(harvest, "model", "dataset", "hook_points", "context_size", "tokens", "store"),
            harvest,
            ("batch_size", "holdout_fraction", "holdout", "codec", "device"),
        ),
        commented_toml(
            TrainConfig,
            ["A sweep of SAEs, trained together from the store. A list is a grid: one SAE per value."],
            _values(train, "store", "output"),
            train,
            ("epochs", "decay_fraction", "device"),
            tables=("sae", SaeConfig, train.sae),
        ),
        commented_toml(
            EvaluateConfig,
            ["Metrics, a feature index and a report of the SAEs, on held-out text."],
            _values(evaluate, "store", "saes", "output", *["model"] * (evaluate.model is False)),
            evaluate,
            ("model_rows", "feature_rows", "device"),
        ),
    )


def _values(config: Config, *keys: str) -> dict[str, Any]:
    return {key: getattr(config, key) for key in keys}


def _hidden_size(model: str) -> int:
    size = getattr(load_model_config(model).get_text_config(), "hidden_size", None)
    if not isinstance(size, int):
        raise ModelError(f"the configuration of '{model}' does not say how wide its residual stream is; give --d_sae")
    return size


def _unmeasured_lines(harvest: HarvestConfig, hidden_size: int) -> list[str]:
    """Return the lines on disk, time and memory without a trial; raise `DiskSpaceError` if the store does not fit."""
    widths = dict.fromkeys(harvest.hook_points, hidden_size)
    needed = estimate(widths, harvest.dtype, harvest.codec, harvest.tokens, float("inf"))
    free = check_disk(user_path(harvest.store), needed)
    return [
        f"disk    about {human_bytes(needed.stored_bytes)} for the store if hook points are {hidden_size} wide; "
        f"{human_bytes(free)} are free",
        "time    not measured",
        "memory  not measured; after the harvest, `thresher train train.toml --dry_run true` computes it",
    ]
