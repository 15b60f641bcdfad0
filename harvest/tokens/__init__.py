"""Turn documents into contexts of tokens."""
