"""The CUDA backend: the four sparse ops, and the fused ones that a whole step is made of."""

from .csc import Csc, to_csc
from .dequantise import dequantise
from .feature_major import grad_weights, grad_weights_and_bias, sum_by_latent
from .optimizer import AdamState, Hyperparameters, update
from .select import select_topk, select_topk_certified
from .threshold import Selection, select_batch_topk, select_threshold
from .token_major import decode, grad_values, reconstruct

__all__ = [
    "AdamState",
    "Csc",
    "Hyperparameters",
    "Selection",
    "decode",
    "dequantise",
    "grad_values",
    "grad_weights",
    "grad_weights_and_bias",
    "reconstruct",
    "select_batch_topk",
    "select_threshold",
    "select_topk",
    "select_topk_certified",
    "sum_by_latent",
    "to_csc",
    "update",
]
