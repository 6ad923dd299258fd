"""moce explore on 100,000 images: seconds of the map, of what the page asks for, and of a picture of it.

    python -m benchmarks.explore                 # about three minutes; the page's parts need chromium

Features are planted around random centers: only their number and width matter here. How long features
take is a forward pass per image (docs/performance.md).
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from PIL import Image

from benchmarks.measure import FOLDER, chosen, keep, options
from moce.data.readers.sample import Sample
from moce.explorer.embedding import Embedded, Embedder
from moce.explorer.explorer import Explorer
from moce.explorer.projection import nearest, place, project
from moce.explorer.reconstruction import Reconstructor
from moce.explorer.server import Server, Status, address, listen, serve
from moce.models.cluster_model import ClusterModel
from moce.models.encoder import EncoderSpec

PACKAGES = ("torch", "scikit-learn", "aiohttp")
WIDTH, CENTERS = 768, 256
T = TypeVar("T")


def timed(name: str, count: int, work: Callable[[], T], rows: list[dict[str, Any]]) -> T:
    start = time.perf_counter()
    result = work()
    rows.append({"what": name, "images": count, "seconds": round(time.perf_counter() - start, 4)})
    print(f"{name:40} {count:8,} images {rows[-1]['seconds']:9.3f} s", flush=True)
    return result


def planted(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of unit norm in float16, and the center of each."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(CENTERS, WIDTH, generator=generator)
    center = torch.randint(CENTERS, (count,), generator=generator)
    features = centers[center] + torch.randn(count, WIDTH, generator=generator)
    return torch.nn.functional.normalize(features, dim=1).half(), center


def explorer_of(features: torch.Tensor, center: torch.Tensor, places: torch.Tensor) -> Explorer:
    arguments = {"img_size": 32, "patch_size": 16, "embed_dim": WIDTH, "depth": 1, "num_heads": 1}
    spec = EncoderSpec("vit_tiny_patch16_224", arguments)
    zeros = torch.zeros(CENTERS)
    centroids = torch.eye(CENTERS, WIDTH)
    clusters = ClusterModel(
        centroids, zeros, torch.zeros(WIDTH), zeros, 0.05, "mean", 0.5, spec, spec.build()
    )
    count = len(features)
    image = Image.effect_noise((64, 64), 60).convert("RGB")
    samples = [
        Sample(f"folder {n % 7}/{n:06d}.jpg", image.copy, f"class {n % 50}") for n in range(count)
    ]
    embedded = Embedded(torch.arange(count), features, center, torch.ones(count))
    embedder = Embedder(clusters, torch.device("cpu"))
    return Explorer(samples, embedded, places, embedder, None, Reconstructor())


def the_map(count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    features, _ = planted(count)
    timed("map by PCA", count, lambda: project(features, "pca"), rows)
    places = timed("map by t-SNE", count, lambda: project(features), rows)
    few = features[:10].float()
    timed("nearest of 10 images", count, lambda: nearest(few, features, 6), rows)
    timed("places of 10 images", count, lambda: place(few, features, places), rows)
    return rows


def the_page(count: int) -> list[dict[str, Any]]:
    from playwright.sync_api import sync_playwright

    rows: list[dict[str, Any]] = []
    features, center = planted(count)
    places = torch.rand(count, 2, generator=torch.Generator().manual_seed(1))
    explorer = explorer_of(features, center, places)
    content = timed("answer with the map", count, lambda: json.dumps(explorer.map()), rows)
    rows[-1]["megabytes"] = round(len(content) / 1e6, 1)
    listener, ended = listen("127.0.0.1", 0), threading.Event()
    url, status = address(listener), Status({"run": "", "images": count, "clusters": CENTERS})
    status.explorer = explorer
    server = Server(status, lambda wanted: {})
    thread = threading.Thread(target=serve, args=(server, listener, ended), daemon=True)
    thread.start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(300_000)

        def load() -> None:
            page.goto(url)
            page.wait_for_selector("#legend button")

        timed("page loaded, without a GPU", count, load, rows)
        page.wait_for_timeout(1000)
        drawn = []
        for _ in range(10):
            page.evaluate("explorer.plot.draw()")
            page.wait_for_timeout(300)
            drawn.append(page.evaluate("explorer.plot.drawn"))
        rows.append({"what": "frame", "images": count, "seconds": sorted(drawn)[5] / 1000})
        print(f"{'frame, median of 10':40} {count:8,} images {rows[-1]['seconds']:9.4f} s")
        stage = page.locator("#stage").bounding_box()
        for step in range(50):
            page.mouse.move(stage["x"] + 300 + step, stage["y"] + 300)
        found = page.evaluate(
            "(() => { const t = performance.now(); for (let n = 0; n < 1000; n++)"
            " explorer.plot.at(300 + n % 200, 300); return performance.now() - t; })()"
        )
        rows.append({"what": "dot under the mouse", "images": count, "seconds": found / 1e6})
        print(f"{'dot under the mouse':40} {count:8,} images {found / 1e6:9.6f} s")
        browser.close()
    ended.set()
    thread.join(5)
    return rows


PARTS = {"map": the_map, "page": the_page}


def main() -> None:
    given = options(__doc__, PARTS, FOLDER / "explore.json").parse_args()
    for name, part in chosen(given.only, PARTS).items():
        rows = part(10_000 if given.short else 100_000)
        keep(given.out, name, rows, PACKAGES, short=given.short)


if __name__ == "__main__":
    main()
