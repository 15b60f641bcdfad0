"""Read documents from files and datasets."""
