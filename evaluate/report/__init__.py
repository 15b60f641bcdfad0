"""The self-contained HTML report of an evaluation."""

from .write import write_report as write_report
