"""moce pack: decode and resize images once, into one file that is mapped into memory."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from moce.commands.setup import check_file
from moce.config import PackSettings
from moce.data.pack import Packer
from moce.data.readers.factory import open_source, paths_of
from moce.data.readers.packed import Packed, find_packed
from moce.errors import Interrupted, MoceError
from moce.runtime.progress import log, meter
from moce.runtime.signals import stop_request

SHOWN = 5  # skipped images to print; the file lists all


@dataclass
class PackResult:
    """images: in the file. size: (height, width). skipped: (id, reason). verified: pixels checked."""

    file: Path
    images: int
    size: tuple[int, int]
    bytes: int
    skipped: list[tuple[str, str]]
    verified: bool

    def summary(self) -> str:
        height, width = self.size
        verified = ", all pixels verified" if self.verified else ""
        skipped = f", {len(self.skipped)} unreadable ones skipped" if self.skipped else ""
        return (
            f"{self.images} images of {height}x{width}, {self.bytes / 1e6:.1f} MB{skipped}"
            f"{verified}: {self.file}"
        )


def run(settings: PackSettings) -> PackResult:
    packed = _input(settings) if settings.out is None else _pack(settings, settings.out)
    if settings.verify:
        with meter("verify", len(packed.ids)) as progress:
            packed.verify(lambda count: progress.advance(count=count))
    return PackResult(
        file=packed.path,
        images=len(packed.ids),
        size=packed.shape[2:],
        bytes=packed.path.stat().st_size,
        skipped=packed.skipped,
        verified=settings.verify,
    )


def _input(settings: PackSettings) -> Packed:
    """The packed file to verify."""
    if not settings.verify:
        raise MoceError("no output: add --out FILE (or --verify to check a packed file)")
    packed = find_packed(settings.data)
    if packed is None:
        raise MoceError(f"{settings.data} is not a packed file; to make one, add --out FILE")
    return packed


def _pack(settings: PackSettings, out: Path) -> Packed:
    if settings.size is None:
        raise MoceError("the size is missing: add --size S, in pixels")
    inputs = paths_of(settings.data)
    check_file(out, inputs, "images.moce", overwrite=settings.overwrite, any_suffix=True)
    samples = open_source(settings.data)
    packer = Packer(out, samples, (settings.channels, *settings.shape))
    if settings.overwrite:
        packer.discard()
    done = packer.resume()
    if done:
        log(f"resuming after {done} of {len(samples)} images")
    _decode(packer, settings.workers)
    packed = packer.finish()
    _log_skipped(packed)
    return packed


def _decode(packer: Packer, workers: int | None) -> None:
    """Pack all chunks. Raises Interrupted when asked to stop; the next call resumes."""
    start, first, skipped = time.monotonic(), packer.done, 0
    with (
        meter("pack", len(packer.samples), first) as progress,
        stop_request() as stop,
        closing(packer.chunks(workers)) as chunks,
    ):
        for row in chunks:
            skipped += len(row["skipped"])
            rate = (packer.done - first) / (time.monotonic() - start)
            progress.advance(f"{rate:.0f} images/s, {skipped} skipped", row["entries"])
            if stop.received is not None and packer.done < len(packer.samples):
                raise Interrupted(
                    stop.received,
                    f"{packer.out}.partial",
                    f"{packer.done} of {len(packer.samples)} images",
                    "run the same command to resume",
                )


def _log_skipped(packed: Packed) -> None:
    for name, reason in packed.skipped[:SHOWN]:
        log(f"skipped {name}: {reason}")
    if len(packed.skipped) > SHOWN:
        log(f"and {len(packed.skipped) - SHOWN} more; all are in {packed.path}")
