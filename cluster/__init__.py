"""Where work runs: the only package that assembles the others."""
