"""The job's state as an agent keeps it: in memory, and in its file as soon as the disk takes it."""

from __future__ import annotations

from launch.job import JobFolder, JobState


class Ledger:
    """Writes what has changed. A full disk delays that, and fails nobody: the agent must still end its ranks."""

    def __init__(self, folder: JobFolder) -> None:
        self._folder = folder
        self.state = folder.written()
        self._dirty = False

    def write(self, state: JobState) -> None:
        """Keep a new state."""
        if state.model_copy(update={"updated": ""}) != self.state.model_copy(update={"updated": ""}):
            self.state = state
            self._dirty = True
            self.flush()

    def change(self, **changes: object) -> None:
        """Keep a state that differs so."""
        self.write(self.state.model_copy(update=changes))

    def flush(self) -> None:
        """Write what could not be written so far."""
        if not self._dirty:
            return
        try:
            self._folder.write_state(self.state)
        except OSError:
            return
        self._dirty = False
