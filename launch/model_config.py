"""config.json of a model, read key by key: what is asked for is checked, what is not asked for may be anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import WrongInputError

_NO_CAUSAL = "only causal language models can be run"
_BROKEN = "download the model again"


@dataclass(frozen=True)
class ModelConfig:
    """The part of a configuration that describes the language model: all of it, or its `text_config`.

    `where` is what messages call the file. Keys are looked up under several names, because families name the same thing
    differently and transformers renames it when it saves.
    """

    where: str
    model_type: str
    text: Mapping[str, Any]
    whole: Mapping[str, Any]

    def integer(self, *names: str, default: int | None = None) -> int:
        """A whole number above 0, the first of `names` that is there and not null.

        Raises:
            WrongInputError: it is something else, or not there and without a default.
        """
        value = self.optional(*names)
        if value is not None:
            return value
        if default is not None:
            return default
        raise WrongInputError(
            f"{self.where}: {names[0]}: expected a positive whole number, found {self.text.get(names[0])!r}", _NO_CAUSAL
        )

    def optional(self, *names: str) -> int | None:
        """A whole number above 0, or None where no key of these names has a value."""
        name = next((name for name in names if self.text.get(name) is not None), None)
        if name is None:
            return None
        value = self.text[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise WrongInputError(
                f"{self.where}: {name}: expected a positive whole number, found {value!r}", _NO_CAUSAL
            )
        return value

    def count(self, name: str, default: int = 0) -> int:
        """A whole number that may be 0."""
        return 0 if self.text.get(name) == 0 else self.integer(name, default=default) if self._has(name) else default

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.text.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise WrongInputError(f"{self.where}: {name}: expected true or false, found {value!r}", _BROKEN)
        return value

    def words(self, name: str, length: int) -> tuple[str, ...] | None:
        """A list of `length` strings, such as `layer_types`; None where it is not there."""
        value = self.text.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value) or len(value) < length:
            raise WrongInputError(f"{self.where}: {name}: expected a list of {length} names", _BROKEN)
        return tuple(value[:length])

    def numbers(self, name: str) -> tuple[int, ...] | None:
        """A list of whole numbers, such as `mlp_only_layers`; None where it is not there."""
        value = self.text.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(number, int) for number in value):
            raise WrongInputError(f"{self.where}: {name}: expected a list of whole numbers", _BROKEN)
        return tuple(value)

    @property
    def layers(self) -> int:
        """How many layers it has."""
        return self.integer("num_hidden_layers")

    @property
    def tied(self) -> bool | None:
        """Whether the head is the embedding; None where the file leaves that to the architecture."""
        said = self.whole.get("tie_word_embeddings", self.text.get("tie_word_embeddings"))
        return None if said is None else bool(said)

    @property
    def dtype(self) -> str:
        """The type of the weights, by its name in torch: bfloat16 where the file does not say."""
        return str(
            self.text.get("dtype") or self.text.get("torch_dtype") or self.whole.get("torch_dtype") or "bfloat16"
        )

    @property
    def quantization(self) -> Mapping[str, Any]:
        """How the checkpoint was quantised; empty where it was not."""
        value = self.whole.get("quantization_config") or self.text.get("quantization_config") or {}
        return value if isinstance(value, dict) else {}

    def _has(self, name: str) -> bool:
        return self.text.get(name) is not None


def parse(raw: str, where: str) -> ModelConfig:
    """Read the text of a config.json; `where` is what messages call the file.

    Raises:
        WrongInputError: it is no JSON object.
    """
    try:
        whole = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise WrongInputError(f"{where}: cannot be read ({error})", _BROKEN) from None
    if not isinstance(whole, dict):
        raise WrongInputError(f"{where}: holds no JSON object", _BROKEN)
    text = whole.get("text_config") or {}
    if not isinstance(text, dict):
        raise WrongInputError(f"{where}: text_config: expected an object, found {text!r}", _BROKEN)
    return ModelConfig(where, str(whole.get("model_type", "unknown")), text or whole, whole)
