"""Read activations that other programs cached, and write them to a store (docs/importing.md)."""
