"""`python -m snapshotter.fsck_overlay`."""

import sys

from snapshotter.fsck_overlay.command import main

sys.exit(main())
