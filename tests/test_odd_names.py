"""Bad images among good ones, and unusual names: nothing ends the run or leaves its folder."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow.parquet
import pytest
from commands import World, run_command, snapshot
from PIL import Image
from test_refused_files import CLUSTERS, parquet, png

from moce.evaluation.results import read_rows
from moce.runs.files import read_lines
from moce.runs.model import read_info

ODD_NAMES = [
    "ünïcödé/猫.png",
    "<script>alert(1)</script>/<u>&.png",
    f"{'n' * 200}/{'m' * 200}.png",
    "a b\t\"c'/new\nline.png",
    "-rf/--out.png",
    "rtl\u202eevil/x.png",
]


def test_bad_images_among_good_ones_are_skipped_counted_and_listed(
    runs, tmp_path: Path, capsys
) -> None:
    world = World(runs, tmp_path)
    folder = world.images(*(f"{number}.png" for number in range(8)))
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "fake.jpg").write_text("<html>")
    (folder / "bomb.png").write_bytes(png(40000, 40000))
    (folder / "empty.gif").write_bytes(b"")
    assert run_command(world.pretrain(folder)) == 0
    messages = capsys.readouterr().err
    assert "skipped 4 unreadable images" in messages and "Traceback" not in messages
    skipped = {row["id"]: row["reason"] for row in read_lines(world.out / "skipped.jsonl")}
    assert skipped.keys() == {"cut.png", "fake.jpg", "bomb.png", "empty.gif"}
    assert "exceeds limit" in skipped["bomb.png"] and all(skipped.values())
    assert read_info(world.out)["images"] == 8


def test_unusual_names_go_through_every_command(runs, tmp_path: Path, capsys) -> None:
    """In files and classes; the report shows them as text."""
    world = World(runs, tmp_path)
    folder = world.images(*ODD_NAMES, *(f"{name}.2.png" for name in ODD_NAMES))
    out = tmp_path / "<u>ünï"
    words = {
        "cluster": [*world.cluster("--num-clusters", 2, data=folder), "--out", out],
        "customize": world.customize(images=folder),
        "report": world.report(out),
    }
    for command, command in words.items():
        assert run_command(command) == 0, (command, capsys.readouterr().err)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and "<u>" not in page
    table = pyarrow.parquet.read_table(out / CLUSTERS)
    assert set(ODD_NAMES) <= set(table["id"].to_pylist())


def test_file_names_that_are_not_text(runs, tmp_path: Path, capsys) -> None:
    """Linux allows any bytes in them."""
    world = World(runs, tmp_path)
    folder = world.images(*(f"{number}.png" for number in range(6)))
    try:
        (folder / "0.png").rename(Path(str(folder)) / "\udcff\udcfe.png")
    except (OSError, UnicodeError):
        pytest.skip("this file system allows no such names")
    assert run_command(world.cluster("--num-clusters", 2, data=folder)) == 0, (
        capsys.readouterr().err
    )
    ids = pyarrow.parquet.read_table(world.out / CLUSTERS)["id"].to_pylist()
    assert ids == ["1.png", "2.png", "3.png", "4.png", "5.png", "\\xff\\xfe.png"]
    assert run_command(world.customize("--overwrite", images=folder)) == 0


def test_a_label_is_never_a_path(runs, tmp_path: Path, capsys) -> None:
    """Classes of a table may look like paths; nothing is written to them."""
    world = World(runs, tmp_path)
    content = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(content, "png")
    labels = ["../../a", "/tmp/b", "<u>c", "../../a", "/tmp/b", "<u>c"] * 2
    splits = ["train"] * 6 + ["test"] * 6
    task = world.file(
        "task.parquet", parquet(image=[content.getvalue()] * 12, label=labels, split=splits)
    )
    before = snapshot(tmp_path)
    assert run_command(world.finetune(data=task)) == 0, capsys.readouterr().err
    assert {k.split("/")[0] for k in snapshot(tmp_path).keys() - before.keys()} == {"out"}
    assert read_rows(world.out)[0]["classes"] == sorted(set(labels))
    assert run_command(world.report(world.out)) == 0
    assert "<u>c" not in (tmp_path / "report.html").read_text(encoding="utf-8")
