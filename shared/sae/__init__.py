"""Sparse autoencoders as every stage sees them, and their files."""

from .sae import Sae

__all__ = ["Sae"]
