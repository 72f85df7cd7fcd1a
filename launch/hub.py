"""A model's card from the hub: its config.json and the headers of its safetensors by range requests; no weights are fetched."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import FailedError, SparkctlError, WrongInputError
from launch import model_card, model_config
from launch.model_card import ModelCard
from launch.tensors import Tensor

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_id(reference: str) -> bool:
    """Whether a recipe's reference can be a model on the hub: OWNER/NAME."""
    return _ID.fullmatch(reference) is not None


def read(repository: str) -> ModelCard:
    """The card of a model on the hub that HF_ENDPOINT names.

    Raises:
        WrongInputError: there is no such model, or its files are not those of one that can be run.
        FailedError: it is gated, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, get_session
    from huggingface_hub.errors import NotASafetensorsRepoError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    with told(repository, api.endpoint):
        # Asked once before: downloads try again for half a minute, and `base_model` may be no more than a misspelt folder.
        get_session().head(api.endpoint, timeout=5)
        path = Path(api.hf_hub_download(repository, "config.json"))
        config = model_config.parse(path.read_text(encoding="utf-8"), f"{repository}/config.json")
        try:
            found = api.get_safetensors_metadata(repository)
        except NotASafetensorsRepoError:
            return model_card.of_config(config, repository)
    tensors = [
        Tensor(name, tensor.dtype, tuple(tensor.shape), tensor.data_offsets[1] - tensor.data_offsets[0])
        for file in found.files_metadata.values()
        for name, tensor in file.tensors.items()
    ]
    return model_card.of_tensors(config, tensors, repository)


@contextmanager
def told(repository: str, endpoint: str) -> Iterator[None]:
    """Tell what goes wrong with the hub in the words that a user reads.

    Raises:
        WrongInputError: there is no such model, or its files are not those of one that can be run.
        FailedError: it is gated, or the hub cannot be reached.
    """
    import httpx2  # what huggingface_hub speaks HTTP with, and whose errors it lets through
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        SafetensorsParsingError,
    )

    try:
        yield
    except HfHubHTTPError as error:
        raise refused(repository, endpoint, error.response.status_code, type(error).__name__) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx2.HTTPError):
        raise FailedError(
            f"{repository}: no such model folder, and the hub cannot be reached ({endpoint})",
            f"where it can: `hf download {repository} --local-dir FOLDER`; then give `base_model` that folder",
        ) from None
    except SafetensorsParsingError as error:
        raise WrongInputError(
            f"{repository}: its safetensors cannot be read ({str(error).splitlines()[0]})", "choose another model"
        ) from None


def refused(repository: str, endpoint: str, status: int, kind: str) -> SparkctlError:
    """What an answer of the hub with an error's status means; `kind` is the name of huggingface_hub's exception."""
    if kind == "GatedRepoError":
        return FailedError(
            f"{repository}: the hub answers {status}: its licence has to be accepted first, by the account that asks",
            f"accept it at {endpoint}/{repository}, then `hf auth login` or set HF_TOKEN",
        )
    if kind in ("RepositoryNotFoundError", "RemoteEntryNotFoundError"):
        what = "has no config.json" if kind == "RemoteEntryNotFoundError" else "is not there, or private"
        return WrongInputError(
            f"{repository}: no such model folder, and on the hub it {what} ({status})",
            "check `base_model`; a private model needs `hf auth login` or HF_TOKEN",
        )
    return FailedError(f"{repository}: the hub answers {status}", "try again later")
