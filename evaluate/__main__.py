"""`python -m thresher.evaluate`: the same as `thresher evaluate`."""

import sys

from .command import main

sys.exit(main(sys.argv[1:]))
