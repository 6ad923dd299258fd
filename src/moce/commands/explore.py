"""moce explore: a map of a run's images in the browser, and what its experts make of yours."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moce.commands import customize, export
from moce.commands.setup import prepare
from moce.config import CustomizeSettings, ExploreSettings, ExportSettings
from moce.config.load import parse
from moce.customization.bank import Bank, load
from moce.data.divide import learning_rows
from moce.data.readers.factory import open_source
from moce.data.readers.sample import Sample
from moce.data.readers.table import labels_and_splits, select
from moce.data.rng import Stream, keyed_generator
from moce.data.value_range import check_values
from moce.errors import MoceError, counted
from moce.explorer.embedding import (
    FEATURES,
    INPUTS,
    Embedder,
    read_cached,
    read_embedded,
    write_embedded,
)
from moce.explorer.explorer import Explorer
from moce.explorer.projection import project
from moce.explorer.reconstruction import Reconstructor
from moce.runs.files import make_folder, write_tensors
from moce.runs.lock import locks_released
from moce.runs.model import INFO, SKIPPED, describe_kind, read_config, read_info
from moce.runtime.progress import log, meter
from moce.weights.from_runs import load_clusters

if TYPE_CHECKING:
    from moce.explorer.server import Status, Wanted

MAP, BACKBONES = "map.safetensors", "backbones"
PATIENCE = 5.0  # seconds for a thread to end
POLL = 0.1  # seconds
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


@dataclass
class ExploreResult:
    """folder: with features and map; images: on it; skipped: unreadable ones; exported: backbones."""

    folder: Path
    images: int
    skipped: int
    exported: list[Path] = field(default_factory=list)

    def summary(self) -> str:
        if not self.images:
            return "ended before the map was ready"
        skipped = f", {counted(self.skipped, 'unreadable one')} left out" if self.skipped else ""
        lines = [f"map of {counted(self.images, 'image')}{skipped}: {self.folder}"]
        return "\n".join([*lines, *(f"exported: {path}" for path in self.exported)])


class _Ended(Exception):
    """The user has ended the command while the map was made."""


def run(settings: ExploreSettings) -> ExploreResult:
    work = open_run(settings)
    return work.prepare_only() if settings.prepare else work.serve()


def open_run(settings: ExploreSettings) -> Work:
    """The run and its images, checked; nothing is computed or written yet."""
    _check_extra(settings)
    run = _run_of(settings.run)
    kind = read_info(run)["kind"]
    if kind not in ("moce", "clusters"):
        raise MoceError(
            f"{run} is {describe_kind(kind)}; moce explore takes a run of moce train or moce cluster"
        )
    out = settings.out or run / "explore"
    _check_folder(out)
    data, samples = _images(settings, run)
    device, precision = prepare(settings)
    bank = load(run) if kind == "moce" else None
    clusters = load_clusters(run) if bank is None else bank.clusters
    embedder = Embedder(clusters, device, precision, settings.batch_size)
    return Work(settings, run, out, data, samples, embedder, bank)


def _check_extra(settings: ExploreSettings) -> None:
    if not settings.prepare and find_spec("aiohttp") is None:
        raise MoceError("the explorer needs a library: pip install 'moce[explore]'")


def _run_of(folder: Path) -> Path:
    """The run to explore: of the folders of moce run and moce demo, the experts."""
    inner = folder / "moce"
    return inner if not (folder / INFO).is_file() and (inner / INFO).is_file() else folder


def _check_folder(out: Path) -> None:
    """Raise MoceError if the folder for the map is a file, or holds what moce did not write."""
    if out.exists() and not out.is_dir():
        raise MoceError(f"{out} is a file; give a folder for the map")
    own = {FEATURES, MAP, BACKBONES, SKIPPED}
    if out.is_dir() and {path.name for path in out.iterdir()} - own:
        raise MoceError(f"{out} contains files that are not of moce explore; give another --out")


def _images(settings: ExploreSettings, run: Path) -> tuple[str, Sequence[Sample]]:
    """DATA and its images: those the run has learned from, unless others are given."""
    data = settings.images or str(read_config(run).get("data"))
    try:
        samples: Sequence[Sample] = open_source(data)
    except MoceError as error:
        if settings.images is not None:
            raise
        raise MoceError(f"{error} ({run} was made from them); give images: RUN IMAGES") from None
    if settings.images is None:
        samples = select(samples, learning_rows(*labels_and_splits(samples), data))
    if not samples:
        raise MoceError(f"no images in {data}")
    check_values(samples, data)
    if len(samples) > settings.max_images:
        most = settings.max_images
        log(f"the map shows {most:,} of {len(samples):,} images, drawn at random (--max-images)")
        generator = keyed_generator(settings.seed, Stream.ORDER, 0)
        rows = torch.randperm(len(samples), generator=generator)[:most].sort().values
        samples = select(samples, rows.tolist())
    return data, samples


@dataclass
class Work:
    """What is explored, and where; done, skipped, exported: how far it is."""

    settings: ExploreSettings
    run: Path
    out: Path
    data: str
    samples: Sequence[Sample]
    embedder: Embedder
    bank: Bank | None
    done: int = 0
    skipped: int = 0
    exported: list[Path] = field(default_factory=list)

    def prepare_only(self) -> ExploreResult:
        return self._result(self.explorer(None, threading.Event()))

    def serve(self) -> ExploreResult:
        """Serve the page at once, and make its map meanwhile."""
        from moce.explorer.server import LOOPBACK, Server, Status, address, listen, serve

        host, ended = self.settings.host, threading.Event()
        status = Status(self._facts())
        listener = listen(host, self.settings.port)
        if host not in LOOPBACK:
            log(f"whoever reaches {host} can see these images and export backbones")
        failures: list[BaseException] = []
        making = partial(self._make, status, ended, failures)
        serving = partial(serve, Server(status, self.export, host), listener, ended)
        threads = [threading.Thread(target=work, daemon=True) for work in (making, serving)]
        try:
            for thread in threads:
                thread.start()
            log(f"open {address(listener)} in a browser; Ctrl-C ends it")
            while not ended.is_set():  # a wait for the event could sleep through a signal
                time.sleep(POLL)
        except KeyboardInterrupt:
            log("ended")
        finally:
            ended.set()
            for thread in threads:
                thread.join(PATIENCE)
        for failure in failures:
            raise failure
        return self._result(status.explorer)

    def _result(self, explorer: Explorer | None) -> ExploreResult:
        images = 0 if explorer is None else len(explorer.ids)
        return ExploreResult(self.out, images, self.skipped, self.exported)

    def _facts(self) -> dict[str, Any]:
        return {
            "run": str(self.run),
            "kind": "clusters" if self.bank is None else "moce",
            "images": len(self.samples),
            "data": self.data,
            "clusters": self.embedder.clusters.num_clusters,
            "routes": 0 if self.bank is None else len(self.bank.routes),
            "experts": 0 if self.bank is None else self.bank.model.num_experts,
            "blocks": [] if self.bank is None else list(self.bank.model.blocks),
            "folder": str(self.out / BACKBONES),
            "training": self.settings.images is None,
        }

    # --- the map ----------------------------------------------------------------------------------

    def _make(self, status: Status, ended: threading.Event, failures: list[BaseException]) -> None:
        """Make the map in a thread; a failure ends the command."""
        try:
            status.explorer = self.explorer(status, ended)
            status.facts["skipped"] = self.skipped
        except _Ended:
            return
        except BaseException as error:
            status.error = str(error)
            failures.append(error)
            ended.set()

    def explorer(self, status: Status | None, ended: threading.Event) -> Explorer:
        """The map, made or read from the folder. status: is told how far it is; ended: stops it."""

        def told(stage: str, done: int, total: int) -> None:
            if ended.is_set():
                raise _Ended
            if status is not None:
                status.stage, status.done, status.total = stage, done, total

        make_folder(self.out)
        inputs = self.embedder.describe(self.samples)
        found = None if self.settings.overwrite else read_embedded(self.out, inputs)
        if found is None:
            with meter("features", len(self.samples)) as bar:

                def advanced(done: int, total: int) -> None:
                    bar.advance(count=done - self.done)
                    self.done = done
                    told("features", done, total)

                most = self.settings.max_skipped
                embedded, skipped = self.embedder.embed_all(self.samples, self.data, most, advanced)
            write_embedded(self.out, embedded, inputs, skipped)
            found = embedded, len(skipped)
        embedded, self.skipped = found
        told("map", 0, len(embedded))
        inputs = f"{inputs}, {self.settings.projection}, seed {self.settings.seed}"
        places = None if self.settings.overwrite else read_cached(self.out / MAP, inputs)
        if places is None:
            xy = project(embedded.features, self.settings.projection, self.settings.seed)
            places = {"places": xy}
            write_tensors(self.out / MAP, places, {INPUTS: inputs})
        told("map", len(embedded), len(embedded))
        models = Reconstructor.of_run(self.run, self.bank)
        return Explorer(self.samples, embedded, places["places"], self.embedder, self.bank, models)

    # --- export -----------------------------------------------------------------------------------

    def export(self, wanted: Wanted) -> dict[str, Any]:
        """Write a backbone by the command that does so: customize of images, export of a route."""
        if self.bank is None:
            raise MoceError(f"{self.run} has no experts to export: moce train gives it some")
        if not NAME.fullmatch(wanted.name):
            raise MoceError(
                "name the backbone with letters, digits, dots, dashes and underscores, such as birds"
            )
        out = self.out / BACKBONES / wanted.name
        same = {"run": self.run, "out": out, "format": wanted.format, **_runtime(self.settings)}
        with locks_released():
            if wanted.images is not None:
                given = {"images": str(wanted.images), "strategy": wanted.strategy}
                done: Any = customize.run(parse(CustomizeSettings, {**same, **given}))
            else:
                plain: dict[str, Any] = {"run": self.run, "out": out, "format": wanted.format}
                done = export.run(parse(ExportSettings, {**plain, "route": wanted.route}))
        self.exported.append(out)
        return {"folder": str(out), "load_it": done.load_it}


def _runtime(settings: ExploreSettings) -> dict[str, Any]:
    names = ("seed", "device", "precision", "threads")
    return {name: getattr(settings, name) for name in names}
