"""SAEs whose encoder looks at what its first choices leave."""

from __future__ import annotations

from . import lista as lista
from . import matching_pursuit as matching_pursuit
