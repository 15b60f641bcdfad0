"""Sparse autoencoders as every stage sees them, and their files."""

from .cross_layer import CrossLayerTranscoder
from .sae import Sae

__all__ = ["CrossLayerTranscoder", "Sae"]
