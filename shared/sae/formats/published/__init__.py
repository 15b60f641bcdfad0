"""Formats that research groups publish their SAEs in, one module per format."""
