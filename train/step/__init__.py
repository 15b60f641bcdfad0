"""The training of one SAE, step by step: trainer, fused step, CUDA graphs, optimizer and schedules."""
