"""Check and repair of a root: what does not fit together, what that means, and what can be done about it."""
