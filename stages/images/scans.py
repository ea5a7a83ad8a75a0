"""Scans of a progressive JPEG. Each goes over the whole image, so thousands of empty ones would take hours."""

from __future__ import annotations

_END, _SCAN = 0xD9, 0xDA
_WITHOUT_LENGTH = {0x00, 0x01, *range(0xD0, 0xD9)}  # stuffed bytes, restart markers and the start of the image


def num_scans(jpeg: bytes) -> int:
    """Number of scans up to the end mark of the first image; a decoder reads no further."""
    place = scans = 0
    while 0 <= (place := jpeg.find(b"\xff", place)) < len(jpeg) - 1:
        code = jpeg[place + 1]
        if code == _END:
            break
        scans += code == _SCAN
        if code == 0xFF:  # a filling byte
            place += 1
        elif code in _WITHOUT_LENGTH:
            place += 2
        else:
            place += 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
    return scans
