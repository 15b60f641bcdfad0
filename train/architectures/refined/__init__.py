"""SAEs whose encoder refines its first guess."""

from __future__ import annotations

from . import lista as lista
