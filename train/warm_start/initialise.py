"""Start training from a trained SAE: its tensors in raw units, back to parameters on normalised inputs.

The exact inverse of what `Architecture.exported` folds, so that the first step reconstructs what the SAE did.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ...shared.core.errors import SaeError
from ...shared.sae import Sae
from ..architectures.base import Architecture
from ..architectures.batch_topk import BatchTopK
from ..architectures.contract import Buffers, Parameters
from ..architectures.crosscoder import Crosscoder
from ..architectures.gated import Gated
from ..architectures.jumprelu import JumpReLU
from ..architectures.parts.decoder_norms import fold_decoder_norms
from ..architectures.transcoder import Transcoder
from ..stream.normalization import Normalization
from .foreign_saes import read_trained_sae
from .initial_differences import NORM_TOLERANCE, SMALLEST_THRESHOLD, differences, in_order, keeps_norms

if TYPE_CHECKING:
    from ..config import SaeConfig
    from ..step.sae_trainer import SaeTrainer

_SAVED_AS = {
    "batch_topk": "jumprelu",
    "matryoshka_batch_topk": "jumprelu",
    "hierarchical_topk": "topk",
}
"""What architectures are saved as, where that has another name."""


def initialise_trainers(trainers: Sequence[SaeTrainer], init_from: str | None) -> list[tuple[str, str]]:
    """Start each trainer from the SAE that its table, or else the run, names; those without one stay as they are.

    Returns what a first step will not reproduce of the source: the SAE's name, and a line for the user.

    Raises:
        MissingFileError: there is no SAE.
        SaeError: it does not fit.
    """
    notes = []
    for trainer in trainers:
        if source_of(trainer.config, init_from) is not None:
            sae = read_initial(trainer.config, init_from, trainer.architecture)
            normalization = trainer.normalization.to("cpu")
            parameters, buffers = parameters_of(trainer.architecture, sae, normalization)
            told = what_differs(trainer.architecture, sae, normalization)
            source = source_of(trainer.config, init_from)
            notes += [(trainer.name, f"SAE '{trainer.name}' starts from '{source}', but {text}") for text in told]
            rows = getattr(trainer.architecture, "latents_here", slice(None))
            parameters = {
                name: tensor[rows] if len(tensor) == sae.d_sae and name not in ("b_dec", "W_skip") else tensor
                for name, tensor in parameters.items()
            }
            trainer.initialise(parameters, buffers)
    return notes


def source_of(config: SaeConfig, init_from: str | None) -> str | None:
    """Return the path that an SAE starts from, if any."""
    return config.init_from or init_from


def read_initial(config: SaeConfig, init_from: str | None, architecture: Architecture) -> Sae:
    """Return the SAE to start from, whose architecture and shapes fit.

    Raises:
        MissingFileError: there is none.
        SaeError: it does not fit.
    """
    path = source_of(config, init_from)
    assert path is not None
    sae = read_trained_sae(path, config.name)
    expected = _SAVED_AS.get(config.architecture, config.architecture)
    if sae.architecture != expected:
        raise SaeError(
            f"SAE '{config.name}' cannot start from '{path}': that is a '{sae.architecture}' SAE; "
            f"expected '{expected}', as '{config.architecture}' is saved"
        )
    found, wanted = ({"d_in": a.d_in, "d_sae": a.d_sae, "d_out": a.d_out} for a in (sae, architecture))
    if found != wanted:
        differing = ", ".join(
            f"{key} {found[key]}, expected {wanted[key]}" for key in found if found[key] != wanted[key]
        )
        raise SaeError(f"SAE '{config.name}' cannot start from '{path}': it has {differing}")
    try:
        if isinstance(architecture, Crosscoder):
            in_order(sae, config.wiring.reads)
        elif config.hook_point_out is not None:
            _ = sae.target_hook_point
    except SaeError as error:
        raise SaeError(f"SAE '{config.name}' cannot start from '{path}': {error}") from None
    return sae


def what_differs(architecture: Architecture, sae: Sae, normalization: Normalization) -> list[str]:
    """Return how the first step differs from what an SAE computes, each as a line for the user."""
    tensors = {name: tensor.detach() for name, tensor in sae.named_parameters()}
    if not isinstance(architecture, Transcoder):
        tensors = _with_norms(architecture, sae, tensors)
    scale = normalization.scale
    return differences(architecture, sae, tensors, scale if isinstance(scale, float) else 1.0)


def parameters_of(architecture: Architecture, sae: Sae, normalization: Normalization) -> tuple[Parameters, Buffers]:
    """Return the parameters and buffers with which an architecture computes what an SAE does on raw activations.

    Raises:
        SaeError: a TopK SAE has decoder rows of other norms than the architecture holds.
    """
    if isinstance(architecture, Transcoder):
        return _across_places(architecture, sae, normalization), {}
    tensors = _with_norms(architecture, sae, {name: tensor.detach() for name, tensor in sae.named_parameters()})
    mean, scale = normalization.mean, normalization.scale
    W_enc = tensors["W_enc"].T.contiguous()
    bias = tensors["b_gate" if sae.architecture == "gated" else "b_enc"]
    if not sae.apply_b_dec_to_input:
        bias = bias + W_enc @ tensors["b_dec"]
    parameters = {"W_enc": W_enc, "W_dec": tensors["W_dec"], "b_dec": (tensors["b_dec"] - mean) * scale}
    if isinstance(architecture, Gated):
        # The magnitudes are made from the product before its bias, which takes what the encoder does not subtract.
        shift = bias - tensors["b_gate"]
        b_mag = tensors["b_mag"] + shift * tensors["r_mag"].exp()
        return parameters | {"b_gate": bias * scale, "b_mag": b_mag * scale, "r_mag": tensors["r_mag"]}, {}
    parameters["b_enc"] = bias * scale
    if isinstance(architecture, JumpReLU):
        threshold = (tensors["threshold"] * scale).clamp_min(SMALLEST_THRESHOLD)
        return parameters | {"log_threshold": threshold.log()}, {}
    if isinstance(architecture, BatchTopK):
        return parameters, architecture.initial_buffers() | {"threshold": (tensors["threshold"] * scale).mean()}
    return parameters, architecture.initial_buffers()


def _with_norms(architecture: Architecture, sae: Sae, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an SAE's tensors with decoder norms that the architecture can hold."""
    norms = tensors["W_dec"].norm(dim=1)
    if keeps_norms(architecture) or float((norms - 1).abs().max()) <= NORM_TOLERANCE:
        return tensors
    if sae.architecture == "topk":
        raise SaeError(
            f"decoder rows have norms from {float(norms.min()):.3g} to {float(norms.max()):.3g}, expected 1, and "
            "scaling them would change which latents are the top k; give unit_norm_decoder = false"
        )
    return fold_decoder_norms(tensors)


def _across_places(architecture: Transcoder, sae: Sae, normalization: Normalization) -> Parameters:
    """Return a transcoder's or crosscoder's parameters, with decoder norms of one on normalised targets."""
    crosses = isinstance(architecture, Crosscoder)
    tensors = in_order(sae, architecture.config.wiring.reads) if crosses else dict(sae.named_parameters())
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    mean, scale = normalization.mean, normalization.scale
    target = normalization.target or normalization
    W_enc, W_dec = tensors["W_enc"].T / scale, tensors["W_dec"] * target.scale
    bias = tensors["b_enc"] + mean @ tensors["W_enc"]
    if sae.apply_b_dec_to_input:
        bias = bias - tensors["b_dec"] @ tensors["W_enc"]
    b_dec = tensors["b_dec"] - target.mean
    parameters: Parameters = {}
    if "W_skip" in tensors:
        b_dec = b_dec + mean @ tensors["W_skip"].T
        parameters["W_skip"] = tensors["W_skip"] / scale * target.scale
    norms = architecture.blocks(W_dec).norm(dim=2).sum(1).clamp_min(1e-8)
    return parameters | {
        "W_enc": W_enc * norms[:, None],
        "b_enc": bias * norms,
        "W_dec": W_dec / norms[:, None],
        "b_dec": b_dec * target.scale,
    }
