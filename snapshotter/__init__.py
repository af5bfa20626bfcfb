"""dedup-snapshotter: a containerd proxy snapshotter that stores every distinct file once."""

__version__ = "0.1.0"
