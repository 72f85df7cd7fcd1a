"""Where a served model answers: written into the job's folder by rank 0 when it does, read by whoever wants to ask."""

from __future__ import annotations

import hmac
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.errors import FailedError
from cluster.files import write_atomically

FILE = "endpoint.json"


@dataclass(frozen=True)
class Endpoint:
    """An address of the head node, and the models that it answers for; the first is the one to ask where nobody chooses."""

    host: str
    port: int
    models: tuple[str, ...]

    @property
    def base_url(self) -> str:
        """What OpenAI's clients call so."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v1"

    def write(self, folder: Path) -> None:
        """Tell whoever looks into the job's folder."""
        write_atomically(folder / FILE, json.dumps(asdict(self)).encode() + b"\n")

    @classmethod
    def parse(cls, data: bytes, where: str) -> Endpoint:
        """What `write` wrote.

        Raises:
            FailedError: it is damaged.
        """
        try:
            told = json.loads(data)
            return cls(str(told["host"]), int(told["port"]), tuple(str(name) for name in told["models"]))
        except (ValueError, KeyError, TypeError):
            raise FailedError(f"{where}: is damaged", "stop the job and run it again") from None

    @classmethod
    def read(cls, folder: Path) -> Endpoint | None:
        """The endpoint of the job in `folder`; None as long as it has none."""
        try:
            return cls.parse((folder / FILE).read_bytes(), str(folder / FILE))
        except FileNotFoundError:
            return None


def key_of(job_key: str) -> str:
    """The key that clients send, made of the job's own: who talks to a model cannot give orders to its agents."""
    return hmac.new(job_key.encode(), b"endpoint", "sha256").hexdigest()[:40]
