"""Tar and parquet files by URL, through fsspec: read by range, in blocks that are kept on the disk."""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, TypeVar, cast

from moce.data.readers.block_cache import BLOCK, block_cache
from moce.data.readers.manifest import MANIFEST, parse_manifest
from moce.data.readers.sample import error_line
from moce.data.readers.storage import Storage
from moce.errors import MoceError, Unreachable

SCHEME = re.compile(r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://")
READABLE = (".tar", ".parquet")
VERSIONS = (  # what file systems of fsspec call them
    *("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "mtime", "created"),
    *("updated", "blob_id", "oid"),
)
TRIES, FIRST_WAIT = 6, 0.5  # seconds, doubled after every try
OPENED_AT_ONCE = 16
PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
T = TypeVar("T")


def is_url(data: str) -> bool:
    return SCHEME.match(data) is not None


@dataclass(frozen=True)
class RemoteFile:
    """A file by its URL. version: differs once the file has been replaced, where its server tells."""

    url: str
    size: int
    version: str

    @property
    def name(self) -> str:
        return self.url

    @property
    def _key(self) -> str:
        return hashlib.sha256(f"{self.url} {self.size} {self.version} {BLOCK}".encode()).hexdigest()

    def read(self, start: int, size: int) -> bytes:
        if start + size > self.size:
            raise EOFError("the file ends within the image")
        key, parts = self._key, []
        while size > 0:
            number, inside = divmod(start, BLOCK)
            length = min(size, BLOCK - inside)
            fetch = partial(self._fetch_block, number)
            parts.append(block_cache().read(key, number, inside, length, fetch))
            start, size = start + length, size - length
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _fetch_block(self, number: int) -> bytes:
        return self.fetch(number * BLOCK, min(self.size, (number + 1) * BLOCK))

    def fetch(self, start: int, end: int) -> bytes:
        """These bytes from the server."""
        content = _retried(self.url, lambda fs, path: fs.cat_file(path, start=start, end=end))
        if len(content) == self.size:  # a server that sends the whole file instead of a range
            return content[start:end]
        if len(content) != end - start:
            raise Unreachable(
                f"cannot read {self.url}: got {len(content)} bytes of the {end - start} from {start}"
            )
        return content

    def open(self, *, sparse: bool = False) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(_Reader(self, sparse), 2**13))


class _Reader(io.RawIOBase):
    """A remote file to read from and seek in. sparse: fetches and keeps no more than is read."""

    def __init__(self, file: RemoteFile, sparse: bool) -> None:
        self._file, self._sparse, self._place = file, sparse, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.size}[whence]
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._file.size - self._place))
        end = self._place + size
        sparse = self._sparse and size > 0
        buffer[:size] = (
            self._file.fetch(self._place, end) if sparse else self._file.read(self._place, size)
        )
        self._place = end
        return size


# --- which files a URL names ----------------------------------------------------------------------


def find_remote(url: str, expand: Callable[[str], list[str]]) -> tuple[str, list[Storage]]:
    """ ".tar" or ".parquet", and the files of a URL: one, a pattern, or a folder of them.

    expand: writes out {000..012}. Raises MoceError if there are none, or one is missing.
    """
    urls = [found for text in expand(url) for found in _matching(text)]
    suffixes = {_suffix(found) for found in urls}
    if not urls or suffixes == {None}:
        return _in_folder(url.rstrip("/"))
    if len(suffixes) > 1:
        raise MoceError(f"{url} names files of different kinds; give them as several sources")
    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        return str(suffixes.pop()), list(pool.map(remote_file, urls))


def _suffix(url: str) -> str | None:
    path = url.split("?")[0]
    return next((suffix for suffix in READABLE if path.endswith(suffix)), None)


def _matching(url: str) -> list[str]:
    """The files that * stands for, in order; a URL without it stands for itself."""
    if "*" not in url:
        return [url]
    found = _retried(url, lambda fs, path: [fs.unstrip_protocol(p) for p in fs.glob(path)])
    if not found:
        raise MoceError(f"no such images: {url}")
    return sorted(found)


def _in_folder(url: str) -> tuple[str, list[Storage]]:
    """The files that moce pack wrote to a folder, or those that lie in it, if its server lists it."""
    url = url.removesuffix(f"/{MANIFEST}")
    try:
        text = _retried(f"{url}/{MANIFEST}", lambda fs, path: fs.cat_file(path))
    except FileNotFoundError:
        return _listed(url)
    files: list[Storage] = []
    for shard in parse_manifest(f"{url}/{MANIFEST}", text.decode("utf-8", "replace")).shards:
        files.append(RemoteFile(f"{url}/{shard.file}", shard.bytes, shard.sha256))
    return ".parquet", files


def _listed(url: str) -> tuple[str, list[Storage]]:
    try:
        found = _retried(
            url, lambda fs, path: [fs.unstrip_protocol(p) for p in fs.ls(path, detail=False)]
        )
    except FileNotFoundError:
        found = []
    for suffix in READABLE:
        urls = sorted(each for each in found if _suffix(each) == suffix)
        if urls:
            with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
                return suffix, list(pool.map(remote_file, urls))
    raise MoceError(
        f"no such images: {url} (by URL moce reads .tar and .parquet files, and folders of them)"
    )


def remote_file(url: str) -> RemoteFile:
    """Ask for the size of a file. Raises MoceError if there is no such file."""
    try:
        found = _retried(url, lambda fs, path: fs.info(path))
    except FileNotFoundError:
        raise MoceError(f"no such images: {url}") from None
    if found.get("type") == "directory" or found.get("size") is None:
        raise MoceError(f"cannot read {url}: its server does not say its size")
    version = {name: str(found[name]) for name in VERSIONS if found.get(name)}
    return RemoteFile(url, int(found["size"]), json.dumps(version, sort_keys=True))


# --- requests -------------------------------------------------------------------------------------


def _retried(url: str, ask: Callable[[Any, str], T]) -> T:
    """The result of ask(file system, path), after several tries if the network fails.

    Raises FileNotFoundError, or Unreachable if it keeps failing.
    """
    wait = FIRST_WAIT
    for number in range(TRIES):
        try:
            return ask(*_file_system(url))
        except FileNotFoundError as error:
            if not _is_of_network(error.__cause__):
                raise
            failure: Exception = cast(Exception, error.__cause__)
        except (PermissionError, NotImplementedError) as error:
            raise Unreachable(f"cannot read {url}: {error_line(error)}") from None
        except MoceError:
            raise
        except Exception as error:  # of sockets and the libraries of each service: any type
            failure = error
        if number < TRIES - 1:
            time.sleep(wait)
            wait *= 2
    raise Unreachable(f"cannot read {url}: {error_line(failure)}; is the network up?")


def _is_of_network(error: BaseException | None) -> bool:
    """Whether fsspec took a failed connection or server for a missing file."""
    status = getattr(error, "status", 0)
    of_client = type(error).__module__.startswith("aiohttp") and not status
    return isinstance(error, OSError) or of_client or status >= 500


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    scheme = url.split("://")[0]
    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url))
    except ImportError:
        package = PACKAGES.get(scheme, f"the package of fsspec for {scheme}")
        raise MoceError(f"{scheme}:// needs a library: pip install {package}") from None
    except ValueError:
        known = "s3, gs, https, hf and the other protocols of fsspec"
        raise MoceError(f"cannot read {url}: unknown {scheme}:// (known: {known})") from None
