"""The language model with its SAEs, which one worker runs for all requests."""
