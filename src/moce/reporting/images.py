"""Images of a run's data as montages, inlined as data URIs."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from moce.data.dataset import ImageDataset
from moce.data.domains import domain_of, find_domains
from moce.data.load import load_images
from moce.data.readers.factory import open_source
from moce.data.rng import Stream, keyed_generator
from moce.errors import MoceError, counted
from moce.inference.reconstructions import as_rgb
from moce.reporting.elements import html

THUMBNAIL = 64  # longest side of a montage tile in pixels
LOSSLESS_UP_TO = 48  # pixels per side: artifacts show in small tiles, and these weigh little


class Source:
    """The images of a DATA argument by id. Raises MoceError if there are none."""

    def __init__(self, data: str) -> None:
        self._samples = {sample.id: sample for sample in open_source(data)}
        self.ids = list(self._samples)
        self.domains = find_domains(self.ids)

    def load(self, ids: Iterable[str], shape: tuple[int, int, int]) -> ImageDataset:
        """Decode to (channels, h, w) those images that still exist; MoceError if none does."""
        chosen = [self._samples[name] for name in ids if name in self._samples]
        return load_images(chosen, shape[1:], channels=shape[0])

    def describe(self, ids: Sequence[str]) -> str:
        """The number of images and their domains, e.g. "90 images · cifar10 81 %, mnist 19 %"."""
        note = counted(len(ids), "image")
        if not self.domains or not ids:
            return note
        shares = [(n, c / len(ids)) for n, c in Counter(map(domain_of, ids)).most_common(2)]
        return f"{note} · " + ", ".join(f"{n} {share:.0%}" for n, share in shares if share >= 0.05)

    def montage(
        self, ids: Sequence[str], shape: tuple[int, int, int], columns: int, rows: int, alt: str
    ) -> Markup | None:
        """A montage of a random sample; None if none of the images can be read."""
        channels, height, width = shape
        scale = min(1.0, THUMBNAIL / max(height, width))
        tile = channels, max(1, round(height * scale)), max(1, round(width * scale))
        try:
            images = self.load(sample(ids, columns * rows), tile)
        except (MoceError, OSError):
            return None
        return montage(images.take(slice(None)), columns, alt)


def sample(items: Sequence[str], count: int) -> list[str]:
    """At most `count` random items, in their order; the same ones every time."""
    generator = keyed_generator(0, Stream.ORDER, 0)
    rows = torch.randperm(len(items), generator=generator)[:count].sort().values
    return [items[row] for row in rows.tolist()]


def tiled(pixels: Tensor, columns: int, gap: int) -> np.ndarray:
    """Images [n, c, h, w] uint8 in rows of `columns`, [H, W, 4]; gaps and margin are transparent."""
    color = as_rgb(pixels)
    tiles = torch.cat([color, torch.full_like(color[:, :1], 255)], dim=1)
    missing = -len(tiles) % columns
    tiles = torch.cat([tiles, tiles.new_zeros(missing, *tiles.shape[1:])])
    return make_grid(tiles, columns, gap).permute(1, 2, 0).numpy()


def montage(pixels: Tensor, columns: int, alt: str) -> Markup:
    """Images [n, c, h, w] uint8 in rows of `columns`, inlined as WebP."""
    height, width = pixels.shape[2:]
    canvas = tiled(pixels, columns, gap=max(1, height // 16))
    return webp(Image.fromarray(canvas), alt, lossless=max(height, width) <= LOSSLESS_UP_TO)


def webp(picture: Image.Image, alt: str, *, lossless: bool) -> Markup:
    """A picture inlined as WebP."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=lossless, quality=85, method=6)
    uri = data_uri("image/webp", buffer.getvalue())
    return html.picture(uri, alt, *picture.size, pixelated=lossless)


def data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
