"""Small tables that notebooks show for stores, SAEs and results, by `_repr_html_`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_CELL = "text-align:left;vertical-align:top;padding:2px 12px 2px 0"
_NUMBER = "text-align:right;vertical-align:top;padding:2px 12px 2px 0;font-variant-numeric:tabular-nums"
_NAME = f"{_CELL};font-weight:normal;opacity:.7"


def facts_html(title: str, facts: Mapping[str, Any]) -> str:
    """Return a heading, and a table of names and values without those that are None."""
    rows = [
        f'<tr><th style="{_NAME}">{escape(name)}</th><td style="{_CELL}">{escape(str(value))}</td></tr>'
        for name, value in facts.items()
        if value is not None
    ]
    return f"<div><strong>{escape(title)}</strong><table>{''.join(rows)}</table></div>"


def table_html(columns: Mapping[str, bool], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts; `columns` says of each column whether it holds numbers."""
    styles = [_NUMBER if numeric else _CELL for numeric in columns.values()]
    lines = [_line("th", columns, styles), *(_line("td", row, styles) for row in rows)]
    return f'<div style="overflow-x:auto"><table>{"".join(lines)}</table></div>'


def _line(tag: str, cells: Sequence[str] | Mapping[str, bool], styles: Sequence[str]) -> str:
    shown = [f'<{tag} style="{style}">{escape(cell)}</{tag}>' for cell, style in zip(cells, styles, strict=True)]
    return f"<tr>{''.join(shown)}</tr>"
