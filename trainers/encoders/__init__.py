"""Towers: what turns a field into a vector."""
