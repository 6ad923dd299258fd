"""Images by URL: from a web server with and without ranges, and from fsspec's memory file system."""

from __future__ import annotations

import http.server
import re
import shutil
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import torch
from builders import PRETRAIN, RUNTIME
from commands import one_line, run_command
from conftest import Runs
from test_pack import same
from test_training import same_losses, same_weights, stop_after

import moce
from moce.data.load import load_images, open_images
from moce.data.loader import BatchOrder
from moce.data.readers import remote
from moce.data.readers.block_cache import BlockCache, block_cache
from moce.data.readers.factory import located, open_source, paths_of
from moce.errors import Interrupted, MoceError, Unreachable

SIZE = (16, 16)


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves ranges, notes every request, and fails as often as it is told to."""

    requests: ClassVar[list[tuple[str, str]]] = []
    failures = 0
    ranges = True

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        Server.requests.append((self.path, asked or ""))
        path = Path(self.translate_path(self.path))
        if Server.failures > 0:
            Server.failures -= 1
            return self.send_error(503)
        if asked is None or not path.is_file() or not Server.ranges:
            return super().do_GET()
        start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups())
        content = path.read_bytes()[start : end + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        return None

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder with a pack, tar files and lone parquet files, and its URL."""
    root = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moce.commands.pack.MEGABYTE", 20_000)
        patch.setattr("moce.data.pack_shards.GROUP_ROWS", 10)
        moce.pack(runs.data, out=root / "packed", shard_size=1)
        moce.pack(runs.task, out=root / "task")
    noise = np.random.default_rng(0).integers(0, 256, (40, 100, 100, 3), np.uint8)
    np.savez(root / "large.npz", images=noise)
    moce.pack(root / "large.npz", out=root / "large")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moce.commands.pack.MEGABYTE", 250_000)
        patch.setattr("moce.data.pack_shards.GROUP_ROWS", 5)
        moce.pack(root / "large.npz", out=root / "far", shard_size=1)
    files = sorted(path for path in runs.data.rglob("*.png"))
    for number in range(2):
        with tarfile.open(root / f"s-{number:03d}.tar", "w") as archive:
            for path in files[number::2]:
                archive.add(path, arcname=str(path.relative_to(runs.data)))
    (root / "plain").mkdir()
    for path in (root / "packed").glob("*.parquet"):
        shutil.copy(path, root / "plain")
    handler = partial(Server, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield root, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of small blocks, and no long waits."""
    monkeypatch.setenv("MOCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "BLOCK", 4096)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(Server, "requests", [])
    monkeypatch.setattr(Server, "failures", 0)
    monkeypatch.setattr(Server, "ranges", True)


def downloads() -> list[tuple[str, str]]:
    return [request for request in Server.requests if request[1]]


# --- the same images ------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("name", ["packed", "packed/", "packed/_manifest.json", "s-{000..001}.tar",
                                  "plain/images-00000.parquet"])  # fmt: skip
def test_a_url_gives_what_the_files_give(site, name, ranges, monkeypatch) -> None:
    root, url = site
    monkeypatch.setattr(Server, "ranges", ranges)
    near, far = (open_source(f"{place}/{name}") for place in (root, url))
    assert len(near) == len(far) > 10
    for one, other in zip(near, far, strict=True):
        assert (one.id, one.label, one.split) == (other.id, other.label, other.split)
        assert one.open.read() == other.open.read()


def test_patterns_and_folders_are_listed_where_the_service_can(site, monkeypatch) -> None:
    root, _ = site
    memory = fsspec.filesystem("memory")
    for path in root.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/site/{path.relative_to(root)}", path.read_bytes())
    try:
        for name in ("packed", "plain", "plain/*.parquet", "s-*.tar"):
            near, far = (open_source(f"{place}/{name}") for place in (root, "memory://site"))
            assert [sample.id for sample in near] == [sample.id for sample in far]
            rows = np.random.default_rng(0).permutation(len(near))[:20].tolist()
            assert all(near[row].open.read() == far[row].open.read() for row in rows)
    finally:
        memory.rm("/site", recursive=True)


def test_sources_near_and_far_mix_and_keep_their_names(site, tmp_path: Path) -> None:
    root, url = site
    (tmp_path / "list.txt").write_text(f"{url}/task\n{root}/packed\n")
    samples = open_source(f"@{tmp_path / 'list.txt'}")
    starts = {sample.id.split("/")[0] for sample in samples}
    assert starts == {"task", "packed"}
    assert paths_of(f"{url}/task,{root}/packed") == [root / "packed"]
    assert located(f"{url}/task", tmp_path) == f"{url}/task"


def test_commands_take_urls(site, runs: Runs, tmp_path: Path) -> None:
    root, url = site
    assert same(load_images(f"{url}/packed", SIZE), load_images(f"{root}/packed", SIZE))
    words = [runs.backbone, f"{url}/task", "--kind", "knn", "--device", "cpu", "--threads", 1]
    assert run_command(["probe", *words]) == 0
    out = moce.embed(runs.backbone, f"{url}/task", out=tmp_path / "a.parquet", **RUNTIME)
    assert out.images == 48


# --- what is fetched ------------------------------------------------------------------------------


def test_opening_a_pack_reads_little_of_it_and_an_image_its_own_blocks(site) -> None:
    root, url = site
    samples = open_source(f"{url}/large")
    shards = list((root / "large").glob("*.parquet"))
    fetched = [int(end) - int(start) + 1 for start, end in map(range_of, downloads())]
    assert sum(fetched) < 2 * 65_536 * len(shards) < sum(p.stat().st_size for p in shards) / 4
    before = len(downloads())
    size = len(samples[7].open.read())
    assert size // 4096 <= len(downloads()) - before <= size // 4096 + 2


def range_of(request: tuple[str, str]) -> list[str]:
    return re.findall(r"\d+", request[1])


def test_every_block_is_fetched_once_and_kept_for_later_runs(site) -> None:
    _, url = site
    samples = open_source(f"{url}/packed")
    opened = len(downloads())
    for _ in range(2):
        contents = [sample.open.read() for sample in samples]
    blocks = downloads()[opened:]
    assert len(blocks) == len(set(blocks)) > 10
    block_cache.__globals__["_open"].cache_clear()  # as in another process
    assert [sample.open.read() for sample in samples] == contents
    assert len(downloads()) == opened + len(blocks)


def test_threads_that_need_one_block_fetch_it_once(tmp_path: Path) -> None:
    cache, fetched = BlockCache(tmp_path / "cache", 10**6), []

    def fetch() -> bytes:
        fetched.append(1)
        started.wait(0.05)
        return bytes(range(100))

    started = threading.Event()
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(cache.read("key", 0, n, 2, fetch)))
        for n in range(8)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(fetched) == 1 and sorted(found) == [bytes((n, n + 1)) for n in range(8)]


def test_the_cache_keeps_within_its_limit_and_serves_what_it_dropped(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "cache", 10_000)

    def read(number: int) -> bytes:
        return cache.read("aakey", number, 0, 1000, lambda: bytes([number]) * 1000)

    for number in [*range(40), 0, 39, 20]:
        assert read(number) == bytes([number]) * 1000
        kept = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*-*"))
        assert kept <= 10_000
    again = BlockCache(tmp_path / "cache", 5_000)
    again.read("aakey", 99, 0, 1, lambda: bytes(1000))
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*-*")) <= 5_000


def test_a_cache_that_cannot_be_written_to_is_done_without(
    site, tmp_path: Path, monkeypatch
) -> None:
    root, url = site
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("MOCE_CACHE", str(tmp_path / "file" / "cache"))
    one, other = (open_source(f"{place}/task")[0].open.read() for place in (root, url))
    assert one == other


def test_a_replaced_file_is_fetched_again(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for value in (b"one", b"two"):
        memory.pipe_file("/a.parquet", value)
        assert remote.remote_file("memory://a.parquet").read(0, 3) == value
    memory.rm("/a.parquet")


# --- training -------------------------------------------------------------------------------------


def test_far_files_are_read_one_after_the_other_and_images_mixed(monkeypatch) -> None:
    monkeypatch.setattr("moce.data.loader.SHUFFLED", 50)
    sizes = torch.tensor([100, 30, 70, 100, 1, 99])
    files = torch.arange(6).repeat_interleave(sizes)
    epochs = [BatchOrder(400, 400, 3, files)(epoch)[0] for epoch in range(3)]
    for rows in epochs:
        assert torch.equal(rows.sort().values, torch.arange(400))
        first = {int(f): int((files[rows] == f).nonzero()[0]) for f in range(6)}
        last = {int(f): int((files[rows] == f).nonzero()[-1]) for f in range(6)}
        for file, size in enumerate(sizes.tolist()):
            assert last[file] - first[file] <= size + 2 * 50
        assert (rows.diff() == 1).float().mean() < 0.1
    turns = [files[rows].unique_consecutive().tolist() for rows in epochs]
    assert turns[0] != turns[1] != turns[2]
    batches = [BatchOrder(400, 16, 3, files)(step)[0] for step in range(25)]
    assert torch.equal(torch.cat(batches), epochs[0])  # each step without those before it


def test_a_subset_knows_the_files_of_its_images(site) -> None:
    root, url = site
    images = open_images(f"{url}/far", SIZE)
    counts = np.bincount(images.far_files).tolist()
    assert len(counts) == 4 and sum(counts) == 40
    rows = [39, 0, 20]
    assert images.subset(rows).far_files.tolist() == images.far_files[rows].tolist()
    assert open_images(f"{root}/far", SIZE).far_files is None


def test_training_by_url_resumes_exactly(site, tmp_path: Path) -> None:
    _, url = site
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    given = {**PRETRAIN, "batch_size": 8, "log_every": 3, "save_every": 4, "steps": 14}
    moce.pretrain(f"{url}/far", out=straight, **given)
    watcher = stop_after(stopped, 1)
    with pytest.raises(Interrupted):
        moce.pretrain(f"{url}/far", out=stopped, **given)
    watcher.join()
    moce.pretrain(f"{url}/far", out=stopped, resume=True, **given)
    same_losses(straight, stopped)
    same_weights(straight, stopped)


def test_training_stops_when_the_network_does_and_skips_nothing(site, tmp_path: Path) -> None:
    _, url = site
    samples = open_source(f"{url}/far")
    Server.failures = 10**6
    with pytest.raises(MoceError, match=r"cannot read http.*is the network up\?"):
        load_images(samples, SIZE, max_skipped=1.0)


# --- failures -------------------------------------------------------------------------------------


def test_a_network_that_fails_at_times_changes_nothing(site) -> None:
    root, url = site
    samples = open_source(f"{url}/packed")
    Server.failures = remote.TRIES - 1
    assert samples[3].open.read() == open_source(f"{root}/packed")[3].open.read()
    assert Server.failures == 0


def test_a_network_that_keeps_failing_stops_the_run(site) -> None:
    """Its images are not taken for unreadable ones, which would be skipped."""
    _, url = site
    samples = open_source(f"{url}/task")
    Server.failures = 10**6
    with pytest.raises(Unreachable, match=r"cannot read http.*is the network up\?"):
        samples[0].open()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("SITE/nothing.parquet", "no such images: SITE/nothing.parquet"),
        ("SITE/s-{000..002}.tar", "no such images: SITE/s-002.tar"),
        ("SITE/nowhere/", "no such images: SITE/nowhere"),
        ("http://127.0.0.1:9/a.tar", "cannot read http://127.0.0.1:9/a.tar"),
        ("http://no.such.host.invalid/a.tar", "cannot read http://no.such.host.invalid/a.tar"),
        ("s3://bucket/a.parquet", "pip install s3fs"),
        ("gs://bucket/a.parquet", "pip install gcsfs"),
        ("sthree://bucket/a.parquet", "unknown sthree://"),
        ("memory://nowhere/a-*.tar", "no such images"),
        ("SITE/{s-000.tar,plain/images-00000.parquet}", "files of different kinds"),
        ("SITE/s-000.tar/x.png", "no such images"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(site, data, reason, tmp_path, capsys) -> None:
    _, url = site
    data, reason = (text.replace("SITE", url) for text in (data, reason))
    words = ["pack", data, "--out", tmp_path / "out"]
    assert run_command(words) == 2
    assert reason in one_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_remote_file_that_is_broken_is_named(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/a.parquet", b"no parquet")
    memory.pipe_file("/b.tar", b"\x1f\x8b" + bytes(600))
    for name, reason in (("a.parquet", "cannot read memory://a.parquet"), ("b.tar", "gunzip")):
        with pytest.raises(MoceError, match=reason) as refusal:
            open_source(f"memory://{name}")
        assert "\n" not in str(refusal.value)
    memory.rm("/a.parquet")
    memory.rm("/b.tar")
