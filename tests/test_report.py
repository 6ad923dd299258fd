"""The report: one page that needs no other file, whatever the runs it is given."""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CLUSTERS, HEADROOM, QUICK_TUNING, RUNTIME, batch, copy_run, tiny_mae
from conftest import Runs
from matplotlib.figure import Figure

import moce
from moce.data.domains import domain_of, find_domains
from moce.evaluation.results import make_row, write_rows
from moce.inference.reconstructions import hide, paste
from moce.models.encoder import patchify, take
from moce.models.mae import patch_target, random_mask
from moce.reporting.images import montage
from moce.reporting.load import Run, gather
from moce.reporting.losses import curve, draw_losses
from moce.reporting.results_table import Results
from moce.reporting.style import looks_of

EVIL = '<script>alert("x")</script>'
EVIL_FOLDER = "<b>&'run"


def section_titles(html: str) -> list[str]:
    return re.findall(r'<h2 id="[^"]*">([^<]*)</h2>', html)


def demo_rows(bank: Any, task: str = "digits") -> list[dict[str, Any]]:
    """Rows as the demo writes them, for one task."""
    choice = bank.select("demo:digits").to_json()
    probes = {"mae": 0.5, "mae_plus": 0.6, "moce": 0.7, "random": 0.55, "best_route": 0.72}
    common = {"task": task, "data": "demo:digits", "metric": "accuracy", "labels": 9}

    def row(name: str, protocol: str, values: list[float]) -> dict[str, Any]:
        selection = name if name in ("random", "best_route") else None
        reference = "moce" if selection else name
        chosen = choice if name == "moce" else None
        return make_row(
            **common,
            backbone=name,
            reference=reference,
            selection=selection,
            protocol=protocol,
            values=values,
            choice=chosen,
        )

    rows = [row(name, "linear", [value - 0.01, value + 0.01]) for name, value in probes.items()]
    return rows + [row(name, "finetune", [probes[name] + 0.1]) for name in ("mae_plus", "moce")]


@pytest.fixture(scope="module")
def demo(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs and results whose names hold HTML."""
    folder = tmp_path_factory.mktemp("report") / EVIL_FOLDER
    for run in (runs.mae, runs.clusters, runs.moce):
        copy_run(run, folder / run.name)
    (folder / "evaluation").mkdir()
    write_rows(folder / "evaluation", demo_rows(moce.load(runs.moce), EVIL))
    return folder


@pytest.fixture(scope="module")
def page(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "new" / "report.html"
    result = moce.report(demo, out=out, max_images=4)
    assert result.page == out
    assert result.size == out.stat().st_size < 3_000_000
    assert str(out) in result.summary()
    return out.read_text()


def test_all_sections_in_reading_order(page: str) -> None:
    assert section_titles(page) == [
        "Summary",
        "Results",
        "Losses",
        "Clusters",
        "Experts of MoCE",
        "Reconstructions",
    ]


def test_page_asks_the_network_for_nothing(page: str) -> None:
    assert "<script" not in page.lower()
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"@import|url\(", page)


def test_links_lead_to_sections(page: str) -> None:
    targets = re.findall(r'href="#([^"]*)"', page)
    identities = re.findall(r' id="([^"]*)"', page)
    assert set(targets) <= set(identities)
    assert len(identities) == len(set(identities))


def test_every_picture_has_words_and_is_whole(page: str) -> None:
    pictures = re.findall(r'<img src="data:([^;]*);base64,([^"]*)" alt="([^"]*)"', page)
    assert len(pictures) == page.count("<img ") > CLUSTERS
    for media_type, content, alt in pictures:
        assert alt
        decoded = base64.b64decode(content, validate=True)
        if media_type == "image/svg+xml":
            ET.fromstring(decoded)
        else:
            assert decoded[8:12] == b"WEBP"


def test_names_are_escaped(page: str) -> None:
    assert "&lt;script&gt;alert(" in page
    assert "&lt;b&gt;&amp;&#39;run" in page
    assert 'alt="Routes with most votes. &lt;script&gt;' in page
    assert EVIL_FOLDER not in page


def test_results_table(page: str) -> None:
    text = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    assert "70.0 ± 1.0" in text  # MoCE, linear probe
    assert "+2.0" in text  # regret: 72 - 70


@pytest.mark.parametrize(
    ("given", "titles"),
    [
        (["mae"], ["Summary", "Losses", "Reconstructions"]),
        (["clusters"], ["Summary", "Clusters"]),
        (["moce"], ["Summary", "Losses", "Experts of MoCE", "Reconstructions"]),
    ],
)
def test_any_subset_of_runs(
    runs: Runs, tmp_path: Path, given: list[str], titles: list[str]
) -> None:
    folders = [getattr(runs, name) for name in given]
    result = moce.report(*folders, out=tmp_path / "page.html", max_images=2)
    assert result.sections == titles
    assert result.runs == len(given)


def test_page_says_when_images_and_metrics_are_gone(runs: Runs, tmp_path: Path) -> None:
    for name in ("clusters", "moce"):
        copy_run(getattr(runs, name), tmp_path / "all" / name)
        config = tmp_path / "all" / name / "config.yaml"
        config.write_text(config.read_text().replace(str(runs.data), str(tmp_path / "gone")))
    (tmp_path / "all" / "moce" / "metrics.jsonl").write_text("")
    moce.report(tmp_path / "all", out=tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert html.count("The pictures are left out") == 3
    assert "image/webp" not in html
    assert "Nothing was logged by: moce." in html
    assert "Nothing was logged about the gates." in html


def test_unfinished_run_shows_its_losses(runs: Runs, tmp_path: Path) -> None:
    copy_run(runs.mae, tmp_path / "mae")
    (tmp_path / "mae" / "model.json").unlink()
    result = moce.report(tmp_path / "mae", out=tmp_path / "page.html")
    assert result.sections == ["Summary", "Losses"]


def test_wrong_folders_are_refused(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "missing", runs.backbone):
        with pytest.raises(moce.MoceError, match=folder.name) as raised:
            moce.report(runs.mae, folder, out=tmp_path / "page.html")
        assert "\n" not in str(raised.value)
    with pytest.raises(moce.MoceError, match="is a folder"):
        moce.report(runs.mae, out=tmp_path)
    with pytest.raises(moce.MoceError, match=r"runs.* is missing"):
        moce.report(out=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_damaged_results_are_named(runs: Runs, tmp_path: Path) -> None:
    copy_run(runs.mae, tmp_path / "mae")
    (tmp_path / "mae" / "rows.jsonl").write_text("{")
    with pytest.raises(moce.MoceError, match=r"rows\.jsonl is corrupt"):
        gather([tmp_path])


def test_a_run_given_twice_is_shown_once(runs: Runs) -> None:
    assert len(gather([runs.mae, runs.mae.parent]).of_kind("mae")) == 1


def test_losses_of_a_mixture_are_its_reconstruction_errors(runs: Runs) -> None:
    mixture = gather([runs.moce]).runs[0]
    assert curve(mixture)[1] == [row["reconstruction"] for row in mixture.metrics]


@pytest.mark.parametrize("norm_pix", [True, False])
def test_perfect_prediction_gives_the_image_back(norm_pix: bool) -> None:
    images, noise, _ = batch(4)
    _, removed = random_mask(noise, 0.75)
    prediction = patch_target(take(patchify(images, (4, 4)), removed), norm_pix)
    assert torch.allclose(paste(prediction, removed, images, (4, 4), norm_pix), images, atol=1e-5)


def test_visible_patches_are_pasted_in_untouched() -> None:
    images, noise, _ = batch(4)
    mae = tiny_mae()
    output = mae(images, noise)
    pasted = patchify(paste(output.prediction, output.removed, images, (4, 4), True), (4, 4))
    visible = torch.ones(4, 16, dtype=torch.bool).scatter(1, output.removed, False)
    assert torch.equal(pasted[visible], patchify(images, (4, 4))[visible])
    assert not torch.allclose(pasted[~visible], patchify(images, (4, 4))[~visible], atol=0.1)


def test_hidden_patches_are_gray_and_the_others_as_they_were() -> None:
    images, noise, _ = batch(2)
    pixels = (images - images.min()) / (images.max() - images.min())
    keep, removed = random_mask(noise, 0.75)
    hidden = patchify(hide(pixels, removed, (4, 4)), (4, 4))
    assert len(take(hidden, removed).unique()) == 1
    original = (patchify(pixels, (4, 4)) * 255).round().to(torch.uint8)
    assert torch.equal(take(hidden, keep), take(original, keep))


def test_montage_lays_images_out_in_rows() -> None:
    picture = montage(torch.zeros(5, 3, 16, 32, dtype=torch.uint8), 3, "five")
    gap = 1
    assert f'width="{3 * (32 + gap) + gap}" height="{2 * (16 + gap) + gap}"' in picture


def test_domains_are_first_folders_that_tell_images_apart() -> None:
    assert find_domains(["a/1", "a/2", "b/1"]) == ["a", "b"]
    assert find_domains(["a/1", "a/2"]) == []
    assert find_domains([str(number) for number in range(20)]) == []
    assert find_domains([f"{number}/1" for number in range(20)]) == []


def test_results_with_gaps() -> None:
    row = {"task": "t", "backbone": "moce", "protocol": "linear", "values": [0.5, 0.7]}
    results = Results([{**row, "choice": None}])
    assert results.mean("t", "linear", "moce") == pytest.approx(0.6)
    assert results.regret("t", "linear") is None
    assert results.average("linear", "best_route") is None
    assert results.backbones("linear") == ["moce"]


@pytest.fixture(scope="module")
def measured(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A probe, a fine-tune and an evaluation of the same task, and headroom."""
    root = tmp_path_factory.mktemp("measured")
    probe = {"kind": "knn", "num_labels": 9, **RUNTIME}
    moce.probe(runs.mae, runs.task, out=root / "probe", **probe)
    moce.probe(runs.mae, runs.task, out=root / "again", **probe)
    moce.finetune(runs.backbone, runs.task, out=root / "tuned", **QUICK_TUNING)
    suite = root / "suite.yaml"
    tasks = [{"name": "shapes", "data": str(runs.task)}]
    suite.write_text(json.dumps({"name": "s", "labels": 9, "tasks": tasks}))
    backbones = (f"a={runs.mae}", f"b={runs.moce}")
    moce.evaluate(suite, backbones=backbones, protocols=("knn",), out=root / "eval", **RUNTIME)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moce.commands.headroom.SMALLEST_GROUP", 8)
        inputs = {"mae": runs.mae, "clusters": runs.clusters}
        moce.headroom(runs.data, out=root / "headroom", **inputs, **HEADROOM)
    return root


@pytest.mark.parametrize(
    ("name", "titles"),
    [
        ("probe", ["Summary", "Results"]),
        ("tuned", ["Summary", "Results", "Losses"]),
        ("eval", ["Summary", "Results"]),
        ("headroom", ["Summary", "Headroom"]),
    ],
)
def test_whatever_measured_something_is_shown(
    measured: Path, tmp_path: Path, name: str, titles: list[str]
) -> None:
    result = moce.report(measured / name, out=tmp_path / "page.html")
    assert result.sections == titles
    assert "Unfinished" not in result.page.read_text()


def test_results_of_several_runs_stand_beside_each_other(measured: Path, tmp_path: Path) -> None:
    material = gather([measured])
    assert len(material.of_kind("evaluation")) == 1
    assert [run.label for run in material.of_kind("probe")] == ["Probe (again)", "Probe (probe)"]
    names = material.results.backbones("knn")
    assert len(names) == 4
    assert sum(name.endswith("(probe)") for name in names) == 1
    moce.report(measured, out=tmp_path / "page.html")


def test_every_line_and_point_of_a_chart_looks_different() -> None:
    """Also of runs and backbones of the same kind."""
    rows = [
        {"selection": s, "backbone": b}
        for s, b in (
            ("best_route", "best1"), ("best_route", "best2"), (None, "mae"), (None, "x"), (None, "y"),
        )
    ]  # fmt: skip
    looks = looks_of(rows)
    assert (
        len({(look.color, look.marker) for look in looks})
        == len({look.title for look in looks})
        == 5
    )
    metrics = [{"epoch": n, "step": n, "loss": 1.0} for n in range(3)]
    runs = [Run(Path(name), "mae", {}, {}, metrics, [], name) for name in "abcdef"]
    axes = Figure().subplots()
    draw_losses(axes, runs)
    lines = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines]
    assert len({color for color, _, _ in lines}) == len(runs)


def test_a_click_enlarges_a_picture_without_a_script(page: str) -> None:
    assert page.count('<label class="zoom"><input type="checkbox"') == page.count("<img ")
    assert ".zoom input:checked + img { position: fixed;" in page
    assert "<script" not in page


def test_loose_images_beside_folders_are_a_domain_of_their_own() -> None:
    ids = ["cats/1.png", "cats/2.png", "dogs/1.png", "loose.png"]
    assert find_domains(ids) == ["cats", "dogs", ""]
    assert [domain_of(name) for name in ids] == ["cats", "cats", "dogs", ""]
