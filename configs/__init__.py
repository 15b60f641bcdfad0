"""The configurations that come with the package: a folder per command."""
