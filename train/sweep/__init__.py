"""Expand `[[sae]]` tables with grids and random values into one configuration per SAE."""
