"""The SAEs under evaluation: their folders, names, digests and origin."""
