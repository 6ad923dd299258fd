"""Which image files are opened: by suffix, and by Pillow's name of the format."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

# Decoders only: for some formats Pillow runs other programs.
ALWAYS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "DIB", "PPM", "TGA")
ALWAYS_SUFFIXES = (
    ".jpg .jpeg .jfif .jpe .jif .png .apng .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm .tga"
)
# Pillow's name of a format, its suffixes, and the feature that Pillow was built with if it reads it.
OPTIONAL = (
    ("JPEG2000", ".jp2 .j2k .j2c .jpx .jpf", "jpg_2000"),
    ("AVIF", ".avif", "avif"),
)
HEIF_SUFFIXES = ".heic .heif .hif"
HINTS = dict.fromkeys(HEIF_SUFFIXES.split(), "to read them: pip install 'moce[heic]'")


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are opened; registers the plugin for HEIC, if installed."""
    from PIL import features

    found = [name for name, _, feature in OPTIONAL if features.check(feature)]
    if _has_heif():
        import pillow_heif

        pillow_heif.register_heif_opener()
        found.append("HEIF")
    return (*ALWAYS, *found)


@cache
def suffixes() -> frozenset[str]:
    """The suffixes, in lower case, of the files that are opened here."""
    from PIL import features

    texts = [ALWAYS_SUFFIXES, *(text for _, text, name in OPTIONAL if features.check(name))]
    texts += [HEIF_SUFFIXES] * _has_heif()
    return frozenset(" ".join(texts).split())


def _has_heif() -> bool:
    return find_spec("pillow_heif") is not None
