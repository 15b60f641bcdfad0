"""Steer, ablate and attribute: a language model with SAEs in it."""
