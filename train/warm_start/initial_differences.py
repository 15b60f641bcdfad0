"""What training cannot take from the SAE that it starts from, each as a line for the user."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...shared.core.errors import SaeError
from ...shared.sae import Sae
from ..architectures.base import Architecture
from ..architectures.batch_topk import BatchTopK
from ..architectures.jumprelu import JumpReLU
from ..architectures.topk import AnnealedTopK, TopK

SMALLEST_THRESHOLD = 1e-8
"""A JumpReLU SAE is trained by the logarithm of its thresholds, so none of them is zero."""

NORM_TOLERANCE = 1e-3
"""Decoder rows are of unit norm if they differ from it by no more."""


def keeps_norms(architecture: Architecture) -> bool:
    """Return whether an architecture trains decoder rows of any norm."""
    return architecture.config.unit_norm_decoder is False or not architecture.unit_norm_decoder


def differences(architecture: Architecture, sae: Sae, tensors: Mapping[str, Tensor], scale: float) -> list[str]:
    """Return how the first step differs from what the SAE computes, or is used for, and by how much.

    `tensors` are the SAE's with decoder norms folded where the architecture holds them at one; `scale` is that of
    the inputs.
    """
    found = _of_places(architecture, sae) + _of_sparsity(architecture, sae)
    norms = sae.W_dec.detach().norm(dim=1)
    if not keeps_norms(architecture) and float((norms - 1).abs().max()) > NORM_TOLERANCE:
        found.append(
            f"its decoder norms, {float(norms.min()):.3g} to {float(norms.max()):.3g}, move into the encoder: "
            "latents are scaled by them, and reconstructions stay"
        )
    thresholds = tensors.get("threshold")
    if isinstance(architecture, BatchTopK) and thresholds is not None:
        least, mean, most = (float(value) for value in (thresholds.min(), thresholds.mean(), thresholds.max()))
        if most - least > NORM_TOLERANCE * abs(mean):
            found.append(f"its thresholds, {least:.3g} to {most:.3g}, become one, their mean of {mean:.3g}")
    if isinstance(architecture, JumpReLU) and thresholds is not None:
        n_raised = int((thresholds * scale < SMALLEST_THRESHOLD).sum())
        if n_raised:
            least = float(thresholds.min())
            found.append(
                f"{n_raised:,} of its {sae.d_sae:,} thresholds are below {SMALLEST_THRESHOLD / scale:.1g} "
                f"(the least is {least:.3g}) and start there"
            )
    return found


def _of_places(architecture: Architecture, sae: Sae) -> list[str]:
    config = architecture.config
    if sae.architecture == "crosscoder":
        theirs = list(sae.config["hook_points"])
        return [] if theirs == list(config.wiring.reads) else [f"its hook points {theirs} are put in this SAE's order"]
    found = [
        f"it is of a model loaded with {name} = true, this one of the model as it is" for name in sae.model_processing
    ]
    if sae.hook_point and sae.hook_point != config.hook_point:
        found.append(f"it is of '{sae.hook_point}', this one of '{config.hook_point}'")
    if config.hook_point_out is not None and sae.target_hook_point != config.hook_point_out:
        found.append(f"it reconstructs '{sae.target_hook_point}', this one '{config.hook_point_out}'")
    return found


def _of_sparsity(architecture: Architecture, sae: Sae) -> list[str]:
    config = architecture.config
    unused = ["initial_l0"] if config.initial_l0 is not None else []
    if config.initial_threshold is not None and config.resample_every_tokens is None:
        unused.append("initial_threshold")
    found = [f"{key} = {getattr(config, key):g} is not used: thresholds and biases start at its" for key in unused]
    if not isinstance(architecture, TopK):
        return found
    theirs, k = sae.config.get("k"), architecture.config.k
    if isinstance(theirs, int) and theirs != k:
        found.append(f"it keeps k = {theirs} latents, this one {k}")
    if isinstance(architecture, AnnealedTopK) and architecture.k_at(0) != k:
        found.append(f"k_anneal_steps keeps {architecture.k_at(0)} latents at first, and {k} at the end")
    return found


def in_order(sae: Sae, hook_points: tuple[str, ...]) -> dict[str, Tensor]:
    """Return a crosscoder's tensors with its hook points, which are matched by name, in another order.

    Raises:
        SaeError: it has others.
    """
    tensors = {name: tensor.detach() for name, tensor in sae.named_parameters()}
    theirs = list(sae.config.get("hook_points", hook_points))
    if sorted(theirs) != sorted(hook_points):
        raise SaeError(f"the crosscoder is of {', '.join(theirs)}; expected {', '.join(hook_points)}, in any order")
    order = [theirs.index(name) for name in hook_points]
    n = len(order)
    W_enc, W_dec, b_dec = tensors["W_enc"], tensors["W_dec"], tensors["b_dec"]
    return tensors | {
        "W_enc": W_enc.view(n, -1, W_enc.shape[1])[order].reshape(W_enc.shape),
        "W_dec": W_dec.view(len(W_dec), n, -1)[:, order].reshape(W_dec.shape),
        "b_dec": b_dec.view(n, -1)[order].reshape(-1),
    }
