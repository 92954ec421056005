"""Corpora that need no download: one file each. `catalogue` lists them by name."""
