"""Losses over embeddings. An objective sees vectors and ids, never a model."""
