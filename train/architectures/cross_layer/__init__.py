"""Cross-layer transcoders: the latents of a layer write to the targets of that layer and of all later ones.

`base` has what they share, and `layers` describes where each layer's parameters are stored. Each of the other files has
one rule for choosing latents.
"""

from . import jumprelu as jumprelu
from . import largest as largest
from . import standard as standard
