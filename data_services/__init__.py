"""Bytes to batches: sources, store, order, stream."""
