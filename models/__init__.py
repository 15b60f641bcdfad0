"""The language model that comes with the package."""
