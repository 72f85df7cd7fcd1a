"""Which files, and which bytes of them, a node needs of a model: its own layers as safetensors of their own, and all else. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any

from cluster.errors import WrongInputError
from cluster.transfer.manifest import Manifest, Piece, Target, whole
from launch import model_card
from launch.contents import INDEX, Contents
from launch.model_card import EMBEDDING, HEAD
from launch.split import Cut

# Configuration, tokenizer and chat template, as hubs spell them. Neither code of a model's own nor pickled weights.
_COMPANIONS = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_COMPANION_LIMIT = 128 << 20  # bytes: the largest tokenizer has 33 MB
_ALIGNED = 8  # safetensors: data begin at a multiple of 8 bytes


@dataclass(frozen=True)
class Placement:
    """What is to lie in one folder of a node: `name` tells its content apart from any other, so it is made once."""

    name: str
    manifest: Manifest


def of_model(contents: Contents, cut: Cut, checksums: Mapping[str, str] = MappingProxyType({})) -> Placement:
    """What a node needs of a model to load one stage.

    Tensors of other stages are left out: each shard is rewritten without them, by ranges of the source's bytes in their order.

    Args:
        checksums: SHA-256 of files, where the source tells: what travels whole is verified by them.

    Raises:
        WrongInputError: it is not the folder of a model that is a stack of layers, or a file of it is damaged.
    """
    companions = _companions(contents)
    shards = [whole(name, contents.files[name].size) for name in contents.headers] if cut.whole else _cut(contents, cut)
    if INDEX in contents.files and cut.whole:
        companions.append(whole(INDEX, contents.files[INDEX].size))
    targets = [
        replace(target, sha256=checksums.get(target.path, "")) if not target.head else target
        for target in (*companions, *shards)
    ]
    return _named(str(cut), contents, targets)


def of_files(contents: Contents) -> Placement:
    """A small thing that travels whole: a dataset's file or folder, an adapter."""
    if contents.is_file:
        targets = [whole(PurePosixPath(contents.path).name, contents.files["."].size)]
    else:
        targets = [whole(file, seen.size) for file, seen in contents.files.items() if not file.startswith(".")]
    return _named("", contents, targets)


def same(one: Contents, other: Contents) -> bool:
    """Whether two folders hold the same model, as far as names, sizes, headers, samples and configuration tell."""
    return _identity(one, times=False) == _identity(other, times=False)


def folder_name(name: str, what: str, identity: str) -> str:
    """The name of a folder on a node: a person can read what it is, and nothing else has it."""
    readable = re.sub(r"[^A-Za-z0-9._]+", "-", f"{name} {what}").strip("-.")[:80]
    return f"{readable}-{identity[:16]}"


def _named(what: str, contents: Contents, targets: Sequence[Target]) -> Placement:
    manifest = Manifest(tuple(targets))
    identity = hashlib.blake2b(f"{_identity(contents, times=True)} {manifest.digest()}".encode(), digest_size=8)
    return Placement(folder_name(PurePosixPath(contents.path).name, what, identity.hexdigest()), manifest)


def _identity(contents: Contents, *, times: bool) -> str:
    total = hashlib.blake2b(digest_size=16)
    counted = contents.headers or contents.files  # READMEs may differ
    for name in sorted(counted):
        seen = contents.files[name]
        header = contents.headers.get(name, b"")
        changed = seen.changed if times else ""
        total.update(f"{name}\0{seen.size}\0{changed}\0{seen.sample}\0{len(header)}\0".encode() + header)
    total.update((contents.config or "").encode())
    return total.hexdigest()


def _companions(contents: Contents) -> list[Target]:
    return [
        whole(name, seen.size)
        for name, seen in contents.files.items()
        if PurePosixPath(name).suffix in _COMPANIONS and name != INDEX and seen.size <= _COMPANION_LIMIT
        if not name.endswith(".index.json") and not name.startswith(".")
    ]


def _cut(contents: Contents, cut: Cut) -> list[Target]:
    source = contents.path
    config = model_card.config_of(contents, source)
    found = model_card.tensors_of(contents, source)
    tied = model_card.is_tied(config, found)
    needed = {
        tensor.name
        for tensor, where, _ in model_card.placed(found, config.layers, source, tied=tied)
        if _holds(cut, where, tied=tied)
    }
    made, held = [], dict[str, str]()
    for name, header in contents.headers.items():
        entries = {tensor: entry for tensor, entry in json.loads(header).items() if tensor in needed}
        if entries:
            made.append(_shard(name, entries, json.loads(header).get("__metadata__"), 8 + len(header)))
            held |= dict.fromkeys(entries, name)
    if absent := next(iter(needed - held.keys()), None):
        raise WrongInputError(f"{source}: tensor {absent} is in none of its files", "download the model again")
    if INDEX in contents.files:
        made.append(_index(held, sum(target.size for target in made)))
    return made


def _holds(cut: Cut, where: int, *, tied: bool) -> bool:
    """Whether a stage loads what belongs to a layer, the embedding or the head."""
    if where == EMBEDDING:
        return cut.first or (cut.last and tied)
    return cut.last if where == HEAD else cut.start <= where < cut.end


def _shard(name: str, entries: Mapping[str, Any], metadata: Any, data: int) -> Target:
    """A shard with some of another's tensors, in the same order; `data` is where the other's data begin."""
    ordered = sorted(entries.items(), key=lambda entry: (entry[1]["data_offsets"][0], entry[1]["data_offsets"][1]))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for tensor, entry in ordered:
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        header[tensor] = {**entry, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    head = len(text).to_bytes(8, "little") + text
    ranges = [(data + entry["data_offsets"][0], data + entry["data_offsets"][1]) for _, entry in ordered]
    return Target(name, len(head) + end, head, tuple(_pieces(name, ranges, len(head))))


def _pieces(source: str, ranges: Sequence[tuple[int, int]], at: int) -> Iterator[Piece]:
    """Ranges of a file one after the other; those that join are one."""
    begin = end = 0
    for start, stop in ranges:
        if start != end and end > begin:
            yield Piece(at, source, begin, end - begin)
            at, begin = at + end - begin, start
        elif start != end:
            begin = start
        end = stop
    if end > begin:
        yield Piece(at, source, begin, end - begin)


def _index(held: Mapping[str, str], size: int) -> Target:
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(held.items()))}, indent=1).encode()
    return Target(INDEX, len(text), text, ())
