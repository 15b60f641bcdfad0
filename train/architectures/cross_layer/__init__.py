"""Cross-layer transcoders: the latents of a layer write to the targets of that layer and of all later ones.

`base` has what they share and `layers` where each layer's part of the parameters lies; the other files have one rule
each by which latents are chosen.
"""

from . import jumprelu as jumprelu
from . import largest as largest
from . import standard as standard
