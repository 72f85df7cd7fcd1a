"""Checkpoints of any size whose files are holes: they cost no disk and read as zeros."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def make(folder: Path, config: transformers.PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model folder as published ones are: experts one by one, in two files."""
    folder.mkdir(parents=True)
    config.dtype = dtype
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if name.endswith("experts.gate_up_proj"):
            for index in range(shape[0]):
                for half in ("gate_proj", "up_proj"):
                    shapes[f"{name.removesuffix('gate_up_proj')}{index}.{half}.weight"] = (shape[1] // 2, shape[2])
        elif name.endswith("experts.down_proj"):
            for index in range(shape[0]):
                shapes[f"{name.removesuffix('down_proj')}{index}.down_proj.weight"] = shape[1:]
        else:
            shapes[name] = shape
    names = sorted(shapes)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    weight_map = {name: file for file, own in files.items() for name in own}
    for file, own in files.items():
        _write(folder / file, {name: shapes[name] for name in own}, dtype)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _write(path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    header, place = {}, 0
    for name, shape in shapes.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [place, place + size]}
        place += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + place)
