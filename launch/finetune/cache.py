"""Tokenised datasets: made once for the same rows, tokenizer and length, mapped into memory by every rank of the machine.

    HOME/tokens/KEY/ids.npy       int32, all samples one after another
                   /learned.npy   bool, which of them are learned
                   /ends.npy      int64, where each sample ends
                   /about.json    the counts, and the checksum of each file

KEY is the SHA-256 of all that the tokens depend on, so nothing in here is ever out of date. What is damaged is made anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

from cluster.files import sync_folder, write_atomically
from launch.chat import IGNORED, PLAIN_TEMPLATE, Sample
from launch.recipe import Dataset

# Changes whenever samples are made of rows in another way.
FORMAT = 1
# Bytes; the sets used last stay. A token takes five.
MOST = 20 << 30

_ABOUT = "about.json"
_ARRAYS = ("ids", "learned", "ends")
# All that says how text becomes ids: the class is chosen by config.json.
_TOKENIZER_FILES = (
    "config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*", "merges.txt",
    "*.model", "*.tiktoken", "additional_chat_templates/*",
)  # fmt: skip


@dataclass(frozen=True)
class Counts:
    """What became of the rows that are no whole sample: cut to the length, with nothing left to learn, or bad."""

    shortened: int = 0
    dropped: int = 0
    bad: int = 0
    first_bad: str = ""


class Samples(Sequence[Sample]):
    """Samples that are made as they are asked for."""

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """One sample, or those of a slice."""
        if isinstance(index, slice):
            return [self.sample(one) for one in range(*index.indices(len(self)))]
        return self.sample(range(len(self))[index])

    @abstractmethod
    def sample(self, index: int) -> Sample:
        """The sample at a place from 0 on."""


class Tokens(Samples):
    """The samples of one dataset, read from three arrays as they are asked for.

    Shapes: ids int32 [tokens], learned bool [tokens], ends int64 [samples].
    """

    def __init__(self, ids: np.ndarray, learned: np.ndarray, ends: np.ndarray, counts: Counts) -> None:
        self.ids, self.learned, self.ends, self.counts = ids, learned, ends, counts

    def __len__(self) -> int:
        return len(self.ends)

    def sample(self, index: int) -> Sample:
        """See Samples.sample."""
        start, end = int(self.ends[index - 1]) if index else 0, int(self.ends[index])
        ids = self.ids[start:end]
        labels = np.where(self.learned[start:end], ids, IGNORED)
        return Sample(tuple(ids.tolist()), tuple(labels.tolist()))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [int(length) for length in np.diff(self.ends, prepend=0)]


def gather(samples: Iterable[Sample], counts: Callable[[], Counts]) -> Tokens:
    """Samples as arrays; the counts are asked for when all of them have come."""
    ids: list[np.ndarray] = []
    learned: list[np.ndarray] = []
    lengths: list[int] = []
    for sample in samples:
        ids.append(np.asarray(sample.ids, dtype=np.int32))
        learned.append(np.asarray(sample.labels) != IGNORED)
        lengths.append(len(sample.ids))
    return Tokens(
        np.concatenate([np.zeros(0, np.int32), *ids]),
        np.concatenate([np.zeros(0, bool), *learned]),
        np.cumsum(lengths, dtype=np.int64),
        counts(),
    )


def key_of(dataset: Dataset, *, base_model: Path, sequence_len: int, skip_bad_rows: bool) -> str:
    """What the tokens of a dataset depend on, as one SHA-256."""
    digest = hashlib.sha256(json.dumps([FORMAT, dataset.type, sequence_len, skip_bad_rows]).encode())
    digest.update(PLAIN_TEMPLATE.encode())
    found = {file for pattern in _TOKENIZER_FILES for file in base_model.glob(pattern) if file.is_file()}
    for file in sorted(found):
        _add(digest, file, file.relative_to(base_model))
    path = Path(dataset.path)
    digest.update(b"\0data\0")
    for file in [path] if path.is_file() else sorted(one for one in path.iterdir() if one.is_file()):
        _add(digest, file, Path(file.suffix) if path.is_file() else file.relative_to(path))
    return digest.hexdigest()[:32]


def _add(digest: hashlib._Hash, file: Path, name: Path) -> None:
    with file.open("rb") as opened:
        digest.update(f"\0{name}\0{hashlib.file_digest(opened, 'sha256').hexdigest()}".encode())


def get(folder: Path, key: str, make: Callable[[], Tokens], *, most: int = MOST) -> tuple[Tokens, bool]:
    """The tokens under `key`, mapped into memory, and whether they were there; else made, by one process of all that ask.

    A disk that has no room, or a folder that nobody may write, costs no more than making them each time.

    Args:
        folder: holds all sets of tokens; made where it is missing.
        most: bytes that it may hold; sets that were used longest ago go.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(folder / f".{key}.lock"):
            found = read(folder / key)
            if found is not None:
                os.utime(folder / key / _ABOUT)
                return found, True
            made = make()
            _write(folder, key, made)
            _prune(folder, most, keep=key)
            return read(folder / key) or made, False
    except OSError:
        return make(), False


def read(place: Path) -> Tokens | None:
    """What lies in a folder, if it is whole."""
    try:
        about = json.loads((place / _ABOUT).read_bytes())
        for name in _ARRAYS:
            with (place / f"{name}.npy").open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != about["files"][name]:
                    return None
        ids, learned, ends = (np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS)
        return Tokens(ids, learned, ends, Counts(**about["counts"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, key: str, tokens: Tokens) -> None:
    beside = folder / f".{key}.new"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(mode=0o700)
    try:
        about: dict[str, Any] = {"counts": asdict(tokens.counts), "files": {}}
        for name in _ARRAYS:
            path = beside / f"{name}.npy"
            with path.open("wb") as file:
                np.save(file, getattr(tokens, name), allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            with path.open("rb") as file:
                about["files"][name] = hashlib.file_digest(file, "sha256").hexdigest()
        write_atomically(beside / _ABOUT, json.dumps(about).encode())
        shutil.rmtree(folder / key, ignore_errors=True)
        beside.rename(folder / key)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    sync_folder(folder)


def _prune(folder: Path, most: int, *, keep: str) -> None:
    """Remove what was used longest ago until the rest fits; who has it mapped keeps it until it ends."""
    sets = [path for path in folder.iterdir() if (path / _ABOUT).is_file() and not path.name.startswith(".")]
    sets.sort(key=lambda path: (path.name == keep, (path / _ABOUT).stat().st_mtime), reverse=True)
    held = 0
    for path in sets:
        held += sum(file.stat().st_size for file in path.iterdir())
        if held > most and path.name != keep:
            with contextlib.suppress(OSError):
                shutil.rmtree(path)
                (folder / f".{path.name}.lock").unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
