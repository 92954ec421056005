"""What bytes are, by how they begin: the name in a file says nothing sure."""

from __future__ import annotations

_STARTS = {
    b"\xff\xd8\xff": "image",  # JPEG
    b"\x89PNG\r\n\x1a\n": "image",
    b"GIF87a": "image",
    b"GIF89a": "image",
    b"BM": "image",
    b"II*\x00": "image",  # TIFF, little-endian
    b"MM\x00*": "image",
    b"\x00\x00\x00\x0cjP  ": "image",  # JPEG 2000
    b"\xff\x4f\xff\x51": "image",
    b"fLaC": "audio",
    b"OggS": "audio",
    b"ID3": "audio",  # MP3 with a title
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip file",
    b"\x1aE\xdf\xa3": "a film",  # Matroska, WebM
}
_RIFF = {b"WEBP": "image", b"WAVE": "audio", b"AVI ": "a film"}
_BRANDS = {b"avif": "image", b"avis": "image", b"mif1": "image"}  # of ISO base media files
_NETPBM = b"P123456"
_LOOKED_AT_BYTES = 512


def kind_of(data: bytes) -> str:
    """ "image", "audio", or in words what else it is: "a PDF document", "text", "none at all"."""
    if not data:
        return "none at all"
    for start, kind in _STARTS.items():
        if data.startswith(start) and (start != b"BM" or not _is_text(data)):
            return kind
    if data[:4] in (b"RIFF", b"RF64"):
        return _RIFF.get(data[8:12], "of a format that isn't known")
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "a film")
    if data[:1] == b"P" and data[1:2] in _NETPBM[1:] and data[2:3].isspace():
        return "image"
    if data[0] == 0xFF and len(data) > 1 and data[1] & 0xE6 in (0xE2, 0xE4, 0xE6):  # an MPEG frame, layers III to I
        return "audio"
    return "text" if _is_text(data) else "of a format that isn't known"


def _is_text(data: bytes) -> bool:
    """Whether the beginning is UTF-8 without control characters."""
    try:
        text = data[:_LOOKED_AT_BYTES].decode()
    except UnicodeDecodeError as error:
        if error.start < min(len(data), _LOOKED_AT_BYTES) - 3:  # else a character is cut
            return False
        text = data[: error.start].decode()
    return all(character.isprintable() or character.isspace() for character in text.removeprefix("\ufeff"))
