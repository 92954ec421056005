"""Arrays beside the tokens, as towers take them; see `trainers.chunks.Chunk`."""


def lengths_of(name: str) -> str:
    """Under which name stands [n] how many rows of an array are each item's."""
    return f"{name}_lengths"
