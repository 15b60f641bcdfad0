"""One run on several processes: a sweep spread over them, each SAE data-parallel, or one sharded over its latents."""
