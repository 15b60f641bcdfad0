"""`python -m thresher.harvest`: the same as `thresher harvest`."""

import sys

from .command import main

sys.exit(main(sys.argv[1:]))
