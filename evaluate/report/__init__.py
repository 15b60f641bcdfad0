"""The self-contained HTML report of an evaluated sweep."""

from .write import write_report as write_report
