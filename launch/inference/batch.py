"""The questions of a job's spec, answered into the job's folder: what `sparkctl ask` runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import AutoTokenizer, GenerationConfig

from cluster.errors import WrongInputError
from launch.agent.report import Report, Reporter
from launch.chat import encode_prompt
from launch.inference.engine import Engine, Running
from launch.inference.request import Request
from launch.job import JobFolder, JobSpec
from launch.recipe import InferenceRecipe, parse_dump
from launch.shard.stage import Stage


def run(folder: JobFolder, spec: JobSpec, rank: int, device: torch.device, reporter: Reporter) -> None:
    """Load this rank's stage, answer all requests of the spec, and end."""
    recipe = parse_dump(spec.recipe_at(rank))
    assert isinstance(recipe, InferenceRecipe)
    tokenizer = AutoTokenizer.from_pretrained(recipe.base_model, trust_remote_code=False)
    prompts = [_prompt(request, recipe, tokenizer) for request in spec.requests]  # before anything is loaded
    stage = load_stage(recipe, spec, rank, device)
    engine = Engine(stage, pad_token=tokenizer.pad_token_id or 0)
    reporter.tell(Report("running"))
    if rank > 0:
        engine.follow()
        return
    with folder.answers.open("w", encoding="utf-8") as file:
        stop = stop_tokens(recipe, tokenizer)
        running = [
            _start(request, prompt, recipe, tokenizer, stop, file)
            for request, prompt in zip(spec.requests, prompts, strict=True)
        ]
        engine.generate(running, max_rows=recipe.max_num_seqs)
        for request, sequence in zip(spec.requests, running, strict=True):
            _write(
                file, {"request": request.id, "finish_reason": sequence.finish_reason, "tokens": len(sequence.tokens)}
            )
    engine.close()


def load_stage(recipe: InferenceRecipe, spec: JobSpec, rank: int, device: torch.device) -> Stage:
    """This rank's layers, with those parts of the adapter that belong to them."""
    stage = Stage.load(Path(recipe.base_model), spec.cut(rank), dtype=working_type(device), device=device)
    if recipe.adapter_path:
        add_adapter(stage, Path(recipe.adapter_path))
    return stage


def add_adapter(stage: Stage, folder: Path) -> Any:
    """Put a PEFT adapter on a stage, in place; returns the adapted model. Tensors of other stages' layers are left alone.

    Raises:
        WrongInputError: the folder is no adapter, or lacks tensors for layers of this stage.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    try:
        config = LoraConfig.from_pretrained(str(folder))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise WrongInputError(
            f"{folder}: is no PEFT adapter folder ({first})", "give `adapter_path` the adapter/ folder of a job"
        ) from None
    config.inference_mode = True
    adapted = get_peft_model(stage.model, config)
    loaded = set_peft_model_state_dict(adapted, tensors)
    if lacking := [key for key in loaded.missing_keys if "lora_" in key]:
        raise WrongInputError(
            f"{folder}: lacks {lacking[0]} and {len(lacking) - 1} more tensors", "it was made for another model"
        )
    return adapted


def stop_tokens(recipe: InferenceRecipe, tokenizer: Any) -> frozenset[int]:
    """The token ids that end an answer: the generation config's, which may be several, and the tokenizer's."""
    try:
        configured = GenerationConfig.from_pretrained(recipe.base_model).eos_token_id
    except OSError:
        configured = None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [*ids, tokenizer.eos_token_id] if token is not None)


def _prompt(request: Request, recipe: InferenceRecipe, tokenizer: Any) -> list[int]:
    prompt = encode_prompt(tokenizer, request.turns)
    if len(prompt) >= recipe.max_model_len:
        raise WrongInputError(
            f"question {request.id + 1}: {len(prompt)} tokens leave no room within max_model_len {recipe.max_model_len}",
            "shorten it, or raise `max_model_len`",
        )
    if not prompt:
        raise WrongInputError(f"question {request.id + 1}: the model's chat template makes nothing of it", "ask more")
    return prompt


def _start(
    request: Request, prompt: list[int], recipe: InferenceRecipe, tokenizer: Any, stop: frozenset[int], file: TextIO
) -> Running:
    room = recipe.max_model_len - len(prompt)
    sequence = Running(prompt, min(request.max_tokens, room), request.sampling, stop)
    text = _Text(tokenizer, stop)

    def write(token: int) -> None:
        if piece := text.add(token, last=sequence.finished):
            _write(file, {"request": request.id, "text": piece})

    sequence.on_token = write
    return sequence


class _Text:
    """Turns token ids into text piece by piece; a piece ends where a character does, whatever bytes the tokens split.

    Only a window is decoded: the tokens of the last piece, for a token's text can depend on the one before, and the new ones.
    """

    def __init__(self, tokenizer: Any, stop: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens: list[int] = []
        self._window = self._told = 0  # where the window starts, and up to where tokens have been told
        self._begun = False

    def add(self, token: int, *, last: bool) -> str:
        """The text that `token` completes, which may be none."""
        if token not in self._stop:
            self._tokens.append(token)
        before = self._decode(self._tokens[self._window : self._told])
        text = self._decode(self._tokens[self._window :])
        if text.endswith("\ufffd") and not last:
            return ""
        piece = text[len(before) :]
        if piece:
            self._window, self._told = self._told, len(self._tokens)
            if not self._begun:
                self._begun, piece = True, piece.removeprefix(" ")  # the plain template's space
        return piece

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def _write(file: TextIO, entry: dict[str, Any]) -> None:
    file.write(json.dumps(entry) + "\n")
    file.flush()


def working_type(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
