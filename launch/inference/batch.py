"""The questions of a job's spec, answered into the job's folder: what `sparkctl ask` runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import AutoTokenizer, GenerationConfig

from cluster.errors import WrongInputError
from launch.agent.report import Report, Reporter
from launch.chat import encode_prompt
from launch.inference.engine import Follower, Leader
from launch.inference.intake import Event, Finished, Intake, Limits, Tokens
from launch.inference.request import GenerationRequest, Request
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
    reporter.tell(Report("running"))
    if rank > 0:
        Follower(stage, slots=recipe.max_num_seqs, longest=recipe.max_model_len, beat=reporter.beat).run()
        return
    intake = Intake(Limits(recipe.max_model_len, max_waiting=max(1, len(prompts))))
    leader = Leader(
        stage,
        intake,
        tokenizer,
        slots=recipe.max_num_seqs,
        chunk=recipe.max_num_batched_tokens,
        stop=stop_tokens(recipe, tokenizer),
        beat=reporter.beat,
    )
    with folder.answers.open("w", encoding="utf-8") as file:
        writer = _Writer(file, intake, len(prompts))
        for request, prompt in zip(spec.requests, prompts, strict=True):
            room = recipe.max_model_len - len(prompt)
            asked = GenerationRequest(
                str(request.id), tuple(prompt), min(request.max_tokens, room), sampling=request.sampling
            )
            intake.submit(asked, writer.note)
        leader.run()  # until the last answer has ended
    if leader.failure is not None:
        raise leader.failure


class _Writer:
    """Writes what comes of the questions, a line for each piece and for each end; closes the intake after the last."""

    def __init__(self, file: TextIO, intake: Intake, questions: int) -> None:
        self._file, self._intake, self._left = file, intake, questions
        self._tokens: Counter[str] = Counter()
        self._begun: set[str] = set()
        if not questions:
            intake.close()

    def note(self, event: Event) -> None:
        """Called by the engine."""
        if isinstance(event, Tokens):
            self._tokens[event.id] += event.count
            if event.text:
                # An answer in the plain template begins with a space.
                text = event.text if event.id in self._begun else event.text.removeprefix(" ")
                self._begun.add(event.id)
                if text:
                    _write(self._file, {"request": int(event.id), "text": text})
        elif isinstance(event, Finished):
            self._end(event.id, event.reason)

    def _end(self, request: str, reason: str) -> None:
        _write(self._file, {"request": int(request), "finish_reason": reason, "tokens": self._tokens[request]})
        self._left -= 1
        if not self._left:
            self._intake.close()


def load_stage(recipe: InferenceRecipe, spec: JobSpec, rank: int, device: torch.device) -> Stage:
    """This rank's layers, with those parts of the adapter that belong to them."""
    stage = Stage.load(
        Path(recipe.base_model),
        spec.cut(rank),
        dtype=working_type(device),
        device=device,
        quantization=recipe.quantization,
    )
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


def _write(file: TextIO, entry: dict[str, Any]) -> None:
    file.write(json.dumps(entry) + "\n")
    file.flush()


def working_type(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
