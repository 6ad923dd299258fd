"""moce pack: images as encoded in parquet files, or their pixels in one file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from moce.commands.setup import check_file
from moce.config import PackSettings, expand
from moce.config.usage import check_used
from moce.data.encode import Encoding
from moce.data.pack import Packer
from moce.data.pack_shards import ShardPacker, check_pack_folder, clean_pack_folder
from moce.data.readers.factory import open_source, paths_of
from moce.data.readers.manifest import MANIFEST, is_pack, read_manifest, verify
from moce.data.readers.packed import SUFFIX, find_packed, open_packed
from moce.data.value_range import check_values
from moce.errors import Interrupted, MoceError
from moce.runs.files import make_folder
from moce.runs.lock import lock_folder
from moce.runtime.progress import log, meter
from moce.runtime.signals import stop_request

SHOWN = 5  # skipped images to print; the files list all
MEGABYTE = 10**6


@dataclass
class PackResult:
    """file: the file or folder. images, bytes: in it. shards: its files. made: how it keeps images.

    skipped: (id, reason). verified: everything was read back.
    """

    file: Path
    images: int
    made: str
    shards: int
    bytes: int
    skipped: list[tuple[str, str]]
    verified: bool

    def summary(self) -> str:
        verified = ", all of it verified" if self.verified else ""
        skipped = f", {len(self.skipped)} unreadable ones skipped" if self.skipped else ""
        files = f" in {self.shards} files" if self.file.is_dir() else ""
        size = f"{self.bytes / MEGABYTE:.1f} MB{files}"
        return f"{self.images} images, {self.made}, {size}{skipped}{verified}: {self.file}"


def run(settings: PackSettings) -> PackResult:
    check_used(settings, settings)
    if settings.out is None:
        path = _to_verify(settings)
    elif settings.size is not None:
        path = _pack_pixels(settings, settings.out)
    else:
        path = _pack_encoded(settings, settings.out)
    return _folder(path, settings.verify) if is_pack(path) else _file(path, settings.verify)


def _to_verify(settings: PackSettings) -> Path:
    """The packed file or folder to verify."""
    if not settings.verify:
        raise MoceError("no output: add --out FOLDER (or --verify to check what is packed)")
    path = expand(Path(settings.data))
    if not is_pack(path) and find_packed(settings.data) is None:
        raise MoceError(f"{settings.data} is not a packed folder or file; to pack it, add --out")
    return path


def _folder(path: Path, verified: bool) -> PackResult:
    manifest = read_manifest(path)
    if verified:
        with meter("verify", manifest.images) as progress:
            verify(path, lambda count: progress.advance(count=count))
    made, count = manifest.made, len(manifest.shards)
    numbers = (manifest.images, made, count, manifest.bytes, manifest.skipped, verified)
    return PackResult(path, *numbers)


def _file(path: Path, verified: bool) -> PackResult:
    packed = open_packed(path)
    if verified:
        with meter("verify", len(packed.ids)) as progress:
            packed.verify(lambda count: progress.advance(count=count))
    height, width = packed.shape[2:]
    made, size = f"pixels of {height}x{width}", packed.path.stat().st_size
    return PackResult(path, len(packed.ids), made, 1, size, packed.skipped, verified)


# --- images as encoded ----------------------------------------------------------------------------


def _pack_encoded(settings: PackSettings, out: Path) -> Path:
    if out.suffix == SUFFIX:
        raise MoceError(
            f"{out} would be a file of pixels: add --size S; to keep images as encoded, give a folder"
        )
    inputs = paths_of(settings.data)
    check_pack_folder(out, inputs, overwrite=settings.overwrite)
    samples = open_source(settings.data)
    check_values(samples, settings.data)
    make_folder(out)
    lock_folder(out)
    clean_pack_folder(out, everything=settings.overwrite)
    encoding = Encoding(settings.shorter_side, settings.quality)
    packer = ShardPacker(out, samples, encoding, settings.shard_size * MEGABYTE)
    done = packer.resume()
    if done:
        log(f"resuming after {done} of {len(samples)} images")
    advice = f"{out}", lambda: packer.done
    with _progress(len(samples), done, *advice) as advance:
        for _ in packer.shards(advance, settings.workers):
            pass
    _log_skipped(packer.finish().skipped, out / MANIFEST)
    return out


# --- pixels ---------------------------------------------------------------------------------------


def _pack_pixels(settings: PackSettings, out: Path) -> Path:
    if settings.shorter_side is not None:
        raise MoceError(
            "--size writes pixels, --shorter-side images as encoded: leave out one of them"
        )
    inputs = paths_of(settings.data)
    check_file(out, inputs, "images.moce", overwrite=settings.overwrite, any_suffix=True)
    samples = open_source(settings.data)
    check_values(samples, settings.data)
    packer = Packer(out, samples, (settings.channels, *settings.shape))
    if settings.overwrite:
        packer.discard()
    done = packer.resume()
    if done:
        log(f"resuming after {done} of {len(samples)} images")
    advice = f"{packer.out}.partial", lambda: packer.done
    with (
        _progress(len(samples), done, *advice) as advance,
        closing(packer.chunks(settings.workers)) as chunks,
    ):
        for row in chunks:
            advance(row["entries"], len(row["skipped"]))
    _log_skipped(packer.finish().skipped, out)
    return out


# --- both -----------------------------------------------------------------------------------------


@contextmanager
def _progress(
    total: int, first: int, place: str, done: Callable[[], int]
) -> Iterator[Callable[[int, int], None]]:
    """A function to call with images read and unreadable since the last call.

    It raises Interrupted when asked to stop before the end: the next call of moce pack resumes from
    the `done` images that are kept in `place`.
    """
    start, read, unreadable = time.monotonic(), first, 0
    waits_for = "the images that are being read"
    with meter("pack", total, first) as bar, stop_request(waits_for) as stop:

        def advance(count: int, skipped: int) -> None:
            nonlocal read, unreadable
            read, unreadable = read + count, unreadable + skipped
            rate = (read - first) / (time.monotonic() - start)
            bar.advance(f"{rate:.0f} images/s, {unreadable} skipped", count)
            if stop.received is not None and read < total:
                kept = f"{done()} of {total} images"
                raise Interrupted(stop.received, place, kept, "run the same command to resume")

        yield advance


def _log_skipped(skipped: list[tuple[str, str]], file: Path) -> None:
    for name, reason in skipped[:SHOWN]:
        log(f"skipped {name}: {reason}")
    if len(skipped) > SHOWN:
        log(f"and {len(skipped) - SHOWN} more; all are in {file}")
