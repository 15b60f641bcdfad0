"""The metrics of an evaluation: a list of rows, which notebooks show as a table."""

from __future__ import annotations

from typing import Any

from ...shared.display.html import table_html
from ..report.definitions import columns, format_value
from ..results.table import metrics_table


class MetricsRows(list[dict[str, Any]]):
    """One dictionary per SAE, with the keys of `metrics.json`; `pandas.DataFrame(rows)` makes a data frame of them."""

    def __repr__(self) -> str:
        """Return the table that the command prints."""
        return metrics_table(self)

    def _repr_html_(self) -> str:
        """Return the report's columns as a table."""
        shown = columns(self)
        return table_html(
            {column.label: column.style != "text" for column in shown},
            [[format_value(row.get(column.key), column.style) for column in shown] for row in self],
        )
