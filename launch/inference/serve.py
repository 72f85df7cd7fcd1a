"""A rank of a job that serves: rank 0 runs the engine in a thread and answers HTTP, the others follow it."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from transformers import AutoTokenizer

from launch.agent.report import Report, Reporter
from launch.inference import batch
from launch.inference.adapters import Adapters
from launch.inference.engine import Follower, Leader
from launch.inference.intake import Intake, Limits
from launch.inference.server import run as server
from launch.inference.server.service import Defaults, Service
from launch.job import JobFolder, JobSpec
from launch.recipe import InferenceRecipe, parse_dump
from launch.shard.stage import Stage

# The requests that may wait for each that runs; one more is told to come again.
WAITING_PER_SLOT = 32


def run(folder: JobFolder, spec: JobSpec, rank: int, device: torch.device, reporter: Reporter) -> None:
    """Load this rank's stage and serve until asked to stop."""
    recipe = parse_dump(spec.recipe_at(rank))
    assert isinstance(recipe, InferenceRecipe)
    listener = (
        server.listen_again(recipe.host, recipe.port, folder) if rank == 0 else None
    )  # a taken port is told before anything is loaded
    stage = Stage.load(
        Path(recipe.base_model),
        spec.cut(rank),
        dtype=batch.working_type(device),
        device=device,
        quantization=recipe.quantization,
    )
    folders = {"adapter": Path(recipe.adapter_path)} if recipe.adapter_path else {}
    adapters = Adapters(stage, folders) if folders else None
    reporter.listen_for_stop()
    reporter.tell(Report("running"))
    if listener is None:
        Follower(
            stage,
            slots=recipe.max_num_seqs,
            longest=recipe.max_model_len,
            chooser=adapters,
            beat=reporter.beat,
            rest=lambda: reporter.rest("requests"),
        ).run()
        return
    tokenizer = AutoTokenizer.from_pretrained(recipe.base_model, trust_remote_code=False)
    given = parse_dump(spec.recipe)  # adapters are named as their owner has named them, wherever they lie on this node
    assert isinstance(given, InferenceRecipe)
    names = model_names(given)
    intake = Intake(
        Limits(
            max_model_len=recipe.max_model_len,
            max_waiting=recipe.max_num_seqs * WAITING_PER_SLOT,
            vocabulary=stage.config.get_text_config(decoder=True).vocab_size,
            adapters=tuple(folders),
        )
    )
    leader = Leader(
        stage,
        intake,
        tokenizer,
        slots=recipe.max_num_seqs,
        chunk=recipe.max_num_batched_tokens,
        adapters=adapters.numbers if adapters is not None else {},
        stop=batch.stop_tokens(recipe, tokenizer),
        chooser=adapters,
        beat=reporter.beat,
        rest=lambda: reporter.rest("requests"),
    )
    engine = threading.Thread(target=leader.run, name="engine")
    engine.start()
    service = Service(
        intake,
        tokenizer,
        names,
        Defaults.of_model(Path(recipe.base_model)),
        recipe.max_model_len,
        spec.version,
        seed=recipe.seed,
    )
    try:
        server.serve(listener, service, folder, reporter)
    finally:
        intake.close()
        engine.join()
    if leader.failure is not None:
        raise leader.failure


def model_names(recipe: InferenceRecipe) -> dict[str, str | None]:
    """What clients call the models, and the adapter of each. An adapter comes first: it answers where nobody chooses."""
    base = recipe.served_model_name or recipe.name
    adapter = recipe.adapter_from or (Path(recipe.adapter_path).name if recipe.adapter_path else None)
    if adapter is None:
        return {base: None}
    return {adapter if adapter != base else f"{base}-adapter": "adapter", base: None}
