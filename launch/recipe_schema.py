"""The keys of a recipe: three frozen models, one for each `kind`, with defaults, bounds and a sentence for each key.

`kind: finetune` speaks axolotl's names, `kind: inference` vLLM's; Hugging Face's spellings of the same keys are taken.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    Field,
    WithJsonSchema,
    model_validator,
)

from cluster import yamlfile
from cluster.inventory import Argument, Environment, Name, OneLine, PortNumber
from cluster.yamlfile import WrongKeyError, says, shown
from launch.rows import RowType

_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_ONE_DAY = 86400.0


def _duration(value: Any) -> float:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(ms|s|m|h|)", str(value)) if not isinstance(value, bool) else None
    if found is None or (seconds := float(found[1]) * _SECONDS[found[2]]) > _ONE_DAY:
        raise ValueError(f"must be a duration up to 24h such as 10s or 2m, not {shown(value)}")
    return seconds


def _validation_share(value: int | float) -> int | float:
    if value < 0 or (isinstance(value, float) and value >= 1):
        raise ValueError("neither a fraction nor a count")
    return value


def _some(entries: tuple[Any, ...]) -> tuple[Any, ...]:
    # Not Field(min_length=1): pydantic counts wrong entries as absent, and would blame the list for them.
    if not entries:
        raise ValueError("must have at least one entry")
    return entries


def _all_linear(value: Any) -> Any:
    if value == "all-linear":  # peft's word for what lora_target_linear says
        return None
    return tuple(value) if isinstance(value, list) else value  # what follows is no longer JSON, and strict


def _bind_address(value: str) -> str:
    text = "127.0.0.1" if value == "localhost" else value
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"must be an address such as 127.0.0.1, not {shown(value)}") from None
    if address.is_unspecified or address.is_multicast:
        raise ValueError(
            f"must be one address, not {text}, which opens the model to every network; use `sparkctl tunnel`"
        )
    return text


def _argv(value: Any, side: str = "") -> tuple[str, ...]:
    """One program call: a list, or a string split as a shell would split it."""
    prefix = f"{side}: " if side else ""
    if isinstance(value, str):
        try:
            value = shlex.split(value)
        except ValueError as error:
            raise ValueError(f"{prefix}cannot be split as a shell would ({str(error).lower()})") from None
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{prefix}must be a program and its arguments, not {'empty' if not value else shown(value)}")
    for number, entry in enumerate(value, start=1):
        if isinstance(entry, dict) and list(entry.values()) == [None]:
            raise ValueError(f"{prefix}entry {number} must be in quotes: '{{{next(iter(entry))}}}'")
        if isinstance(entry, bool) or not isinstance(entry, str | int | float):
            what = f"{prefix}entry {number} must be text or a number, not {shown(entry)}; put it in quotes"
            raise ValueError(what)  # noqa: TRY004 - of all errors, pydantic takes only this one for the file's
        if "\0" in str(entry):
            raise ValueError(f"{prefix}entry {number} holds a NUL character")
    if not str(value[0]).strip():
        raise ValueError(f"{prefix}has no program")
    return tuple(str(entry) for entry in value)


def _sides(value: Any) -> Any:
    if isinstance(value, Sides):
        return value
    if not isinstance(value, dict):
        argv = _argv(value)
        return {"head": argv, "peer": argv}
    unfilled = {"head": None, "peer": None, **value}
    if unfilled["head"] is None and unfilled["peer"] is None and len(unfilled) == 2:
        raise ValueError("must give head, peer or both something to run")
    return {
        side: _argv(argv, side) if side in ("head", "peer") and argv is not None else argv
        for side, argv in unfilled.items()
    }


def _unique(ports: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(ports)) < len(ports):
        raise ValueError("must not name a port twice")
    return ports


def _ready(value: str) -> str:
    if not re.match(r"https?://", value):
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"must be an http URL or a regular expression, not {shown(value)} ({error})") from None
    return value


Duration = Annotated[float, BeforeValidator(_duration), WithJsonSchema({"type": ["string", "number"]})]
_Count = Annotated[int, Field(ge=1)]
_Seed = Annotated[int, Field(ge=0, lt=2**32)]
_ARGV_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": ["string", "number"]}, "minItems": 1}]
}
_SIDES_SCHEMA = {
    "anyOf": [
        *_ARGV_SCHEMA["anyOf"],
        {
            "type": "object",
            "properties": {"head": _ARGV_SCHEMA, "peer": _ARGV_SCHEMA},
            "additionalProperties": False,
            "minProperties": 1,
        },
    ]
}


class Restart(BaseModel):
    """What to do when a job fails for a reason that may pass."""

    model_config = yamlfile.STRICT

    max: int = Field(default=3, ge=0, le=1000, description="How many times a failed job is started again.")
    backoff: Duration = Field(default=10.0, description="How long to wait before that, such as 10s or 2m, or seconds.")


class Dataset(BaseModel):
    """One source of rows."""

    model_config = yamlfile.STRICT

    path: Argument = Field(description="A file, a folder or a Hugging Face dataset id.")
    type: RowType = Field(description="The form of its rows: chat_template, alpaca, completion or qa.")
    split: Argument | None = Field(default=None, description="The split of a Hugging Face dataset, by default train.")
    weight: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="How often its rows are learned: 2 for twice an epoch, 0.5 for half of them.",
    )


class Sides(BaseModel):
    """The argv of each side; a missing one runs nothing."""

    model_config = yamlfile.STRICT

    head: tuple[str, ...] | None = Field(default=None, description="What the head (rank 0) runs.")
    peer: tuple[str, ...] | None = Field(default=None, description="What the peer (rank 1) runs.")


class _AnyRecipe(BaseModel):
    model_config = yamlfile.STRICT

    name: Name = Field(
        default="recipe", description="The job's name, by default the recipe file's name without its ending."
    )
    nodes: Annotated[Annotated[int, Field(ge=1, le=2)] | Name, says("2, 1 or a node's name")] = Field(
        default=2, description="2 spreads the job over the pair; 1, or a node's name, runs it whole on one node."
    )
    restart: Restart = Field(
        default_factory=Restart, description="What to do when the job fails for a reason that may pass."
    )


class FinetuneRecipe(_AnyRecipe):
    """Fine-tune a causal language model, split over the pair."""

    kind: Literal["finetune"] = Field(description="finetune: train a model, or an adapter for it.")
    base_model: Argument = Field(
        validation_alias=AliasChoices("base_model", "model_name_or_path", "model"),
        description="The model to start from: a folder, or a Hugging Face id.",
    )
    datasets: Annotated[tuple[Dataset, ...], AfterValidator(_some)] = Field(
        json_schema_extra={"minItems": 1}, description="What to learn from: a list of `{path, type}`."
    )
    val_set_size: Annotated[
        int | float, AfterValidator(_validation_share), says("a fraction below 1 or a whole number of rows")
    ] = Field(default=0, description="Rows kept back for evaluation: a fraction below 1, or how many; 0 for none.")
    skip_bad_rows: bool = Field(
        default=False,
        description="Leave out rows that cannot be used and count them; by default the first one is an error.",
    )
    adapter: Literal["qlora", "lora", "full"] = Field(
        default="lora",
        description="lora trains small matrices beside the model, qlora with it in 4 bits, full all of it.",
    )
    strategy: Literal["auto", "pipeline", "fsdp2", "zero3", "ddp"] = Field(
        default="auto", description="How the model is spread over the pair; auto lets the plan choose."
    )
    quantize_moe_experts: bool = Field(
        default=True, description="With adapter: qlora, hold a mixture's experts in 4 bits too."
    )
    lora_r: _Count = Field(
        default=16,
        validation_alias=AliasChoices("lora_r", "lora_rank", "r"),
        description="The rank of the LoRA matrices.",
    )
    lora_alpha: _Count = Field(default=32, description="LoRA's scale: what it adds is multiplied by alpha / r.")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="The share of LoRA's inputs dropped in training.")
    lora_target_linear: bool | None = Field(
        default=None, description="Adapt every linear layer; the default unless lora_target_modules names some."
    )
    lora_target_modules: Annotated[
        Annotated[tuple[OneLine, ...], AfterValidator(_some)] | None,
        BeforeValidator(_all_linear),
        WithJsonSchema(
            {"anyOf": [{"type": "array", "items": {"type": "string"}, "minItems": 1}, {"const": "all-linear"}]}
        ),
    ] = Field(
        default=None,
        validation_alias=AliasChoices("lora_target_modules", "target_modules"),
        description="The names of the modules to adapt, such as q_proj; excludes lora_target_linear: true.",
    )

    sequence_len: int = Field(
        default=2048,
        ge=8,
        validation_alias=AliasChoices("sequence_len", "max_seq_length", "max_length"),
        description="The longest sample, in tokens; longer ones are cut.",
    )
    sample_packing: bool = Field(
        default=False,
        validation_alias=AliasChoices("sample_packing", "packing"),
        description="Put several short samples into one sequence; attention never crosses samples.",
    )
    micro_batch_size: _Count = Field(
        default=1,
        validation_alias=AliasChoices("micro_batch_size", "per_device_train_batch_size"),
        description="Samples that go through the model at once.",
    )
    gradient_accumulation_steps: _Count = Field(
        default=8, description="Micro-batches in one optimizer step; a pipeline keeps its stages busy with them."
    )
    num_epochs: float = Field(
        default=1.0,
        gt=0,
        le=10000,
        validation_alias=AliasChoices("num_epochs", "num_train_epochs"),
        description="How many times the data is gone through.",
    )
    max_steps: _Count | None = Field(
        default=None, description="Stop after this many optimizer steps, whatever num_epochs says."
    )

    learning_rate: float = Field(default=2e-4, gt=0, le=1, description="The highest learning rate.")
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        default="cosine",
        validation_alias=AliasChoices("lr_scheduler", "lr_scheduler_type"),
        description="How the learning rate falls after the warm-up.",
    )
    warmup_ratio: float = Field(
        default=0.03, ge=0, le=1, description="The share of all steps in which the learning rate rises."
    )
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="Decoupled weight decay.")
    optimizer: Literal["adamw_torch", "adamw_8bit", "adafactor"] = Field(
        default="adamw_torch", validation_alias=AliasChoices("optimizer", "optim"), description="The optimizer."
    )
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="Adam's decay of the mean of gradients.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="Adam's decay of the mean of squared gradients.")
    adam_epsilon: float = Field(default=1e-8, gt=0, le=1, description="Adam's guard against division by zero.")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="Gradients are clipped to this norm over all ranks; 0 for never."
    )
    bf16: Annotated[Literal["auto"] | bool, says("auto, true or false")] = Field(
        default="auto", description="Compute in bfloat16; auto does so where the GPU can."
    )
    gradient_checkpointing: bool = Field(
        default=True,
        description="Compute activations again instead of keeping them: less memory, about a third slower.",
    )
    seed: _Seed = Field(default=42, description="Of shuffling, dropout and new weights.")

    output_dir: Argument | None = Field(
        default=None, description="The folder for the result; by default it stays in the job's own."
    )
    logging_steps: _Count = Field(default=1, description="Steps between two lines of metrics.")
    save_steps: _Count | None = Field(
        default=None, description="Steps between two checkpoints; without it, one at each epoch's end."
    )
    save_total_limit: _Count = Field(default=2, description="How many checkpoints are kept.")
    eval_steps: _Count | None = Field(
        default=None,
        description="Steps between two evaluations; without it, one at each epoch's end if rows are kept back.",
    )
    resume_from_checkpoint: Argument | None = Field(
        default=None, description="A checkpoint's folder to go on from, or auto for the newest complete one."
    )

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        modules = self.lora_target_modules
        if modules is not None and self.lora_target_linear:
            raise WrongKeyError("lora_target_modules", "excludes lora_target_linear: true; keep one")
        if self.adapter != "full" and modules is None and self.lora_target_linear is False:
            raise WrongKeyError(
                "lora_target_linear", f"leaves adapter: {self.adapter} nothing to train; name lora_target_modules"
            )
        if self.eval_steps is not None and self.val_set_size == 0:
            raise WrongKeyError("eval_steps", "has nothing to evaluate on; give val_set_size, such as 0.05")
        return self


class InferenceRecipe(_AnyRecipe):
    """Serve a causal language model, split over the pair."""

    kind: Literal["inference"] = Field(description="inference: serve a model behind an OpenAI-compatible endpoint.")
    base_model: Argument = Field(
        validation_alias=AliasChoices("base_model", "model", "model_name_or_path"),
        description="The model to serve: a folder, or a Hugging Face id.",
    )
    strategy: Literal["pipeline"] = Field(default="pipeline", description="pipeline: half of the layers on each node.")
    quantization: Literal["nf4"] | None = Field(
        default=None,
        description="nf4 quantises the weights to 4 bits while loading; without it, they stay as they are.",
    )
    adapter_path: Argument | None = Field(
        default=None,
        validation_alias=AliasChoices("adapter_path", "adapter_name_or_path"),
        description="The folder of a LoRA adapter to serve with the model.",
    )
    adapter_from: Name | None = Field(
        default=None,
        description="The fine-tuned job whose adapter to serve, under the name given here; excludes adapter_path.",
    )
    max_model_len: int = Field(
        default=4096,
        ge=8,
        validation_alias=AliasChoices("max_model_len", "max_seq_length", "max_length"),
        description="The longest sequence, prompt and answer together, in tokens.",
    )
    max_num_seqs: _Count = Field(default=8, description="How many sequences are decoded at once.")
    max_num_batched_tokens: _Count = Field(
        default=2048, description="How many tokens go through the model in one step."
    )
    served_model_name: OneLine | None = Field(
        default=None, description="What clients call the model; by default the recipe's name."
    )
    host: Annotated[str, AfterValidator(_bind_address)] = Field(
        default="127.0.0.1", description="The address that the endpoint listens on."
    )
    port: int = Field(
        default=8000, ge=0, le=65535, description="The port that the endpoint listens on; 0 takes any free one."
    )
    seed: _Seed = Field(default=0, description="Of sampling, for requests that bring none.")

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if self.adapter_path is not None and self.adapter_from is not None:
            raise WrongKeyError("adapter_from", "excludes adapter_path; keep one")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise WrongKeyError(
                "max_num_batched_tokens",
                f"must be at least max_num_seqs ({self.max_num_seqs}), not {self.max_num_batched_tokens}",
            )
        return self


class CommandRecipe(_AnyRecipe):
    """Run any other program on both nodes, with the pair's environment."""

    kind: Literal["command"] = Field(description="command: run any other program with the pair's environment.")
    command: Annotated[Sides, BeforeValidator(_sides), WithJsonSchema(_SIDES_SCHEMA)] = Field(
        description="What to run, without a shell: one argv for both nodes, or {head: argv, peer: argv}."
    )
    model: Argument | None = Field(
        default=None,
        validation_alias=AliasChoices("model", "base_model", "model_name_or_path"),
        description="What {model} stands for: a folder, or a Hugging Face id, placed on both nodes first.",
    )
    env: Environment = Field(default_factory=dict, repr=False, description="Environment of the program on both nodes.")
    ports: Annotated[tuple[PortNumber, ...], AfterValidator(_unique)] = Field(
        default=(), description="Ports that `sparkctl tunnel` brings to this machine."
    )
    ready: Annotated[OneLine, AfterValidator(_ready)] | None = Field(
        default=None,
        description="Tells when it is up: an http URL that answers, or a regular expression for a log line.",
    )
    image: Argument | None = Field(default=None, description="A container image to run the command in.")

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        words = (*(self.command.head or ()), *(self.command.peer or ()))
        if self.model is None and any("{model}" in word for word in words):
            raise WrongKeyError("command", "uses {model}, but the recipe has no model")
        if self.image is not None and any(character.isspace() for character in self.image):
            raise WrongKeyError("image", f"must be a container image's name, not {shown(self.image)}")
        return self
