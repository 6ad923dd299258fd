"""Write images as encoded into parquet files: in parallel, resumable, with checksums.

While a folder is written it holds finished files and a line about each in JOURNAL. A resumed pack
keeps those that match their checksums and writes the others; the result is the same to the byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow
import pyarrow.parquet

from moce.data.encode import Encoding, Row, encode
from moce.data.readers.manifest import JOURNAL, MANIFEST, Manifest, Shard, as_shard, sha256
from moce.data.readers.parquet_rows import LENGTH, OFFSETS, Group, encode_offsets
from moce.data.readers.sample import Sample
from moce.data.run_ahead import run_ahead
from moce.errors import MoceError
from moce.runs.files import append_line, atomic, read_lines, write_json, write_text
from moce.runtime.system import worker_threads

GROUP_ROWS, GROUP_BYTES = 100, 2**25  # of a row group: 100 rows, as `datasets` writes images
AHEAD_PER_THREAD = 4  # encoded images that wait
WRITTEN = re.compile(
    rf"\.?({re.escape(MANIFEST)}|{re.escape(JOURNAL)}|images-\d+\.parquet)(?P<temporary>\.[a-z0-9_]{{8}})?"
)
Advance = Callable[[int, int], None]  # images read since the last call, and unreadable ones of them


class ShardWriter:
    """Writes one parquet file: columns image, id, label and split.

    Images lie in it uncompressed (they are compressed themselves), and its footer says where.
    """

    def __init__(self, file: BinaryIO, *, several_labels: bool) -> None:
        """file: empty, opened to write and read. several_labels: whether labels are lists."""
        self._file, self._schema = file, _schema(several_labels)
        self._writer = pyarrow.parquet.ParquetWriter(
            file,
            self._schema,
            compression="none",
            use_dictionary=["label", "label.list.element", "split"],
            write_statistics=False,
        )
        self._groups: list[Group] = []
        self._offsets: list[int] = []
        self._sizes: list[int] = []

    @property
    def images(self) -> int:
        return len(self._offsets)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def append(self, rows: Sequence[Row]) -> None:
        """Write one row group."""
        start = self.size
        self._writer.write_table(self._table(rows), row_group_size=len(rows))
        self._file.flush()
        self._find(start, [row.content for row in rows])
        self._groups.append((len(rows), start))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:  # the file is not kept
            with suppress(Exception):
                self._writer.close()
            return
        places = np.array(self._offsets, np.uint64), np.array(self._sizes, np.uint32)
        self._writer.add_key_value_metadata({OFFSETS: encode_offsets(self._groups, *places)})
        self._writer.close()

    def _table(self, rows: Sequence[Row]) -> pyarrow.Table:
        images = [{"bytes": row.content, "path": row.path} for row in rows]
        columns = {
            "image": images,
            "id": [row.id for row in rows],
            "label": [self._label(row) for row in rows],
            "split": [row.split for row in rows],
        }
        return pyarrow.table(columns, schema=self._schema)

    def _label(self, row: Row) -> Any:
        is_list = pyarrow.types.is_list(self._schema.field("label").type)
        return [row.label] if is_list and isinstance(row.label, str) else row.label

    def _find(self, start: int, contents: Sequence[bytes]) -> None:
        """Note where images lie in what was just written: in order, each after its length."""
        written = os.pread(self._file.fileno(), self.size - start, start)
        place = 0
        for content in contents:
            place = written.index(LENGTH.pack(len(content)) + content, place) + LENGTH.size
            self._offsets.append(start + place)
            self._sizes.append(len(content))
            place += len(content)


def _schema(several_labels: bool) -> pyarrow.Schema:
    text, value = pyarrow.string(), {"dtype": "string", "_type": "Value"}
    features = {
        "image": {"_type": "Image"},
        "id": value,
        "label": {"feature": value, "_type": "List"} if several_labels else value,
        "split": value,
    }
    fields = {
        "image": pyarrow.struct({"bytes": pyarrow.binary(), "path": text}),
        "id": text,
        "label": pyarrow.list_(text) if several_labels else text,
        "split": text,
    }
    return pyarrow.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})


# --- the folder -----------------------------------------------------------------------------------


def check_pack_folder(out: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Raise MoceError unless images can be packed to the folder `out`; nothing is changed."""
    if out.exists() and not out.is_dir():
        raise MoceError(
            f"{out} is a file; give a folder to write to, or --size for a file of pixels"
        )
    for path in inputs:
        inner, outer = out.resolve(), path.resolve()
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise MoceError(f"{out} and the images {path} lie in each other; give another folder")
    names = [child.name for child in out.iterdir()] if out.is_dir() else []
    ours = MANIFEST in names or JOURNAL in names
    foreign = [name for name in names if not ours or not WRITTEN.fullmatch(name)]
    if foreign:
        raise MoceError(
            f"{out} contains {foreign[0]}, which moce pack did not write; give another folder"
        )
    if MANIFEST in names and not overwrite:
        raise MoceError(f"{out} is packed already; add --overwrite to replace it")


def clean_pack_folder(out: Path, *, everything: bool) -> None:
    """Remove what killed processes left, or all that moce pack wrote: the list of shards first."""
    for name in sorted((child.name for child in out.iterdir()), key=lambda name: name != MANIFEST):
        found = WRITTEN.fullmatch(name)
        if found and (everything or found["temporary"]):
            (out / name).unlink()


class ShardPacker:
    """Writes a folder of parquet files: iterate over `shards`, then call `finish`."""

    def __init__(
        self, out: Path, samples: Sequence[Sample], encoding: Encoding, shard_bytes: int
    ) -> None:
        """out: an existing folder. A shard is complete when it has `shard_bytes`."""
        self.out, self.samples, self.encoding = out, samples, encoding
        self._shard_bytes = shard_bytes
        self._several_labels = any(isinstance(sample.label, tuple) for sample in samples)
        self._shards: list[Shard] = []

    @property
    def done(self) -> int:
        """Images processed so far, readable or not."""
        return sum(shard.sources for shard in self._shards)

    def resume(self) -> int:
        """Keep the shards of an interrupted pack that are intact; the number of their images.

        Raises MoceError if it packed other images or in another way.
        """
        lines = read_lines(self.out / JOURNAL)
        if lines and lines[0] != self._job():
            raise MoceError(
                f"{self.out} was started with other images or settings; add --overwrite to start "
                "over, or choose another folder"
            )
        for line in lines[1:]:
            shard = as_shard(line)
            path = self.out / shard.file
            if not path.is_file() or sha256(path) != shard.sha256:
                break
            self._shards.append(shard)
        return self.done

    def _job(self) -> dict[str, str]:
        digest = hashlib.sha256(f"{self.encoding} {self._shard_bytes}".encode())
        for sample in self.samples:
            digest.update(json.dumps([sample.id, sample.label, sample.split]).encode())
        return {"job": digest.hexdigest()}

    def shards(self, advance: Advance, workers: int | None = None) -> Generator[Shard]:
        """Write the remaining shards. Can be closed, also by an error of `advance`, and resumed."""
        lines = [self._job(), *map(asdict, self._shards)]
        # Anew: the last line may be incomplete, and shards after the intact ones are written again.
        write_text(self.out / JOURNAL, "".join(json.dumps(line) + "\n" for line in lines))
        threads = workers or worker_threads()
        rest = islice(self.samples, self.done, None)
        jobs = (partial(encode, sample, self.encoding) for sample in rest)
        with closing(run_ahead(jobs, threads, AHEAD_PER_THREAD * threads)) as rows:
            while self.done < len(self.samples):
                shard = self._write(rows, advance)
                append_line(self.out / JOURNAL, asdict(shard))
                self._shards.append(shard)
                yield shard

    def _write(self, rows: Iterator[Row | str], advance: Advance) -> Shard:
        path, first = self.out / f"images-{len(self._shards):05d}.parquet", self.done
        sources, skipped = 0, list[tuple[str, str]]()
        with atomic(path) as temporary:
            with (
                temporary.open("w+b") as file,
                ShardWriter(file, several_labels=self._several_labels) as writer,
            ):
                while writer.size < self._shard_bytes:
                    group, reasons, count = _row_group(rows)
                    if not count:
                        break
                    skipped += [
                        (self.samples[first + sources + place].id, reason)
                        for place, reason in reasons
                    ]
                    sources += count
                    if group:
                        writer.append(group)
                    advance(count, len(reasons))
            size, digest = temporary.stat().st_size, sha256(temporary)
        return Shard(path.name, writer.images, sources, size, digest, skipped)

    def finish(self) -> Manifest:
        """Write the list of shards. Raises MoceError if no image was readable."""
        manifest = Manifest(str(self.encoding), self._shards)
        if not manifest.images:
            for shard in self._shards:
                (self.out / shard.file).unlink()
            (self.out / JOURNAL).unlink()
            with suppress(OSError):  # it had other files
                self.out.rmdir()
            raise MoceError(f"no readable image; the first one: {manifest.skipped[0][1]}")
        write_json(self.out / MANIFEST, manifest.to_json())
        (self.out / JOURNAL).unlink()
        return manifest


def _row_group(results: Iterator[Row | str]) -> tuple[list[Row], list[tuple[int, str]], int]:
    """The next readable images, place and reason of unreadable ones among them, and how many in all."""
    rows, reasons, count, size = list[Row](), list[tuple[int, str]](), 0, 0
    for result in results:
        if isinstance(result, Row):
            rows.append(result)
            size += len(result.content)
        else:
            reasons.append((count, result))
        count += 1
        if count >= GROUP_ROWS or size >= GROUP_BYTES:
            break
    return rows, reasons, count
