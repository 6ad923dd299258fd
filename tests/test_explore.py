"""moce explore without a browser: features, map, look-ups, pictures, HTTP and refusals."""

from __future__ import annotations

import asyncio
import io
import shutil
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from aiohttp.test_utils import TestClient, TestServer
from builders import RUNTIME, copy_run, customize, picture, planted_features, unit_rows
from commands import QUIET, one_line, run_command, snapshot
from conftest import Runs
from PIL import Image
from safetensors.torch import load_file

import moce
from moce.commands import explore
from moce.config import ExploreSettings
from moce.data.readers.sample import Encoded, Sample
from moce.explorer import projection
from moce.explorer.embedding import Embedder
from moce.explorer.explorer import Explorer, file_name
from moce.explorer.pictures import thumbnail
from moce.explorer.projection import nearest, place, project
from moce.explorer.server import POLICY, Server, Status
from moce.inference.reconstructions import fixed_noise
from moce.models.encoder import patchify
from moce.models.mae import random_mask
from moce.runs.assignments import read_assignments
from moce.weights.from_runs import load_mae

PCA = {"projection": "pca", **RUNTIME}  # t-SNE has tests of its own


def work_on(run: Path, out: Path, **settings: Any) -> explore.Work:
    return explore.open_run(ExploreSettings(run=run, out=out, **PCA, **settings))


def explorer_of(work: explore.Work) -> Explorer:
    return work.explorer(None, threading.Event())


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("explore") / "map"


@pytest.fixture(scope="module")
def explorer(runs: Runs, out: Path) -> Explorer:
    return explorer_of(work_on(runs.moce, out))


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: path.name for path in sorted(folder.iterdir())}


def task_files(runs: Runs, folder: Path) -> Path:
    """Images of the task in one folder, as they lie after a drop."""
    folder.mkdir()
    for number, path in enumerate(sorted((runs.task / "train").rglob("*.png"))):
        shutil.copy(path, folder / file_name(number, path.name))
    return folder


# --- features -------------------------------------------------------------------------------------


def test_images_have_the_clusters_they_were_trained_with(explorer: Explorer, runs: Runs) -> None:
    known = read_assignments(runs.clusters).to_dict()
    assert dict(zip(explorer.ids, explorer.embedded.cluster.tolist(), strict=True)) == known
    assert torch.allclose(explorer.embedded.features.float().norm(dim=1), torch.ones(1), atol=1e-2)


def test_features_and_map_are_kept(
    runs: Runs, out: Path, explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(out)

    def computes(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(Embedder, "embed", computes)
    again = explorer_of(work_on(runs.moce, out))
    assert torch.equal(again.places, explorer.places) and again.ids == explorer.ids
    assert snapshot(out) == before
    for change in ({"overwrite": True}, {"max_images": 20}, {"images": str(runs.task)}):
        with pytest.raises(AssertionError, match="computed again"):
            explorer_of(work_on(runs.moce, out, **change))


def test_a_damaged_map_is_made_again(runs: Runs, out: Path, explorer: Explorer, tmp_path) -> None:
    copy = copy_run(out, tmp_path / "copy")
    for name in ("features.safetensors", "map.safetensors"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[: len(content) // 2])
    again = explorer_of(work_on(runs.moce, copy))
    assert torch.equal(again.places, explorer.places)
    assert snapshot(copy) == snapshot(out)


def test_unreadable_images_are_left_out_and_listed(runs: Runs, tmp_path: Path) -> None:
    data = Path(shutil.copytree(runs.task, tmp_path / "data"))
    broken = sorted(data.rglob("*.png"))[3]
    broken.write_bytes(b"nothing")
    found = moce.explore(runs.moce, data, out=tmp_path / "map", prepare=True, batch_size=5, **PCA)
    assert found.skipped == 1 and found.images == len(list(data.rglob("*.png"))) - 1
    assert "1 unreadable one left out" in found.summary()
    assert str(broken.relative_to(data)) in (tmp_path / "map" / "skipped.jsonl").read_text()


def test_max_images_draws_some_and_says_so(runs: Runs, tmp_path: Path, capsys) -> None:
    found = moce.explore(runs.clusters, out=tmp_path / "map", prepare=True, max_images=20, **PCA)
    assert found.images == 20
    assert "the map shows 20 of " in capsys.readouterr().err


# --- the map --------------------------------------------------------------------------------------


@pytest.mark.parametrize("landmarks", [1000, 60])
def test_neighbors_on_the_map_are_alike(landmarks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer landmarks than images, too."""
    monkeypatch.setattr(projection, "LANDMARKS", landmarks)
    features, mode = planted_features(modes=4, per_mode=30, width=16, spread=0.15)
    places = project(features)
    assert places.min() == 0 and places.max() == 1 and places.shape == (120, 2)
    near = torch.cdist(places, places).fill_diagonal_(torch.inf).topk(5, largest=False).indices
    assert (mode[near] == mode[:, None]).float().mean() > 0.95
    assert torch.equal(project(features), places)


def test_pca_shows_the_directions_of_largest_variance() -> None:
    features = unit_rows(50, 7) * torch.tensor([9.0, 5, 1, 1, 1, 1, 1])
    places = project(features, "pca")
    centered = features - features.mean(dim=0)
    first = centered @ torch.linalg.svd(centered).Vh[:2].T
    for axis in (0, 1):
        correlation = torch.corrcoef(torch.stack([places[:, axis], first[:, axis]]))[0, 1]
        assert correlation.abs() > 0.9999


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_images_have_a_map(count: int) -> None:
    places = project(unit_rows(count, 6))
    assert places.shape == (count, 2) and places.isfinite().all()


def test_nearest_finds_what_a_full_comparison_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "BLOCK", 7)
    asked, known = unit_rows(9, 6, seed=1), unit_rows(50, 6, seed=2)
    similarity, rows = nearest(asked, known, 4)
    best = (asked @ known.T).topk(4)
    assert torch.equal(rows, best.indices) and torch.allclose(similarity, best.values)
    assert nearest(asked, known[:3], 4)[1].shape == (9, 3)


def test_a_known_image_is_placed_where_it_is() -> None:
    known, places = unit_rows(50, 16), torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(place(known, known, places), places, atol=1e-3)


def test_colorings_follow_clusters_routes_experts_and_folders(
    explorer: Explorer, runs: Runs
) -> None:
    bank = moce.load(runs.moce)
    found = {coloring.title: coloring for coloring in explorer.colorings()}
    blocks = [f"expert, block {block}" for block in bank.model.blocks]
    assert list(found) == ["cluster", "route", *blocks, "label", "folder"]
    routes = bank.model.routes()
    for point, cluster in enumerate(explorer.embedded.cluster.tolist()):
        values = {title: c.names[int(c.of[point])] for title, c in found.items()}
        route = routes[cluster].tolist()
        assert values["cluster"] == f"cluster {cluster}"
        assert values["route"] == "route " + "-".join(map(str, route))
        assert [values[block] for block in blocks] == [f"expert {e}" for e in route]
        assert values["folder"] == explorer.ids[point].split("/")[0]


def test_a_cluster_shows_its_images_and_experts(explorer: Explorer, runs: Runs) -> None:
    model = moce.load(runs.moce).model.requires_grad_(False)
    number = int(explorer.embedded.cluster.mode().values)
    shown = explorer.cluster(number)
    points = torch.tensor(shown["points"])
    assert sorted(shown["points"]) == (explorer.embedded.cluster == number).nonzero()[:, 0].tolist()
    assert (explorer.embedded.similarity[points].diff() <= 0).all()
    assert shown["trained_on"] == shown["images"] == int(model.cluster_sizes[number])
    for expert, table in zip(shown["experts"], model.tables(), strict=True):
        assert expert["expert"] == int(table[number].argmax())
        assert expert["gate"] == float(table[number].max())
    with pytest.raises(moce.MoceError, match="no cluster 999"):
        explorer.cluster(999)


def test_labels_color_the_map(runs: Runs, tmp_path: Path) -> None:
    explorer = explorer_of(work_on(runs.clusters, tmp_path / "map", images=str(runs.task)))
    titles = [coloring.title for coloring in explorer.colorings()]
    assert titles[:2] == ["cluster", "label"]  # a clustering has no routes
    assert {name.split("/")[1] for name in explorer.ids} == set(explorer.colorings()[1].names)
    assert explorer.cluster(int(explorer.embedded.cluster[0]))["route"] is None


# --- images of the user ---------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["auto", "route", "merge", "generalist"])
def test_the_choice_is_that_of_select(
    explorer: Explorer, runs: Runs, tmp_path: Path, strategy: str
) -> None:
    folder = task_files(runs, tmp_path / "task")
    dropped = explorer.drop(folder, files_of(folder))
    bank = moce.load(runs.moce)
    assert explorer.choose(dropped, strategy) == bank.select(folder, strategy)


def test_an_image_of_the_map_finds_itself(explorer: Explorer, runs: Runs) -> None:
    folder = runs.data / explorer.ids[5].split("/")[0]
    dropped = explorer.drop(folder, files_of(folder))
    for image in explorer.look_up(dropped)["images"]:
        first = image["nearest"][0]
        assert first["similarity"] > 0.999
        assert explorer.ids[first["point"]] == f"{folder.name}/{image['name']}"
        assert image["cluster"] == int(explorer.embedded.cluster[first["point"]])
        own = explorer.places[first["point"]]
        assert torch.allclose(torch.tensor(image["place"]), own, atol=0.02)


def test_unreadable_drops_are_counted_and_named(explorer: Explorer, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"nothing")
    dropped = explorer.drop(tmp_path, {"a.png": "mine.png", "b.png": "yours.png"})
    assert [name for name, _ in explorer.look_up(dropped)["skipped"]] == ["yours.png"]
    assert [image["name"] for image in explorer.look_up(dropped)["images"]] == ["mine.png"]
    with pytest.raises(moce.MoceError, match=r"none of 1 files can be read.*as yours.png"):
        explorer.drop(tmp_path, {"b.png": "yours.png"})


def test_models_fill_in_a_masked_image(explorer: Explorer, runs: Runs) -> None:
    path = runs.data / explorer.ids[0]
    dropped = explorer.drop(path.parent, {path.name: path.name})
    choice = explorer.choose(dropped, "route")
    assert choice is not None
    shown = explorer.reconstructor.fill_in(dropped.samples[0], choice)
    routes = moce.load(runs.moce).routes
    assert [p.label for p in shown][:3] == ["image", "masked", "MAE"]
    assert len(shown) == 3 + len(routes) and len({p.label for p in shown}) == len(shown)
    _, mae = load_mae(runs.mae)
    noise = fixed_noise(torch.zeros(1, dtype=torch.int64), mae)
    kept, removed = (rows[0] for rows in random_mask(noise, mae.mask_ratio))
    patches = [patchify(p.pixels[None], mae.patch_size)[0].int() for p in shown]
    for found in patches[2:]:  # what the models see stays as it is
        assert (found[kept] - patches[0][kept]).abs().max() <= 1
        assert (found[removed] - patches[0][removed]).abs().max() > 1
    assert len(patches[1][removed].unique()) == 1  # gray
    errors = [p.error for p in shown[2:]]
    assert all(error is not None and error > 0 for error in errors)
    assert len(set(errors)) == len(errors)  # every model fills in its own way


def test_a_run_whose_mae_is_gone_says_so(runs: Runs, tmp_path: Path) -> None:
    run = copy_run(runs.moce, tmp_path / "moce")
    config = (run / "config.yaml").read_text().replace(str(runs.mae), str(tmp_path / "gone"))
    (run / "config.yaml").write_text(config)
    reconstructor = explore.Reconstructor.of_run(run, moce.load(run))
    assert reconstructor.mae is None and "without the MAE" in reconstructor.note
    shutil.copytree(runs.mae, tmp_path / "elsewhere" / "gone")
    moved = Path(shutil.move(run, tmp_path / "elsewhere" / "moce"))
    assert explore.Reconstructor.of_run(moved, None).mae is not None  # moved along with the run


@pytest.mark.parametrize("size", [(300, 200), (20, 30)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_thumbnail_shows_the_whole_image(tmp_path: Path, size, channels: int) -> None:
    picture(size=size).save(tmp_path / "a.jpg", quality=95)
    made = Image.open(io.BytesIO(thumbnail(Sample("a", Encoded(tmp_path / "a.jpg")), 96, channels)))
    assert max(made.size) == min(96, max(size))
    assert made.size[0] / made.size[1] == pytest.approx(size[0] / size[1], rel=0.05)


# --- HTTP -----------------------------------------------------------------------------------------


def with_client(server: Server, ask: Callable[[TestClient], Awaitable[None]]) -> None:
    async def talk() -> None:
        async with TestClient(TestServer(server.app())) as client:
            await ask(client)

    asyncio.run(talk())


def form_of(files: dict[str, bytes]) -> aiohttp.FormData:
    form = aiohttp.FormData()
    for name, content in files.items():
        form.add_field("files", content, filename=name)
    return form


FROM_PAGE = {"X-Moce": "1"}


def test_a_drop_by_http_is_exported_as_customize_does(
    runs: Runs, out: Path, tmp_path: Path
) -> None:
    copy = copy_run(out, tmp_path / "map")
    work = work_on(runs.moce, copy)
    explorer = explorer_of(work)
    folder = task_files(runs, tmp_path / "task")
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}

    async def ask(client: TestClient) -> None:
        sent = await client.post(
            "/api/drop", data=form_of({**contents, "x.png": b"nothing"}), headers=FROM_PAGE
        )
        key = (await sent.json())["key"]
        answer = await (await client.get(f"/api/drop/{key}?strategy=merge")).json()
        assert len(answer["images"]) == len(contents) and len(answer["skipped"]) == 1
        assert answer["choice"]["name"] == "merge"
        for path in (f"/api/drop/{key}/thumbnail/0", "/api/thumbnail/3?size=64"):
            got = await client.get(path)
            assert Image.open(io.BytesIO(await got.read())).format == "WEBP"
        wanted = {"drop": key, "strategy": "merge", "name": "birds"}
        done = await client.post("/api/export", json=wanted, headers=FROM_PAGE)
        assert Path((await done.json())["folder"]) == copy / "backbones" / "birds"
        again = await client.post("/api/export", json=wanted, headers=FROM_PAGE)
        assert again.status == 400 and "is not empty" in (await again.json())["error"]
        for name in ("../../x", "", "a b"):
            refused = {**wanted, "name": name}
            got = await client.post("/api/export", json=refused, headers=FROM_PAGE)
            assert got.status == 400 and "letters" in (await got.json())["error"]
        route = {"route": answer["choice"]["route"], "name": "route"}
        assert (await client.post("/api/export", json=route, headers=FROM_PAGE)).status == 200

    with_client(Server(Status({}, explorer=explorer), work.export), ask)
    customize(runs.moce, folder, tmp_path / "own", strategy="merge")
    name = "model.safetensors"
    own, written = (load_file(f / name) for f in (tmp_path / "own", copy / "backbones" / "birds"))
    assert own.keys() == written.keys()
    assert all(torch.equal(own[key], written[key]) for key in own)
    assert (copy / "backbones" / "route" / "export.json").is_file()
    assert work.exported == [copy / "backbones" / "birds", copy / "backbones" / "route"]


def test_strangers_are_refused(explorer: Explorer) -> None:
    async def ask(client: TestClient) -> None:
        page = await client.get("/")
        assert page.status == 200 and page.headers["Content-Security-Policy"] == POLICY
        text = await page.text()
        assert "http://" not in text and "https://" not in text
        for name in ("explore.js", "plot.js", "explore.css"):
            assert (await client.get(f"/page/{name}")).status == 200
        assert (await client.get("/page/..%2Fserver.py")).status == 404
        assert (await client.get("/", headers={"Host": "evil.example"})).status == 403
        assert (await client.post("/api/export", json={})).status == 403
        assert (await client.get("/api/thumbnail/1000000")).status == 404
        assert (await client.get("/api/drop/x")).status == 400
        nothing = await client.post("/api/drop", data=form_of({}), headers=FROM_PAGE)
        assert nothing.status == 400

    with_client(Server(Status({}, explorer=explorer), lambda wanted: {}), ask)


def test_the_page_waits_for_the_map() -> None:
    async def ask(client: TestClient) -> None:
        status = await (await client.get("/api/status")).json()
        assert not status["ready"] and (status["done"], status["total"]) == (3, 9)
        got = await client.get("/api/map")
        assert got.status == 400 and "not ready" in (await got.json())["error"]

    with_client(Server(Status({}, "features", 3, 9), lambda wanted: {}), ask)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (lambda runs, tmp: [runs.mae], "which moce cluster, train --mae"),
        (lambda runs, tmp: [runs.task], "is not a moce run"),
        (lambda runs, tmp: [tmp / "nothing"], "is not a moce run"),
        (lambda runs, tmp: [runs.moce, tmp / "gone"], "no such images"),
        (lambda runs, tmp: [runs.moce, "--out", runs.moce], "files that are not of moce explore"),
        (lambda runs, tmp: [runs.moce, "--out", runs.moce / "model.json"], "is a file"),
        (
            lambda runs, tmp: [runs.moce, "--host", "no.such.host.invalid"],
            "cannot listen on no.such",
        ),
        (lambda runs, tmp: [runs.moce, "--port", "70000"], "port"),
        (lambda runs, tmp: [runs.moce, "--strategy", "route"], "unknown argument --strategy"),
    ],
)
def test_mistakes_are_refused_in_one_line(words, said: str, runs: Runs, tmp_path: Path, capsys):
    before = snapshot(runs.moce.parent)
    assert run_command(["explore", *words(runs, tmp_path), *QUIET]) == 2
    assert said in one_line(capsys.readouterr().err)
    assert snapshot(runs.moce.parent) == before and not list(tmp_path.iterdir())


def test_a_taken_port_is_refused(runs: Runs, capsys) -> None:
    before = snapshot(runs.moce)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run_command(["explore", runs.moce, "--port", port, *QUIET]) == 2
    line = one_line(capsys.readouterr().err)
    assert f"port {port}" in line and "address already in use" in line and "--port" in line
    assert snapshot(runs.moce) == before


def test_a_missing_library_is_named(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explore, "find_spec", lambda name: None)
    with pytest.raises(moce.MoceError, match=r"pip install 'moce\[explore\]'"):
        moce.explore(runs.moce)


def test_images_that_are_gone_name_the_run(runs: Runs, tmp_path: Path) -> None:
    run = copy_run(runs.moce, tmp_path / "moce")
    config = (run / "config.yaml").read_text().replace(str(runs.data), str(tmp_path / "gone"))
    (run / "config.yaml").write_text(config)
    with pytest.raises(moce.MoceError, match=r"was made from them.*RUN IMAGES"):
        moce.explore(run, prepare=True)


def test_what_it_writes_to_a_run_goes_with_it(runs: Runs, tmp_path: Path) -> None:
    """--overwrite replaces a run that was explored."""
    run = copy_run(runs.clusters, tmp_path / "clusters")
    moce.explore(run, prepare=True, max_images=8, **PCA)
    assert files_of(run / "explore").keys() == {"features.safetensors", "map.safetensors"}
    moce.cluster(
        runs.data,
        mae=runs.mae,
        out=run,
        num_clusters=4,
        overwrite=True,
        max_iterations=2,
        **RUNTIME,
    )
    assert not (run / "explore").exists()
