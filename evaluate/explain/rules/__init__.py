"""Explain latents by short rules over tokens."""
