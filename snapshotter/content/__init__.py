"""Every distinct file once: the object store, and how a layer comes to use it."""
