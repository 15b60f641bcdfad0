"""The architectures that can be trained. Each has one file, which registers its configuration and its class."""

from __future__ import annotations

# Importing an architecture's file registers it.
from . import batch_topk as batch_topk
from . import cross_layer as cross_layer
from . import gated as gated
from . import hierarchical_topk as hierarchical_topk
from . import jumprelu as jumprelu
from . import matryoshka as matryoshka
from . import older_names as older_names
from . import refined as refined
from . import standard as standard
from . import topk as topk
from .base import Architecture as Architecture
from .registry import ARCHITECTURES as ARCHITECTURES
from .registry import architectures_using as architectures_using
from .registry import make_architecture as make_architecture
from .registry import make_config as make_config
from .registry import register as register
from .registry import to_sae_config as to_sae_config
