"""The SAEs that are judged: where they lie, their names, digests and origin."""
