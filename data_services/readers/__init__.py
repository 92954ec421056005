"""Bytes to blocks of rows: one file a format. `blocks` holds what they share, `files` chooses one by suffix."""
