"""overlayfs: its extended attributes and its mount options."""
