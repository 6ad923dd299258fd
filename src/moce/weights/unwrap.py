"""Find the weights of a ViT in what a file holds: in nested mappings, under any prefix of names.

Training writes `{"model": ..., "optimizer": ...}`, wrappers of modules prefix names (`module.`,
`_orig_mod.`, `backbone.vit.`), and some files hold several networks (teacher and student, the
moving average beside the trained weights). One is taken; of several, the user chooses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moce.errors import MoceError, counted
from moce.weights.formats import mae as facebook
from moce.weights.types import RawWeights, Tensors

DEEPEST = 6  # mappings within mappings
SHOWN = 8  # names in a message
# What wrappers of single layers put between the parts of a name.
WRAPPERS = re.compile(
    r"(?:(?<=^)|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# The patch embedding by timm's name, or by Transformers' with the prefix that its adapter removes.
EMBEDDING = re.compile(
    r"(?P<prefix>(?:[^.]+\.)*?)(?:patch_embed\.proj\.weight"
    r"|(?:(?:vit|deit|dinov2|dinov2_with_registers)\.)?"
    r"embeddings\.patch_embeddings\.projection\.weight)"
)
ENCODER, DECODER = "encoder.", "decoder."  # prefixes in a run of moce


@dataclass
class _Candidate:
    """Weights of one ViT. parts: keys of the mappings it is in, then its prefix; notes: what was left."""

    parts: tuple[str, ...]
    tensors: Tensors
    notes: list[str] = field(default_factory=list)


def find_weights(content: Any, path: Path, key: str | None = None) -> RawWeights:
    """The weights of a ViT in the content of a file; notes list what was left out.

    key: which of several, by any part of its name. Raises MoceError if there are none by name, or
    several and no key, or the key names none or several. Without a patch embedding, the largest
    mapping of tensors is returned, for a message that lists its names.
    """
    found = list(_candidates(content))
    if not found:
        tensors = max(_mappings(content), key=len, default={})
        if not tensors:
            raise MoceError(f"{path} holds no weights by name but a {type(content).__name__}")
        return RawWeights(str(path), tensors)
    chosen = found[0] if len(found) == 1 and key is None else _chosen(found, path, key)
    return RawWeights(str(path), chosen.tensors, notes=chosen.notes)


def _chosen(found: list[_Candidate], path: Path, key: str | None) -> _Candidate:
    shared = set.intersection(*(set(candidate.parts) for candidate in found))
    own = [[part for part in c.parts if part not in shared] or list(c.parts) for c in found]
    names = [".".join(parts) for parts in own]
    listed = ", ".join(names[:SHOWN])
    if key is None:
        raise MoceError(
            f"{path} holds several networks: {listed}; choose one by --weights-key NAME, here or to "
            "moce convert"
        )
    matches = [c for c, name in zip(found, names, strict=True) if key in (name, ".".join(c.parts))]
    matches = matches or [candidate for candidate in found if key in candidate.parts]
    if len(matches) == 1:
        return matches[0]
    if not any(names):
        raise MoceError(f"{path} holds one network without a name: leave out --weights-key")
    several = "several networks" if matches else "no network"
    raise MoceError(f"{path} holds {several} named '{key}' (--weights-key), but {listed}")


def _candidates(content: Any, parts: tuple[str, ...] = ()) -> Iterator[_Candidate]:
    """Every ViT in a mapping and in those within it."""
    content = content.state_dict() if isinstance(content, nn.Module) else content
    if not isinstance(content, Mapping) or len(parts) > DEEPEST:
        return
    tensors = _tensors_of(content)
    embeddings = filter(None, map(EMBEDDING.fullmatch, tensors))
    for prefix in dict.fromkeys(match["prefix"] for match in embeddings):
        yield _under(prefix, tensors, parts)
    for name, inner in content.items():
        for candidate in _candidates(inner, (*parts, str(name))):
            rest = sorted(str(other) for other in content if other != name)
            if rest:
                note = f"left out everything but the weights ({', '.join(rest[:SHOWN])})"
                candidate.notes.insert(0, note)
            yield candidate


def _under(prefix: str, tensors: Tensors, parts: tuple[str, ...]) -> _Candidate:
    """The tensors under a prefix, by their names without it."""
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    rest = [name for name in tensors if not name.startswith(prefix)]
    if prefix.endswith(ENCODER):  # a masked autoencoder by the names of moce's runs
        beside = prefix.removesuffix(ENCODER) + DECODER
        decoder = {k.removeprefix(beside): tensors[k] for k in rest if k.startswith(beside)}
        if "embed.weight" in decoder:
            own |= facebook.join({}, decoder)
            rest = [name for name in rest if not name.startswith(beside)]
    notes = []
    if rest:
        first = dict.fromkeys(name.partition(".")[0] for name in rest)
        shown = ", ".join(list(first)[:SHOWN])
        notes.append(
            f"left out what is not in '{prefix}' ({counted(len(rest), 'tensor')} of {shown})"
        )
    return _Candidate((*parts, *prefix.split(".")[:-1]), own, notes)


def _tensors_of(content: Mapping[Any, Any]) -> Tensors:
    named = content.items()
    return {WRAPPERS.sub("", str(k)): v.detach() for k, v in named if isinstance(v, Tensor)}


def _mappings(content: Any, depth: int = 0) -> Iterator[Tensors]:
    """The tensors of a mapping and of those within it."""
    if isinstance(content, Mapping) and depth <= DEEPEST:
        yield _tensors_of(content)
        for inner in content.values():
            yield from _mappings(inner, depth + 1)
