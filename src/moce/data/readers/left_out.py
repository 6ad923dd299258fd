"""What a source holds beside its images: hidden and system entries, and files moce does not read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from moce.data.readers.sample import as_text, suffix_of
from moce.runtime.progress import log

# Made by macOS, Windows, Synology, QNAP and Jupyter beside people's files.
SYSTEM = frozenset(
    {
        "__macosx",
        "@eadir",
        "@recycle",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",
        ".ds_store",
        ".ipynb_checkpoints",
    }
)
# Images of formats that moce does not read, and files that hold images.
_OTHER_IMAGES = (
    ".heic .heif .hif .jxl .svg .psd .ico .eps .exr .hdr .raw .cr2 .cr3 .nef .arw .dng .orf .rw2 "
    ".raf .pcx .dds .avif .jp2 .jxr .dcm .nii .h5 .hdf5 .mat .zip .rar .7z .tar .gz .tgz .npy .npz "
    ".parquet .arrow .moce .mp4 .mov .avi"
)
OTHER_IMAGES = frozenset(_OTHER_IMAGES.split())


def hidden_part(path: str) -> str | None:
    """The path of the first hidden or system entry on a relative path; None if there is none."""
    parts = _parts(path)
    for depth, name in enumerate(parts):
        if is_hidden(name):
            return "/".join(parts[: depth + 1])
    return None


def _parts(path: str) -> list[str]:
    """The names on a path; pathlib would keep the name of every file that it has seen."""
    return [part for part in path.split("/") if part not in ("", ".")]


def is_hidden(name: str) -> bool:
    """True for the name of a hidden or system entry: .git, ._a.jpg, @eaDir, __MACOSX, Thumbs.db."""
    return (name.startswith(".") and name not in (".", "..")) or is_system(name)


def is_system(name: str) -> bool:
    """True for a name that only a system gives: __MACOSX, ._a.jpg, .ipynb_checkpoints."""
    return name.startswith("._") or name.casefold() in SYSTEM


def hidden_end(path: str) -> str:
    """What of a path in a list decides if it is hidden: of an absolute one, name and system folders."""
    parts = _parts(path)
    if not path.startswith("/") or not parts:
        return path
    system = [part for part in parts if is_system(part)]
    return "/".join([*system, parts[-1]])


_SAID: set[str] = set()  # a command may open a source several times


def _log_once(message: str) -> None:
    if message not in _SAID:
        _SAID.add(message)
        log(message)


class LeftOut:
    """Counts what is left out of one source, and says so.

    hints: by suffix, what would let moce read such files.
    """

    def __init__(self, where: str, hints: dict[str, str] | None = None) -> None:
        self._where, self._hints = where, hints or {}
        self._hidden: dict[str, None] = {}
        self._others: Counter[str] = Counter()
        self._unreadable: list[str] = []

    def is_hidden(self, path: str) -> bool:
        """True, and counted, if a path relative to the source has a hidden or system entry."""
        entry = hidden_part(path)
        if entry is not None:
            self._hidden[entry] = None
        return entry is not None

    def add_unreadable(self, folder: str) -> None:
        """Count a folder that cannot be opened."""
        self._unreadable.append(folder)

    def add_others(self, names: Iterable[str]) -> None:
        """Count the files among these that hold images moce does not read."""
        suffixes = (suffix_of(name).lower() for name in names)
        self._others.update(s for s in suffixes if s in OTHER_IMAGES)

    def add(self, kind: str) -> None:
        """Count a file of a kind, such as ".seg.png"."""
        self._others[kind] += 1

    def report(self) -> None:
        """Log a line for each kind of which there is any."""
        if self._hidden:
            noun = "entry" if len(self._hidden) == 1 else "entries"
            self._say(f"hidden or system {noun}", list(self._hidden))
        if self._unreadable:
            noun = "folder" if len(self._unreadable) == 1 else "folders"
            self._say(f"{noun} that cannot be opened", self._unreadable)
        if self._others:
            kinds = ", ".join(self._kind(*item) for item in sorted(self._others.items()))
            _log_once(f"{self._where}: left out: {kinds}")

    def _say(self, kind: str, names: list[str]) -> None:
        such = "" if len(names) == 1 else "such as "
        first = " ".join(as_text(names[0]).split())  # in one line
        _log_once(f"{self._where}: left out: {len(names)} {kind} ({such}{first})")

    def _kind(self, suffix: str, count: int) -> str:
        hint = self._hints.get(suffix)
        return f"{count} {suffix}" + (f" ({hint})" if hint else "")
