"""From `[[sae]]` tables with grids or ranges to one configuration per SAE."""
