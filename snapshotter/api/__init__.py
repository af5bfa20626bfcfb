"""Generated protocol modules; see proto/generate.py."""
