"""`python -m snapshotter.cli` is `snapctl`."""

import sys

from snapshotter.cli import main

sys.exit(main())
