"""One file per kind of system."""
