"""Baselines of an evaluation that need no training: dictionaries that anyone has before an SAE is trained."""
