"""What is asked of a model, and how its answer is to be drawn. No torch: the command line makes these."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from launch.rows import Turn


class Sampling(BaseModel):
    """How the next token is drawn; the defaults take the likeliest one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(default=0.0, ge=0, le=10, description="0 takes the likeliest token")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="draw from the likeliest tokens whose shares add up to this"
    )
    top_k: int = Field(default=0, ge=0, description="draw from this many likeliest tokens; 0: from all")
    min_p: float = Field(
        default=0.0, ge=0, le=1, description="leave out tokens with less than this times the likeliest one's share"
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0, le=10, description="over 1 makes tokens of the prompt and the answer less likely"
    )
    presence_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="subtracted from the logits of tokens that the answer has"
    )
    frequency_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="subtracted once for each time that the answer has a token"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**53, description="the same seed draws the same answer, whatever else is running"
    )
    stop: tuple[str, ...] = Field(default=(), description="texts that end the answer, and are not part of it")
    stop_token_ids: tuple[int, ...] = Field(default=(), description="token ids that end the answer, beside the model's")
    ignore_eos: bool = Field(default=False, description="go on over the model's own end tokens, as benchmarks do")
    logprobs: int | None = Field(
        default=None, ge=0, le=100, description="tell each token's log probability, and those of so many likeliest ones"
    )

    @property
    def has_penalty(self) -> bool:
        """Whether earlier tokens change what is drawn."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class Request(BaseModel):
    """One conversation that waits for its answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: int
    turns: tuple[Turn, ...]
    max_tokens: int = Field(default=256, ge=1)
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt for the engine, as token ids.

    `adapter` names one of the engine's adapters, None the model as it is. With `prompt_logprobs` the first event tells every prompt
    token's log probability and those of so many likeliest ones in its place. `keep_special` makes special tokens part of the text.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int = 256
    sampling: Sampling = Sampling()  # noqa: RUF009 - it is frozen
    adapter: str | None = None
    prompt_logprobs: int | None = None
    keep_special: bool = False
