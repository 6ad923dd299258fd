"""Odd trees, drawn at random: every image is used or listed with a reason, and no test image trains."""

from __future__ import annotations

import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from moce.data.divide import learning_rows, voting_rows
from moce.data.load import load_images
from moce.errors import MoceError
from moce.evaluation.task import load_task

SIZE = (8, 8)
WORDS = {
    "train": ["train", "Train", "TRAINING", "train2017", "training_set", "trainval"],
    "val": ["val", "Valid", "VALIDATION", "val_set"],
    "test": ["test", "Test", "TESTING", "test1", "test-images"],
}
CLASSES = ["cat", "Ünï cödé", "10", "9", "a b", "-rf", "bullet_train", "class.v2", "#1", "%41"]
SUFFIXES = ["png", "PNG", "bmp", "tif", "ppm", "tga", "gif"]
HIDDEN = [".ipynb_checkpoints/{}", "@eaDir/{}", "__MACOSX/{}", "._{}", ".{}", ".thumbs/deep/{}"]
NO_IMAGES = ["notes.txt", "Makefile", "labels.xml"]


@dataclass
class Tree:
    """What was written. seen: role (split or None) and class of every good image, by its number."""

    root: Path
    seen: dict[int, tuple[str | None, str | None]] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    unread: int = 0
    count: int = 0


def write_image(tree: Tree, path: Path) -> int:
    """An image of a color of its own."""
    tree.count += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    color = (tree.count // 256, tree.count % 256, 77)
    Image.new("RGB", SIZE, color).save(path)
    return tree.count


def grow(root: Path, seed: int) -> Tree:
    rng = np.random.default_rng(seed)
    tree = Tree(root)
    classes = [str(name) for name in rng.permutation(CLASSES)[: rng.integers(2, 5)]]
    layout = str(rng.choice(["none", "above", "below", "inside", "flat"]))
    splits = [["train", "test"], ["train", "val"], ["train", "val", "test"]][rng.integers(3)]
    named = {split: str(rng.choice(WORDS[split])) for split in splits}
    places: list[tuple[Path, str | None, str | None]] = []
    for label in classes:
        if layout == "none":
            places.append((root / label, None, label))
        for split, word in named.items():
            places += {
                "above": [(root / word / label, split, label)],
                "below": [(root / label / word, split, label)],
                "inside": [(root / "images" / word / label, split, label)],
                "flat": [(root / word, split, None)],
            }.get(layout, [])
    places = list({folder: (folder, split, label) for folder, split, label in places}.values())
    for folder, split, label in places:
        for number in range(rng.integers(2, 6)):
            name = f"{label}.{number}.{rng.choice(SUFFIXES)}"
            tree.seen[write_image(tree, folder / name)] = (split, label)
        spoil(tree, folder, rng)
    return tree


def spoil(tree: Tree, folder: Path, rng: np.random.Generator) -> None:
    """Add what is no image, or none that may be used."""
    if rng.random() < 0.5:
        name = str(rng.choice(HIDDEN)).format("x.png")
        write_image(tree, folder / name)
        first = (folder / name).relative_to(tree.root).parts
        depth = next(n for n, part in enumerate(first) if part.startswith((".", "@", "__")))
        tree.hidden.add("/".join(first[: depth + 1]))
    if rng.random() < 0.3:
        path = folder / f"broken{len(tree.broken)}.png"
        path.write_bytes(b"no image")
        tree.broken.add(path.relative_to(tree.root).as_posix())
    if rng.random() < 0.3:
        (folder / f"photo{tree.unread}.CR2").write_bytes(b"raw")
        tree.unread += 1
    if rng.random() < 0.3:
        (folder / str(rng.choice(NO_IMAGES))).write_text("text")
    if rng.random() < 0.3:
        (folder / "empty").mkdir(exist_ok=True)
    if rng.random() < 0.2:
        (folder / "loop").symlink_to(tree.root, target_is_directory=True)
    if rng.random() < 0.2:
        gone = folder / f"gone{len(tree.broken)}.png"
        gone.symlink_to(folder / "nowhere.png")
        tree.broken.add(gone.relative_to(tree.root).as_posix())


def numbers(pixels: Tensor) -> list[int]:
    """The images, by their colors."""
    return [int(red) * 256 + int(green) for red, green, _ in pixels[:, :, 0, 0].tolist()]


def scored(tree: Tree) -> str | None:
    named = {split for split, _ in tree.seen.values()}
    return next((split for split in ("test", "val") if split in named), None)


@pytest.fixture(params=range(24))
def tree(tmp_path: Path, request) -> Tree:
    return grow(tmp_path / "odd tree", request.param)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_every_image_is_used_or_listed_and_no_test_image_trains(
    tree: Tree, kind: str, tmp_path: Path, capsys
) -> None:
    data = str(tree.root)
    if kind == "tar":
        data = str(tmp_path / "all.tar")
        with tarfile.open(data, "w") as archive:
            archive.add(tree.root, arcname=".")
    images = load_images(data, SIZE)
    assert sorted(numbers(images.take(slice(None)))) == sorted(tree.seen)
    skipped = {name.removeprefix("all/") for name, reason in images.skipped if reason}
    links = {n.relative_to(tree.root).as_posix() for n in tree.root.rglob("loop")}
    assert skipped - links == tree.broken
    message = capsys.readouterr().err
    told = re.search(r"left out: (\d+) hidden or system", message)
    assert int(told[1] if told else 0) == len(tree.hidden)
    assert (f"left out: {tree.unread} .cr2" in message) == (tree.unread > 0)
    for choose in (learning_rows, voting_rows):
        learned = numbers(load_images(data, SIZE, choose=choose).take(slice(None)))
        roles = {tree.seen[number][0] for number in learned}
        assert learned and scored(tree) not in roles - {None} and "test" not in roles


def test_the_images_of_a_task_train_or_are_scored_by_their_split(tree: Tree) -> None:
    if all(label is None for _, label in tree.seen.values()):
        with pytest.raises(MoceError, match="no labels"):
            load_task(str(tree.root), (3, *SIZE))
        return
    task = load_task(str(tree.root), (3, *SIZE))
    train, test = (numbers(part.take(slice(None))) for part in (task.train, task.test))
    assert sorted(train + test) == sorted(tree.seen)
    split = scored(tree)
    if split is not None:
        assert set(test) == {number for number, (role, _) in tree.seen.items() if role == split}
    for part, rows, labels in (
        (train, task.train, task.train_labels),
        (test, task.test, task.test_labels),
    ):
        assert [task.classes[label] for label in labels] == [tree.seen[n][1] for n in part]
        assert len(rows) == len(part)
    chosen = load_images(str(tree.root), SIZE, choose=voting_rows)
    assert sorted(numbers(chosen.take(slice(None)))) == sorted(train)
