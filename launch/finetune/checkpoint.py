"""Checkpoints over all ranks: each writes its part beside and renames it; a checkpoint counts when every rank's marker has landed.

    checkpoints/checkpoint-120/rank0/state.safetensors   weights, optimizer and random state, as they lay in the rank's memory
                              /rank0/part.json            the step, what it belongs to, the size of each file
                              /rank0/complete             the marker, made when the parts of all ranks were there

Each node keeps the parts of its own ranks. A part is known by its sizes: one that was cut short is passed over.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist

from cluster.errors import PassingError, WrongInputError
from cluster.files import sync_folder, write_atomically

_STATE = "state.safetensors"
_PART = "part.json"
_MARKER = "complete"
_NAME = re.compile(r"checkpoint-([0-9]+)")
_RANDOM = "random/"
# How many checkpoints ranks compare: more are never kept for long.
_COMPARED = 64


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from, and the newer ones that were passed over, each with why."""

    path: Path
    step: int
    skipped: tuple[str, ...] = ()


class Checkpoints:
    """The checkpoints of one job, as one of its ranks sees them.

    Args:
        folder: where they lie; the ranks of one machine share it.
        keep: how many complete ones are kept.
        settings: what must be equal to go on: the recipe's model, adapter, data and strategy.
    """

    def __init__(self, folder: Path, *, keep: int, settings: Mapping[str, Any], alone: bool = False) -> None:
        self.folder = folder
        self._keep = keep
        self._settings = json.loads(json.dumps(dict(settings)))
        joined = dist.is_initialized() and not alone
        self._rank = dist.get_rank() if joined else 0
        self._world = dist.get_world_size() if joined else 1

    # ---- saving

    def save(self, step: int, state: Mapping[str, torch.Tensor]) -> Path:
        """Write a checkpoint after optimizer step `step` (1-based); returns its folder. Every rank calls this.

        Raises:
            PassingError: a rank could not write its part; nothing of it is left, and older checkpoints stand.
        """
        checkpoint = self.folder / f"checkpoint-{step}"
        trouble = ""
        try:
            self._write_part(checkpoint, step, state)
        except (OSError, safetensors.SafetensorError) as error:
            trouble = f"{checkpoint}: cannot be written ({_reason(error)})"
        if not self._all(not trouble):
            shutil.rmtree(self._part(checkpoint), ignore_errors=True)
            with contextlib.suppress(OSError):
                checkpoint.rmdir()
            raise PassingError(
                trouble or f"step {step}: the other rank could not write its part of the checkpoint",
                f"make room on the disk; the checkpoints before it in {self.folder} are whole",
                echo=not trouble,
            )
        write_atomically(self._part(checkpoint) / _MARKER, b"")
        self._all(True)  # only when every marker has landed may older ones go
        self._prune()
        return checkpoint

    def _write_part(self, checkpoint: Path, step: int, state: Mapping[str, torch.Tensor]) -> None:
        part = self._part(checkpoint)
        beside = part.with_name(f".{part.name}.new")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in (dict(state) | _random()).items()}
            # Two names of one storage cannot be written; what is trained is never shared within a rank's state.
            safetensors.torch.save_file(tensors, beside / _STATE)
            _sync(beside / _STATE)
            about = {
                "step": step,
                "rank": self._rank,
                "world": self._world,
                "settings": self._settings,
                "files": {_STATE: (beside / _STATE).stat().st_size},
            }
            write_atomically(beside / _PART, json.dumps(about, indent=1).encode())
            shutil.rmtree(part, ignore_errors=True)
            beside.rename(part)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        sync_folder(checkpoint)
        sync_folder(self.folder)

    def _prune(self) -> None:
        """Keep the newest complete ones; what is older goes, and what was begun before them and never completed."""
        complete = [step for step, path in self._present() if (self._part(path) / _MARKER).is_file()]
        oldest = sorted(complete)[-self._keep :][0]
        for step, path in self._present():
            if step < oldest:
                # The marker first: a checkpoint that is half removed must not pass for a whole one.
                (self._part(path) / _MARKER).unlink(missing_ok=True)
                shutil.rmtree(self._part(path), ignore_errors=True)
                with contextlib.suppress(OSError):  # another rank's part is still there
                    path.rmdir()

    # ---- finding and loading

    def newest(self) -> Found | None:
        """The newest checkpoint that is complete on every rank and belongs to this recipe."""
        skipped: list[str] = []
        usable: list[int] = []
        for step, path in sorted(self._present(), reverse=True):
            if fault := self._fault(path):
                skipped.append(f"{path}: {fault}")
            else:
                usable.append(step)
        common = self._common(usable)
        if not common:
            return None
        step = max(common)
        skipped += [
            f"{self.folder / f'checkpoint-{other}'}: not whole on the other rank" for other in usable if other > step
        ]
        newer = [reason for reason in skipped if int(_NAME.findall(reason)[-1]) > step]
        return Found(self.folder / f"checkpoint-{step}", step, tuple(newer))

    def at(self, path: Path) -> Found:
        """The checkpoint in a folder that the recipe names.

        Raises:
            WrongInputError: it is none, is not whole, or belongs to another recipe.
        """
        named = _NAME.fullmatch(path.name)
        fault = self._fault(path) if named else "is no checkpoint's folder"
        if not self._all(not fault):
            raise WrongInputError(
                f"resume_from_checkpoint: {path}: {fault or 'not whole on the other rank'}",
                "name a folder such as checkpoints/checkpoint-120, or `auto` for the newest complete one",
            )
        assert named is not None
        return Found(path, int(named[1]))

    def load(self, found: Found) -> dict[str, torch.Tensor]:
        """This rank's state as it was saved; the random state is set too."""
        tensors = safetensors.torch.load_file(self._part(found.path) / _STATE)
        _set_random({name: tensor for name, tensor in tensors.items() if name.startswith(_RANDOM)})
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(_RANDOM)}

    def last(self) -> Path | None:
        """The newest complete checkpoint on this node, for words: no other rank is asked."""
        steps = [step for step, path in self._present() if not self._fault(path)]
        return self.folder / f"checkpoint-{max(steps)}" if steps else None

    def _fault(self, path: Path) -> str:
        """Why a checkpoint cannot be used by this rank; empty where it can."""
        part = self._part(path)
        try:
            about = json.loads((part / _PART).read_bytes())
            whole = all((part / name).stat().st_size == size for name, size in about["files"].items())
            about = {"world": about["world"], **about["settings"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"rank {self._rank}'s part never landed"
        if not whole:
            return f"rank {self._rank}'s part is cut short"
        if not (part / _MARKER).is_file():
            return "its writing was cut off before both ranks had done their part"
        wanted = {"world": self._world, **self._settings}
        for key in wanted | about:
            if wanted.get(key) != about.get(key):
                return f"was made with {key} {about.get(key)}, not {wanted.get(key)}"
        return ""

    def _present(self) -> Iterator[tuple[int, Path]]:
        for path in list(self.folder.glob("checkpoint-*")):
            if named := _NAME.fullmatch(path.name):
                yield int(named[1]), path

    def _part(self, checkpoint: Path) -> Path:
        return checkpoint / f"rank{self._rank}"

    # ---- what ranks agree on

    def _all(self, mine: bool) -> bool:
        if self._world == 1:
            return mine
        agreed = torch.tensor([int(mine)])
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        return bool(agreed.item())

    def _common(self, steps: list[int]) -> set[int]:
        if self._world == 1:
            return set(steps)
        own = torch.full((_COMPARED,), -1, dtype=torch.int64)
        newest = sorted(steps)[-_COMPARED:]
        own[: len(newest)] = torch.tensor(newest, dtype=torch.int64)
        theirs = [torch.empty_like(own) for _ in range(self._world)]
        dist.all_gather(theirs, own)
        return set.intersection(*(set(one.tolist()) for one in theirs)) - {-1}


def _random() -> dict[str, torch.Tensor]:
    states = {f"{_RANDOM}cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"{_RANDOM}cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random(states: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(states[f"{_RANDOM}cpu"])
    if f"{_RANDOM}cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[f"{_RANDOM}cuda"])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
