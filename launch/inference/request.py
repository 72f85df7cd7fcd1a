"""What is asked of a model, and how its answer is to be drawn. No torch: the command line makes these."""

from __future__ import annotations

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
    seed: int = Field(
        default=0, ge=0, lt=2**53, description="the same seed draws the same answer, whatever else is running"
    )


class Request(BaseModel):
    """One conversation that waits for its answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: int
    turns: tuple[Turn, ...]
    max_tokens: int = Field(default=256, ge=1)
    sampling: Sampling = Sampling()
