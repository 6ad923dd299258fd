"""Which images are for training, validation and testing: the one place where moce decides it.

Splits are recognized by words, in any case: folders and files (Train/, class/test/, images/val/,
cars_train/ beside cars_test/, test-000.tar), columns and keys. What is doubtful is refused: a folder
`train` beside other folders may be a class, and a third folder beside train/ and test/ anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from moce.errors import MoceError

WORDS = {
    "train": ("train", "training", "trn", "trainval", "train+val", "train-val", "train_val"),
    "val": ("val", "valid", "validate", "validation"),
    "test": ("test", "testing", "tst"),
    "unlabeled": ("unlabeled", "unlabelled", "unsupervised"),
}
SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}
# In layouts that fix their words: trainval.txt of Pascal VOC repeats train.txt and val.txt.
PLAIN_SPLITS = {w: SPLIT_OF[w] for w in ("train", "test", "val", "valid", "validation")}
_ALL_WORDS = "|".join(map(re.escape, sorted(SPLIT_OF, key=len, reverse=True)))
# "Train", "test2017", "training_set", "01_val", "train images"
_NAME = re.compile(
    rf"(?:\d+[-_. ]*)?({_ALL_WORDS})[-_ ]?(?:set|data|split|images?|imgs?)?[-_ ]?\d*$"
)
_NUMBERS = re.compile(r"(?:[-_.]?\d+(?:-of-\d+)?)+$")  # of a shard: train-00000-of-00005


def split_of(name: str) -> str | None:
    """ "train", "val", "test" or "unlabeled" for a name that stands for a split, in any case."""
    found = _NAME.fullmatch(name.strip().casefold())
    return SPLIT_OF[found[1]] if found else None


def splits_among(names: Iterable[str]) -> dict[str, str]:
    """The splits of names that stand side by side.

    Beside names that are a split's, those that differ in nothing else: cars_train and cars_test.
    """
    found: dict[str, str] = {}
    pairs: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        split = split_of(name)
        if split is not None:
            found[name] = split
            continue
        tokens = re.split(r"[^a-z]+", name.casefold())
        named = [token for token in tokens if token in SPLIT_OF]
        if len(named) == 1:
            rest = tuple(token for token in tokens if token and token not in named)
            pairs.setdefault(rest, {})[name] = SPLIT_OF[named[0]]
    for same in pairs.values():
        if len(set(same.values())) > 1:
            found |= same
    return found


# --- paths ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """What a path says of an image."""

    label: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class _Level:
    """The folders in one folder. splits: those that stand for a split."""

    names: frozenset[str]
    splits: dict[str, str]

    @property
    def doubtful(self) -> bool:
        return bool(self.splits) and len(self.splits) < len(self.names)

    @property
    def divided(self) -> bool:
        return len(set(self.splits.values())) > 1


def places(paths: Sequence[str], where: str, root: str = "") -> list[Place]:
    """Label and split of images by their paths below a folder named `root`.

    The label is the last folder that is no split's. Raises MoceError, which names `where`, if a
    folder could be a split or a class.
    """
    parts = {folder: PurePosixPath(folder).parts for folder in {_folder_of(p) for p in paths}}
    levels = _levels(set(parts.values()))
    inside_split = split_of(root) is not None
    found = {
        folder: _read_folders(folder, levels, where, inside_split) for folder in set(parts.values())
    }
    # Folders above a split are classes only if they differ: not the one folder images/ of
    # images/train/ and images/test/.
    above = {label for label, _, is_above in found.values() if is_above}
    if len(above) < 2:
        found = {f: (None if up else label, split, up) for f, (label, split, up) in found.items()}
    place_of = {folder: Place(*found[names][:2]) for folder, names in parts.items()}
    return [place_of[_folder_of(path)] for path in paths]


def _folder_of(path: str) -> str:
    return path.rpartition("/")[0]


def _levels(folders: set[tuple[str, ...]]) -> dict[tuple[str, ...], _Level]:
    below: dict[tuple[str, ...], set[str]] = {}
    for folder in folders:
        for depth, name in enumerate(folder):
            below.setdefault(folder[:depth], set()).add(name)
    return {
        folder: _Level(frozenset(names), splits_among(sorted(names)))
        for folder, names in below.items()
    }


def _read_folders(
    folder: tuple[str, ...],
    levels: dict[tuple[str, ...], _Level],
    where: str,
    inside_split: bool,
) -> tuple[str | None, str | None, bool]:
    """Label, split, and whether the label stands above the split."""
    split: str | None = None
    alone = False  # no other folder stands beside that of the split
    above: list[str] = []
    after: list[str] = []
    for depth, name in enumerate(folder):
        level = levels[folder[:depth]]
        word = level.splits.get(name)
        if word is None or (level.doubtful and (split or inside_split)):
            (after if split else above).append(name)
        elif level.doubtful:
            raise _doubt(where, folder[:depth], level)
        elif split is None or (split != word and alone and level.divided):
            above, after = [*above, *after], []
            split, alone = word, len(level.names) == 1
        elif split != word:
            raise MoceError(
                f"{where}: {'/'.join(folder[: depth + 1])} is in two splits, {split} and {word}; "
                "rename one of the folders"
            )
    if split is None or after:
        names = after if split else above
        return (names[-1] if names else None), split, False
    return (above[-1] if above else None), split, bool(above)


def _doubt(where: str, folder: tuple[str, ...], level: _Level) -> MoceError:
    inside = "/".join((where.rstrip("/"), *folder))
    named = " and ".join(f"{name}/" for name in sorted(level.splits))
    others = sorted(level.names - level.splits.keys())
    beside = ", ".join(f"{name}/" for name in others[:3]) + (" ..." if len(others) > 3 else "")
    return MoceError(
        f"{inside}: {named} beside {beside}: splits or classes? If splits, keep the other folders "
        "elsewhere; if classes, rename them, or put all classes into one folder train/"
    )


def inner_split(inner: str | None, outer: str | None, where: str) -> str | None:
    """The split of an image that is `inner` in a source that is `outer`.

    Raises MoceError, which names `where`, if they contradict each other.
    """
    if inner and outer and inner != outer and {inner, outer} != {"train", "val"}:
        raise MoceError(f"{where} is in two splits, {outer} and {inner}; rename one of them")
    return inner or outer


def source_splits(names: Sequence[str]) -> list[str | None]:
    """The splits of several sources or shards, by the ends of their names; None if all are alike.

    A name whose last word is that of the test images counts without a counterpart, too.
    Raises MoceError for a third name beside those of two splits in one folder.
    """
    for depth in (1, 2):  # d/train and d/test; d/train/images and d/test/images
        found = _end_splits([_parts(name, depth) for name in names])
        if any(found):
            break
    if len(set(found)) == 1:
        return [None] * len(names)
    divided = {split for split in found if split}
    parents = {PurePosixPath(n).parent for n, split in zip(names, found, strict=True) if split}
    for name, split in zip(names, found, strict=True):
        if split is None and len(divided) > 1 and PurePosixPath(name).parent in parents:
            raise MoceError(
                f"{name} beside {' and '.join(sorted(divided))}: which split is it? Leave it out, "
                "or keep it elsewhere"
            )
    return found


def last_word(name: str) -> str:
    """The last part of a source's name, without suffix and shard number."""
    return _parts(name, 1)


def _parts(name: str, depth: int) -> str:
    """One part of a source's name, counted from its end; the last without suffix and number."""
    parts = PurePosixPath(name.replace("\\", "/").replace(":", "/")).parts
    if len(parts) < depth:
        return ""
    if depth > 1:
        return parts[-depth]
    stem = PurePosixPath(parts[-1]).stem if "." in parts[-1] else parts[-1]
    return _NUMBERS.sub("", stem) or stem


def _end_splits(parts: Sequence[str]) -> list[str | None]:
    found = splits_among(parts)
    for part in parts:
        last = re.split(r"[^a-z]+", part.casefold())[-1]
        if part not in found and SPLIT_OF.get(last) in ("test", "val"):
            found[part] = SPLIT_OF[last]
    return [found.get(part) for part in parts]


# --- columns --------------------------------------------------------------------------------------


def column_splits(values: Iterable[object], where: str) -> list[str | None]:
    """The splits that a column names; None where it names none.

    Raises MoceError, which names `where`, for other words than those of splits.
    """
    known: dict[object, str | None] = {None: None, "": None}
    found: list[str | None] = []
    for value in values:
        if value not in known:
            text = str(value)
            known[value] = split_of(text)
            if known[value] is None and text.strip() not in ("", "nan"):
                raise MoceError(f"{where} has a split '{text[:50]}'; give train, val or test")
        found.append(known[value])
    return found


# --- who learns, who is scored --------------------------------------------------------------------


def scored_split(splits: Iterable[str | None]) -> str | None:
    """The split whose images are only scored: test, else val; None if there is neither."""
    named = set(splits)
    return next((split for split in ("test", "val") if split in named), None)
