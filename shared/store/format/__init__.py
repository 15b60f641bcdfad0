"""Encode and decode the bytes of a store (docs/FORMAT.md), without side effects."""
