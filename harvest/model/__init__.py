"""The model of a harvest: its plan, its forward passes, and vLLM in its place."""
