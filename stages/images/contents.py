"""What a file holds, told by its first bytes. Names of files lie: photographs have wrong endings, or none."""

from __future__ import annotations

import codecs
import re

HEAD_BYTES = 64
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # PIL would also start Ghostscript for an EPS

_READ = (
    re.compile(
        rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|II\*\x00|MM\x00\*|II\+\x00|MM\x00\+|RIFF....WEBP", re.DOTALL
    ),
    re.compile(
        rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00", re.DOTALL
    ),  # two letters alone may begin a text
    re.compile(rb"P[1-6]\s+(?:#[^\n]*(?:\n\s*|$))*(?:\d+\s|$)"),
)
_UNREAD = {
    "HEIF or AVIF": re.compile(rb"....ftyp(?:hei[cfmsx]|hev[cmsx]|mif1|msf1|avi[fs])", re.DOTALL),
    "JPEG XL": re.compile(rb"\xff\x0a|\x00\x00\x00\x0cJXL ", re.DOTALL),
    "JPEG 2000": re.compile(rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", re.DOTALL),
    "Photoshop": re.compile(rb"8BPS"),
    "SVG": re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)?<svg[\s>]", re.DOTALL),
    "PostScript": re.compile(rb"%!PS"),
    "OpenEXR": re.compile(rb"v/1\x01"),
    "icon": re.compile(rb"\x00\x00[\x01\x02]\x00[^\x00]\x00"),
    "DDS": re.compile(rb"DDS \x7c\x00\x00\x00"),
}
_OTHER = {
    "a video": re.compile(
        rb"....(?:ftyp|moov|mdat)|RIFF....AVI |\x1aE\xdf\xa3|\x00\x00\x01[\xba\xb3]|FLV\x01", re.DOTALL
    ),
    "an archive": re.compile(rb"PK\x03\x04|\x1f\x8b|BZh|\xfd7zXZ\x00|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd"),
    "a PDF": re.compile(rb"%PDF"),
    "an array of NumPy": re.compile(rb"\x93NUMPY"),
}


def is_image_head(head: bytes) -> bool:
    """Whether a file with these first bytes is an image, of a format that is read here or not."""
    return any(form.match(head) for form in _READ) or unread_format(head) is not None


def unread_format(head: bytes) -> str | None:
    """Name of the image format that these first bytes tell and that is not read here; None for anything else."""
    return next((name for name, form in _UNREAD.items() if form.match(head)), None)


def kind_of_head(head: bytes) -> str:
    """What a file is that begins with these bytes and holds no image, in words."""
    if not head:
        return "an empty file"
    found = next((name for name, form in _OTHER.items() if form.match(head)), None)
    return found or ("text" if _is_text(head) else "unknown contents")


def _is_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return b"\0" not in head
