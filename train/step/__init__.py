"""One step of one SAE: trainer, fused step, graphs, optimizer and schedules."""
