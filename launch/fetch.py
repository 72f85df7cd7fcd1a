"""On a node: fetches its own files, and ranges of files, of a model from the hub. Started and told what by the command line.

Answers the orders that cluster.stream describes, on standard input; the token for the hub comes with them and goes nowhere else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from cluster.stream import answering
from cluster.transfer.copier import Copier
from cluster.transfer.digests import SHA256, new
from cluster.transfer.manifest import Chunk
from cluster.transfer.pulling import SourceError, Take
from cluster.transfer.staging import Staging
from launch import hub, hub_files

STREAMS = 8
_TRIES = 6  # for a chunk: after the last, more than a minute has passed
_LONGEST_WAIT = 30.0


class Ranges:
    """Chunks by range requests."""

    def __init__(self, repository: str, revision: str, endpoint: str, secret: str | None) -> None:
        self._repository, self._revision, self._endpoint, self._secret = repository, revision, endpoint, secret
        self._places: dict[str, str] = {}  # where the hub has sent us for a file: asked for once, not for each range

    def fetch(self, take: Take, staging: Staging, arrived: Callable[[Chunk, int], None]) -> None:
        """See cluster.transfer.pulling.Way."""
        while True:
            chunk = take(True)
            if chunk is None:
                return
            digest = self._persistently(chunk, staging, arrived)
            staging.note(chunk, SHA256, digest)
            arrived(chunk, 0)

    def _persistently(self, chunk: Chunk, staging: Staging, arrived: Callable[[Chunk, int], None]) -> bytes:
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError

        for attempt in range(_TRIES):
            came, had = 0, chunk.source in self._places
            try:
                total = new(SHA256)
                with self._asked(chunk) as pieces:
                    for piece in pieces:
                        part = memoryview(piece)[: chunk.size - came]
                        if part:
                            staging.write(chunk, part, came)
                            total.update(part)
                            came += len(part)
                            arrived(chunk, len(part))
                if came == chunk.size:
                    return total.digest()
            except HfHubHTTPError as error:
                status = error.response.status_code
                self._places.pop(chunk.source, None)
                if status < 500 and status != 429 and not had:  # an address that we were sent to expires
                    raise SourceError(0, self._told(status, type(error).__name__)) from None
            except (httpx2.HTTPError, ConnectionError):
                self._places.pop(chunk.source, None)
            if came:
                arrived(chunk, -came)
            time.sleep(min(_LONGEST_WAIT, 2.0**attempt / 2))
        raise ConnectionError(0, f"the hub ({self._endpoint}) cannot be reached, or breaks off")

    def _asked(self, chunk: Chunk) -> Any:
        own = hub_files.url(self._repository, chunk.source, self._revision, self._endpoint)
        place = self._places.get(chunk.source, own)
        secret = self._secret if place == own else None  # nobody else is shown the token
        return hub_files.streaming(
            place, chunk.offset, chunk.size, secret, lambda at: self._places.update({chunk.source: at})
        )

    def _told(self, status: int, kind: str) -> str:
        return hub.refused(self._repository, self._endpoint, status, kind).message


def main() -> int:
    """Answer orders until there are no more."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.getLogger("httpx2").setLevel(logging.ERROR)
    copier = Copier()

    def fetch(
        final: str, manifest: list[Any], repository: str, revision: str, endpoint: str, token: str | None
    ) -> dict[str, Any]:
        return copier.begin(
            final, manifest, lambda: [Ranges(repository, revision, endpoint, token) for _ in range(STREAMS)]
        )

    answering({"fetch": fetch, "progress": copier.progress})
    return 0
