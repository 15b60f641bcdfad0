"""`python -m thresher.train`: the same as `thresher train`."""

import sys

from .command import main

sys.exit(main(sys.argv[1:]))
