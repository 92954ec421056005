"""Encoded media to arrays: images [H, W, 3] uint8, sound [S] float32, spectrograms [frames, mels] float32; their views.

Pure functions of bytes and keys. What decodes (Pillow, libsndfile, SciPy) is imported where it is first needed. Bytes
that can't be used raise `schema.Undecodable`: one sentence without figures of the row, so that equal faults are
counted together.
"""
