"""The bytes of a store and the values that they stand for (docs/FORMAT.md); no effects."""
