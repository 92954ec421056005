"""Arrays beside the tokens, as towers take them. See `trainers.chunks.Chunk`."""


def lengths_of(name: str) -> str:
    """The key of an array's lengths [n], beside the array's own."""
    return f"{name}_lengths"
