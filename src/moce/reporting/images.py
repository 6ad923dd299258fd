"""Images for the page: decoded when asked for, laid out as montages, inlined as data URIs."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moce.data.dataset import ImageDataset
from moce.data.load import load_images
from moce.data.readers.factory import open_source
from moce.data.rng import Stream, keyed_generator
from moce.reporting.elements import Picture

THUMBNAIL = 64  # side in pixels of the largest montage tile
LOSSLESS_UP_TO = 48  # side in pixels: compression shows in small tiles, and they weigh little
MOST_DOMAINS = 8


class Source:
    """The images of a DATA argument by identity. Raises MoceError if there are none."""

    def __init__(self, data: str) -> None:
        self._samples = {sample.id: sample for sample in open_source(data)}
        self.domains = find_domains(self._samples)

    @property
    def ids(self) -> list[str]:
        return list(self._samples)

    def load(self, ids: Iterable[str], shape: tuple[int, int, int]) -> ImageDataset:
        """Decode these images to (channels, h, w), as far as they are there; MoceError if none is."""
        chosen = [self._samples[name] for name in ids if name in self._samples]
        return load_images(chosen, shape[1:], channels=shape[0])

    def describe(self, ids: Sequence[str]) -> str:
        """Where most of the images come from, as "cifar10 81 %, mnist 19 %"; "" without domains."""
        if not self.domains or not ids:
            return ""
        counts = Counter(domain_of(name) for name in ids).most_common(2)
        shares = [(name, count / len(ids)) for name, count in counts]
        return ", ".join(f"{name} {percent(share)}" for name, share in shares if share >= 0.05)


def percent(share: float) -> str:
    """A share 0..1 in whole per cent."""
    return f"{share:.0%}".replace("%", "\u00a0%")


def domain_of(identity: str) -> str:
    """The first folder of an image's identity; "" of one in no folder."""
    return identity.split("/")[0] if "/" in identity else ""


def find_domains(ids: Iterable[str]) -> list[str]:
    """First folders of the identities, most images first; none if they do not tell images apart."""
    counts = Counter(domain_of(name) for name in ids)
    return [name for name, _ in counts.most_common()] if 2 <= len(counts) <= MOST_DOMAINS else []


def sample(items: Sequence[str], count: int, number: int) -> list[str]:
    """At most `count` of the items, in their order; the draw depends on `number` only."""
    generator = keyed_generator(0, Stream.ORDER, number)
    rows = torch.randperm(len(items), generator=generator)[:count].sort().values
    return [items[row] for row in rows.tolist()]


def tile_shape(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Channels, height and width of a montage tile for such images, no side over THUMBNAIL."""
    channels, height, width = shape
    scale = min(1.0, THUMBNAIL / max(height, width))
    return channels, max(1, round(height * scale)), max(1, round(width * scale))


def as_shown(pixels: Tensor) -> Tensor:
    """Images of any channels [n, c, h, w] as [n, 3, h, w]: the first three, or the first one gray."""
    return pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)


def montage(pixels: Tensor, columns: int, alt: str) -> Picture:
    """Images [n, c, h, w] uint8 in rows of `columns`, with clear gaps between them."""
    count, _, height, width = pixels.shape
    gap = max(1, height // 16)
    rows = -(-count // columns)
    canvas = np.zeros(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, 4), dtype=np.uint8
    )
    for index, image in enumerate(as_shown(pixels).permute(0, 2, 3, 1).numpy()):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width, :3] = image
        canvas[top : top + height, left : left + width, 3] = 255
    return _inline(canvas, alt, lossless=max(height, width) <= LOSSLESS_UP_TO)


def _inline(canvas: np.ndarray, alt: str, *, lossless: bool) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, "WEBP", lossless=lossless, quality=85, method=6)
    height, width = canvas.shape[:2]
    uri = data_uri("image/webp", buffer.getvalue())
    return Picture(uri, width, height, alt, pixelated=lossless)


def data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
