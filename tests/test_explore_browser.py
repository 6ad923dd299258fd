"""moce explore as its user sees it: the real command and a real Chromium, without a window."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from builders import copy_run, customize
from commands import QUIET
from conftest import Runs
from safetensors.torch import load_file

import moce
from moce.customization.selection import route_name

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
PATIENCE = 120_000  # ms: a loaded machine is slow

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no browser here: apt-get install chromium"),
]


@contextmanager
def explored(*words: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The running command and the address it prints."""
    command = [sys.executable, "-m", "moce", "explore", *map(str, words), "--port", "0", *QUIET]
    command = list(map(str, command))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        said = ""
        assert process.stderr is not None
        while (found := re.search(r"http://127\.0\.0\.1:\d+/", said)) is None:
            line = process.stderr.readline()
            assert line, said
            said += line
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


@contextmanager
def opened(url: str, refused: int = 0) -> Iterator[Any]:
    """The page in a browser; it must ask nobody but the command, and have no errors.

    refused: how many requests the command refuses, which the browser notes.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(PATIENCE)
        asked: list[str] = []
        problems: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console", lambda line: problems.append(line.text) if line.type == "error" else None
        )
        page.goto(url)
        page.wait_for_selector("#legend button")
        yield page
        browser.close()
    assert asked and all(name.startswith((url, "data:")) for name in asked)
    assert len(problems) == refused and all("400 (Bad Request)" in line for line in problems)


def test_a_newcomer_looks_around_drops_images_and_exports(runs: Runs, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    run = copy_run(runs.moce, tmp_path / "moce")
    own = tmp_path / "own"
    own.mkdir()
    for number, path in enumerate(sorted((runs.task / "train").rglob("*.png"))):
        shutil.copy(path, own / f"{number:04d}.png")
    bank = moce.load(runs.moce)
    choice = bank.select(own, "merge")
    unreadable = tmp_path / "broken.png"
    unreadable.write_bytes(b"nothing")
    with explored(run) as (process, url), opened(url, refused=1) as page:
        # The map: every image of the run, in as many colors as there are routes.
        images = page.evaluate("explorer.map.ids.length")
        assert images == len(list(runs.data.rglob("*.png")))
        assert f"{images} images" in page.text_content("#facts")
        page.select_option("#coloring", label="route")
        assert page.locator("#legend button").count() == len(bank.routes)
        # A dot: its image on hover, its cluster after a click.
        x, y = page.evaluate("explorer.plot.screen(3)")
        stage = page.locator("#stage").bounding_box()
        page.mouse.move(stage["x"] + x, stage["y"] + y)
        page.wait_for_selector("#tip img[src]")
        point = int(page.get_attribute("#tip", "data-point"))
        assert page.evaluate(f"explorer.map.ids[{point}]") in page.text_content("#tip")
        assert page.locator("#tip img").evaluate("image => image.decode().then(() => image.width)")
        page.mouse.down()
        page.mouse.up()
        page.wait_for_selector("#cluster .images img")
        cluster = page.evaluate(f"explorer.map.clusterOf[{point}]")
        route = route_name(tuple(bank.model.routes()[cluster].tolist()))
        assert page.text_content("#cluster h2") == f"Cluster {cluster}"
        assert f"route {route}" in page.text_content("#cluster h3")
        members = page.evaluate(f"explorer.map.clusterOf.filter((c) => c === {cluster}).length")
        assert page.locator("#cluster .images img").count() == members
        # Images of one's own: all but the broken one vote; the choice is that of the library.
        page.click("#owntab")
        page.set_input_files("#files", [*sorted(own.iterdir()), unreadable])
        page.wait_for_selector("#pictures img")
        assert "1 file" in page.text_content("#unreadable summary")
        assert page.locator("#yours img").count() == len(list(own.iterdir()))
        page.select_option("#strategy", "merge")
        expect(page.locator("#choice strong")).to_have_text("merge", timeout=PATIENCE)
        votes = dict(choice.votes)
        shown = page.locator("#votes").inner_text().split("\n")
        for voted, count in ((r, n) for r, n in votes.items() if n):
            assert shown[shown.index(f"route {route_name(voted)}") + 1].startswith(f"{count} vote")
        page.wait_for_selector("#pictures img")
        labels = page.locator("#pictures figcaption").all_inner_texts()
        assert [label.split("\n")[0] for label in labels[:4]] == [
            *("image", "masked", "MAE", "chosen: merge")
        ]
        # The backbone of that choice.
        page.fill("#own input[type=text]", "mine")
        page.click("#own button.go")
        page.wait_for_selector("#own .exported pre")
        assert str(run / "explore" / "backbones" / "mine") in page.text_content("#own .exported")
        # A second drop of nothing but rubbish is told, and Ctrl-C ends the command.
        page.set_input_files("#files", [unreadable])
        page.wait_for_selector("#dropproblem:not([hidden])", state="attached")
        assert "none of 1 files can be read" in page.text_content("#dropproblem")
        ctrl_c(process)
    customize(runs.moce, own, tmp_path / "same", strategy="merge")
    same = load_file(tmp_path / "same" / "model.safetensors")
    mine = load_file(run / "explore" / "backbones" / "mine" / "model.safetensors")
    assert same.keys() == mine.keys() and all((same[key] == mine[key]).all() for key in same)


def ctrl_c(process: subprocess.Popen[str]) -> None:
    """Ctrl-C: the command ends at once, says what it has done, and is content."""
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert "exported: " in out and "map of" in out
    assert "Traceback" not in error


def test_ctrl_c_ends_it_before_the_map_is_ready(runs: Runs, tmp_path: Path) -> None:
    """Nothing half-written remains."""
    out = tmp_path / "map"
    with explored(runs.clusters, "--out", out, "--batch-size", 1) as (process, url):
        assert url.startswith("http://127.0.0.1:")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        assert "Traceback" not in error
    assert not [path.name for path in tmp_path.rglob(".*")]
