"""What a model's repository on the hub holds, as if it were a folder: names, sizes, checksums, and headers by range requests."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from cluster.errors import WrongInputError
from launch import contents as looking
from launch import hub
from launch.contents import Contents, File
from launch.origin import Origin

_FIRST = 100_000  # bytes: most headers are shorter (huggingface_hub asks for as many)
_AT_ONCE = 8
_SECONDS = 30.0
_TRIES = 3
_TEXT_LIMIT = 64 << 20


def endpoint() -> str:
    """The hub that is asked."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def token() -> str | None:
    """The user's token for it, from the environment or `hf auth login`."""
    from huggingface_hub import get_token

    return get_token()


def url(repository: str, name: str, revision: str, at: str) -> str:
    """Where a file of a repository is had."""
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repository, name, revision=revision, endpoint=at)


def origin(repository: str) -> Origin:
    """A repository on the hub, at the commit that its main branch is at now.

    Raises:
        WrongInputError: there is no such model, or its safetensors are damaged.
        FailedError: it is gated, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with hub.told(repository, endpoint()):
        info = HfApi(endpoint=endpoint()).model_info(repository, files_metadata=True, timeout=_SECONDS)
        revision = str(info.sha)
        files, checksums = {}, dict[str, str]()
        for entry in info.siblings or []:
            if "/" in entry.rfilename or entry.size is None:
                continue
            sha256 = entry.lfs.sha256 if entry.lfs is not None else ""
            if sha256:
                checksums[entry.rfilename] = sha256
            files[entry.rfilename] = File(int(entry.size), 0, sha256 or entry.blob_id or revision)

        def read(name: str, begin: int, size: int) -> bytes:
            return fetch(url(repository, name, revision, endpoint()), begin, size, token())

        config = _whole(files, looking.CONFIG, read)
        index = _whole(files, looking.INDEX, read)
        try:
            shards = looking.shards_of(files, index, repository)
        except ValueError as error:
            raise WrongInputError(str(error), "choose another model") from None
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            headers = dict(
                zip(shards, pool.map(lambda name: _header(name, files[name].size, read), shards), strict=True)
            )
    return Origin(repository, None, Contents(repository, files, config, headers), {}, revision, checksums)


def fetch(address: str, begin: int, size: int, secret: str | None) -> bytes:
    """Some bytes of a file on the hub.

    Raises:
        HfHubHTTPError, httpx2.HTTPError: it is refused, or the hub cannot be reached.
        OSError: it gives something else than was asked for.
    """
    import httpx2

    for attempt in range(_TRIES):
        try:
            with streaming(address, begin, size, secret) as pieces:
                data = b"".join(pieces)
        except httpx2.RemoteProtocolError:  # it has broken off
            if attempt == _TRIES - 1:
                raise
            continue
        if len(data) == size:
            return data
    raise httpx2.RemoteProtocolError(f"{address}: not all of it comes")


@contextmanager
def streaming(
    address: str, begin: int, size: int, secret: str | None, moved: Callable[[str], object] = lambda at: None
) -> Iterator[Iterator[bytes]]:
    """Some bytes of a file on the hub, as they come; `moved` is told the address that the hub has sent us to.

    Raises:
        HfHubHTTPError, httpx2.HTTPError: it is refused, or the hub cannot be reached.
        OSError: it knows no ranges.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import hf_raise_for_status

    headers: dict[str, Any] = build_hf_headers(token=secret or False)
    # As they are: a compressed answer would have no ranges.
    headers |= {"Range": f"bytes={begin}-{begin + size - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", address, headers=headers, timeout=_SECONDS) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        if response.status_code != 206 and (begin or int(response.headers.get("Content-Length", -1)) != size):
            raise OSError(0, "the hub gives no ranges of files")
        if response.history:
            moved(str(response.url))
        yield response.iter_bytes()


def _whole(files: dict[str, File], name: str, read: Callable[[str, int, int], bytes]) -> str | None:
    if name not in files or files[name].size > _TEXT_LIMIT:
        return None
    return read(name, 0, files[name].size).decode("utf-8", errors="replace") if files[name].size else ""


def _header(name: str, size: int, read: Callable[[str, int, int], bytes]) -> bytes:
    first = read(name, 0, min(size, _FIRST))
    length = int.from_bytes(first[:8], "little")
    if not 2 <= length <= min(size - 8, looking.HEADER_LIMIT):
        raise WrongInputError(f"{name}: is no safetensors file, or cut short ({size} bytes)", "choose another model")
    if len(first) < 8 + length:
        first += read(name, len(first), 8 + length - len(first))
    return first[8 : 8 + length]
