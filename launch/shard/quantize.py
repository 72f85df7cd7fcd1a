"""An NF4 copy of a model folder, made layer by layer: no more than a matrix is ever held in 16 bits, or a layer in 4."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from cluster.errors import RefusedError, WrongInputError
from launch.shard import conversion, load, nf4
from launch.shard.checkpoint import Checkpoint
from launch.shard.conversion import Origin
from launch.shard.stage import load_config
from launch.shard.write import Writer
from launch.split import whole

CPU = torch.device("cpu")
# What a model folder has besides weights: tokenizer, templates, generation settings; never code.
_BESIDE = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".md")


@dataclass(frozen=True)
class Quantized:
    """What was made, in bytes."""

    folder: Path
    before: int
    after: int


def quantize(source: Path, out: Path, progress: Callable[[int, int], None] | None = None) -> Quantized:
    """Write an NF4 copy of the model in `source` to the new folder `out`, which appears when it is whole.

    Linear modules of the layers are stored as bitsandbytes stores them, experts fused, each parameter as nf4.ExpertStack
    names its tensors; all else as it is. `progress` is told how many parameters are done, of how many.

    Raises:
        WrongInputError: `out` is there, or the checkpoint is wrong.
        RefusedError: it is in NF4, or comes quantised in a way that NF4 cannot be made of.
    """
    if out.exists():
        raise WrongInputError(f"{out}: is there already", "name a folder that is not, or remove it")
    config = load_config(source)
    architecture = load.causal_class(config, source)
    method = load.method_of(config)
    if method not in (None, "mxfp4"):
        raise RefusedError(
            f"{source}: comes in {method.upper()}; NF4 is made of 16 bits, or of MXFP4", "take the 16-bit checkpoint"
        )
    checkpoint = Checkpoint(source)
    beside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        dtype = getattr(torch, str(config.dtype or torch.bfloat16).removeprefix("torch."))
        sketch = load.sketched(architecture, load.unquantized(config), whole(layers(config)), dtype)
        origins = conversion.origins(sketch, checkpoint)
        conversion.check(sketch, origins, source, "the model")
        beside.mkdir(parents=True)
        writer = Writer(beside)
        made = _Copy(sketch, origins, checkpoint, dtype)
        names = sorted(origins, key=conversion.natural)
        for done, name in enumerate(names):
            if progress is not None:
                progress(done, len(names))
            for key, tensor in made.tensors(name):
                writer.add(key, tensor)
        writer.close()
        copy_beside(source, beside)
        _write_config(source, beside, dtype)
        beside.rename(out)
        return Quantized(out, sum(entry.size for entry in checkpoint.entries.values()), writer.total)
    except OSError as error:
        raise WrongInputError(f"{out}: cannot be written ({error})", "check permissions and free space") from None
    finally:
        checkpoint.close()
        shutil.rmtree(beside, ignore_errors=True)


def layers(config: Any) -> int:
    """How many layers a configuration has."""
    return int(config.get_text_config(decoder=True).num_hidden_layers)


@dataclass
class _Copy:
    sketch: PreTrainedModel
    origins: dict[str, Origin]
    checkpoint: Checkpoint
    dtype: torch.dtype
    linears: set[str] = field(init=False)
    experts: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.linears, self.experts = load.quantizable(self.sketch)

    def tensors(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """What parameter `name` is stored as: names and tensors."""
        origin = self.origins[name]
        if name in self.experts:
            shape = tuple(self.sketch.get_parameter(name).shape)
            stack = nf4.ExpertStack(shape, self.dtype)
            stack.allocate(CPU)
            load.fill_stack(stack, origin, self.checkpoint, self.dtype, CPU)
            for key, tensor in stack.stored().items():
                yield f"{name}.{key}" if key else name, tensor
        elif name.removesuffix(".weight") in self.linears:
            module = self.sketch.get_submodule(name.removesuffix(".weight"))
            pieces = conversion.pieces(self.checkpoint, origin, None, self.dtype, CPU)
            shape = torch.Size((module.out_features, module.in_features))
            packed, state = nf4.quantize_pieces(pieces, shape, self.dtype, CPU)
            yield name, packed
            for key, tensor in state.as_dict(packed=True).items():
                yield f"{name}.{key}", tensor
        else:
            for entry in origin.entries:
                yield entry.name, self.checkpoint.load(entry)


def copy_beside(source: Path, folder: Path) -> None:
    """Copy what belongs to a model besides config.json and weights: tokenizer, templates, settings."""
    for path in sorted(source.iterdir()):
        weights = path.name.endswith((".safetensors", ".index.json"))
        if path.is_file() and path.suffix in _BESIDE and not weights and path.name != "config.json":
            shutil.copyfile(path, folder / path.name)


def _write_config(source: Path, folder: Path, dtype: torch.dtype) -> None:
    about = json.loads((source / "config.json").read_text(encoding="utf-8"))
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    about["quantization_config"] = settings.to_dict()
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
