"""Questions to a model: the inference recipe that a fine-tuned job implies, and the answers as they come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import RefusedError, WrongInputError
from launch.handle import JobHandle
from launch.inference.request import Request, Sampling
from launch.recipe import FinetuneRecipe, InferenceRecipe, is_on_node, parse_dump
from launch.rows import Turn


def recipe_for(job: JobHandle) -> InferenceRecipe:
    """The recipe that asks what a fine-tune made, over as many nodes as it was trained on.

    Raises:
        RefusedError: the job is no fine-tune, or has no result.
    """
    recipe = parse_dump(job.spec.recipe)
    if not isinstance(recipe, FinetuneRecipe):
        raise RefusedError(f"job {job.id} is no fine-tune", "ask a fine-tuned job, or an inference recipe")
    state = job.state().state
    if state != "succeeded":
        raise RefusedError(f"job {job.id} is {state}: it has no result to ask", f"sparkctl logs {job.id}")
    full = recipe.adapter == "full"
    where = "" if job.spec.embedded else f"{job.head.name}:"  # it lies on the head, and is found there
    return InferenceRecipe(
        kind="inference",
        name=f"ask-{recipe.name}",
        nodes=recipe.nodes,
        base_model=where + job.path("model") if full else recipe.base_model,
        adapter_path=None if full else where + job.path("adapter"),
        max_model_len=recipe.sequence_len,
        quantization="nf4" if recipe.adapter == "qlora" else None,  # what did not fit in 16 bits then does not now
    )


def adapter_of(job: JobHandle, base_model: str) -> str:
    """Where the adapter lies that a fine-tune has made, as a recipe would name it.

    Args:
        base_model: what it is to be served with.

    Raises:
        RefusedError: the job is no fine-tune, is not done, has trained the whole model, or another one.
    """
    found = recipe_for(job)
    if found.adapter_path is None:
        raise RefusedError(
            f"job {job.id} has made no adapter: it has trained the whole model",
            f"leave out adapter_from, and give `base_model: {found.base_model}`",
        )
    if _bare(found.base_model) != _bare(base_model):
        raise RefusedError(
            f"job {job.id} has trained an adapter of {found.base_model}, not of {base_model}",
            f"serve that one, or, where both are the same model, give `adapter_path: {found.adapter_path}`",
        )
    return found.adapter_path


def _bare(reference: str) -> str:
    return reference.partition(":")[2] if is_on_node(reference) else reference


def requests(texts: Sequence[str], *, max_tokens: int, sampling: Sampling) -> tuple[Request, ...]:
    """One request for each question.

    Raises:
        WrongInputError: a question is empty.
    """
    if any(not text.strip() for text in texts):
        raise WrongInputError("the question is empty", "sparkctl ask JOB 'your question'")
    return tuple(
        Request(id=i, turns=(Turn("user", text),), max_tokens=max_tokens, sampling=sampling)
        for i, text in enumerate(texts)
    )


@dataclass
class Answer:
    """What has come of one answer so far."""

    question: str
    text: str = ""
    tokens: int = 0
    finish_reason: str = ""


@dataclass
class Answers:
    """All answers of a job, filled from the lines of its answers.jsonl."""

    of: dict[int, Answer] = field(default_factory=dict)

    @classmethod
    def to(cls, asked: Iterable[Request]) -> Answers:
        """No answers yet."""
        return cls({request.id: Answer(request.turns[-1].content) for request in asked})

    def take(self, entry: dict[str, Any]) -> str:
        """Add one line; returns the text that it brought."""
        answer = self.of[entry["request"]]
        piece = str(entry.get("text", ""))
        answer.text += piece
        answer.finish_reason = str(entry.get("finish_reason", answer.finish_reason))
        answer.tokens = int(entry.get("tokens", answer.tokens))
        return piece
