"""What the pipeline wrote: the evaluation, its feature indexes and its SAEs."""
