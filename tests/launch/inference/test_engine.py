"""Whatever comes and goes beside it, an answer over two ranks is token for token what `generate` gives alone."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers

from launch.inference.adapters import Adapters
from launch.inference.intake import Intake, Tokens
from launch.inference.request import GenerationRequest, Sampling
from tests import models
from tests.launch.inference import engines
from tests.launch.inference.engines import Heard
from tests.ranks import run_ranks

# Attention only: peft takes DeepSeek's fused experts for something else.
TARGETS = {"deepseek-v3": ["q_a_proj", "q_b_proj", "o_proj"]}
FREE = Sampling(ignore_eos=True)
# They guard against hanging, no more.
pytestmark = pytest.mark.timeout(480)
WITHIN = 300.0
MOST = 24


def reference(model: transformers.PreTrainedModel, prompt: tuple[int, ...], count: int) -> list[int]:
    """The greedy answer of `generate`, asked nothing else."""
    ids = torch.tensor([list(prompt)])
    settings = transformers.GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=257)
    drawn = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, eos_token_id=None)
    return drawn[0][len(prompt) :].tolist()


def adapter(base: Path, folder: Path, seed: int, targets: list[str]) -> Path:
    """A LoRA adapter of random weights, strong enough to change what is said."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=2 * seed, lora_alpha=32, target_modules=targets, init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def sixty(seed: int) -> list[GenerationRequest]:
    """Random prompts, some of which begin as another one does; random lengths; a third with each adapter or none."""
    draw = random.Random(seed)  # noqa: S311 - reproducible, not secret
    made: list[GenerationRequest] = []
    for number in range(60):
        prompt = tuple(draw.randrange(256) for _ in range(draw.randrange(1, 70)))
        if number % 5 == 4:
            prompt = (made[number - 3].prompt + prompt)[:90]
        chosen = draw.choice([None, "one", "two"])
        made.append(GenerationRequest(str(number), prompt, draw.randrange(1, MOST), FREE, adapter=chosen))
    return made


def come_and_go(intake: Intake, heard: Heard, requests: list[GenerationRequest]) -> None:
    """Ask them one by one, at random moments; every sixth is given up after its first tokens, or before them."""
    draw = random.Random(len(requests))  # noqa: S311
    given_up = requests[5::6]
    for request in requests:
        intake.submit(request, heard.note)
        if request in given_up and draw.random() < 0.5:
            heard.wait(lambda asked=request.id: asked in heard.tokens or asked in heard.reasons)
            intake.cancel(request.id)
        elif request in given_up:
            intake.cancel(request.id)
        elif draw.random() < 0.6:
            engines.pause(draw.random() * 0.02)
    heard.wait(lambda: {one.id for one in requests if one not in given_up} <= heard.reasons.keys())


def answer_sixty(rank: int, folder: Path, one: Path, two: Path) -> dict[str, list[int]]:
    """What each rank does: rank 0 returns the tokens of all that ended."""
    loaded = engines.stage(folder, rank, 2)
    adapters = Adapters(loaded, {"one": one, "two": two})
    heard = engines.serve(rank, loaded, lambda intake, heard: come_and_go(intake, heard, sixty(1)), adapters=adapters)
    assert not any(reason.startswith("failed") for reason in heard.reasons.values()), heard.reasons
    return {request: heard.tokens[request] for request, reason in heard.reasons.items() if reason == "length"}


@pytest.mark.parametrize("architecture", ["llama", "qwen3-moe", "deepseek-v3", "gemma3"])
def test_sixty_requests_that_come_and_go_are_answered_as_if_each_were_alone(architecture: str, tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model", architecture)
    targets = TARGETS.get(architecture, ["q_proj", "v_proj", "o_proj"])
    folders = [adapter(folder, tmp_path / name, seed, targets) for seed, name in ((1, "one"), (2, "two"))]
    answers = run_ranks(answer_sixty, folder, *folders, seconds=WITHIN)[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    adapted = peft.PeftModel.from_pretrained(model, folders[0], adapter_name="one")
    adapted.load_adapter(folders[1], adapter_name="two")
    requests = sixty(1)
    given_up = {request.id for request in requests[5::6]}
    assert {request.id for request in requests} - given_up <= answers.keys()
    for request in requests:
        if request.id not in answers:
            continue
        if request.adapter is None:
            with adapted.disable_adapter():
                expected = reference(adapted, request.prompt, request.max_tokens)
        else:
            adapted.set_adapter(request.adapter)
            expected = reference(adapted, request.prompt, request.max_tokens)
        assert answers[request.id] == expected, f"{request}"
    assert len({tuple(tokens) for tokens in answers.values()}) > 40, "they must differ, or equality would say little"


def answer_plain(rank: int, folder: Path, world: int, requests: list[GenerationRequest]) -> dict[str, list[int]]:
    """Ask everything at once."""
    loaded = engines.stage(folder, rank, world)
    heard = engines.serve(rank, loaded, lambda intake, heard: engines.ask_all(intake, heard, requests))
    return heard.tokens


# Llama 4: chunks of 32 tokens, and queries that are scaled anew every 8 instead of 8192 tokens, and so much that answers change.
LAYERS = {"llama4": {"no_rope_layer_interval": 2, "floor_scale": 8, "attn_scale": 8.0}}


@pytest.mark.parametrize("architecture", ["gpt-oss", "mistral-window", "qwen3-next", "llama-tied", "llama4"])
def test_every_kind_of_layer_keeps_what_it_needs_of_long_prompts(architecture: str, tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model", architecture, **LAYERS.get(architecture, {}))
    draw = random.Random(4)  # noqa: S311 - reproducible, not secret
    requests = [
        GenerationRequest(str(n), tuple(draw.randrange(256) for _ in range(length)), 12, FREE)
        for n, length in enumerate((1, 15, 16, 17, 31, 33, 64, 90, 100))
    ]
    answers = run_ranks(answer_plain, folder, 2, requests, seconds=WITHIN)[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for request in requests:
        assert answers[request.id] == reference(model, request.prompt, request.max_tokens)


def test_a_seed_draws_the_same_split_or_whole_and_whatever_runs_beside_it(tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model")
    requests = [
        GenerationRequest(
            str(n),
            tuple(b"two sparks on one cable"[n:]),
            16,
            Sampling(
                temperature=0.9, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.3, seed=n, ignore_eos=True
            ),
        )
        for n in range(8)
    ]
    together = run_ranks(answer_plain, folder, 2, requests, seconds=WITHIN)[0]
    for request in requests[:3]:
        assert (
            run_ranks(answer_plain, folder, 1, [request], world=1, seconds=WITHIN)[0][request.id]
            == together[request.id]
        )
    assert len({tuple(tokens) for tokens in together.values()}) == len(requests)


def scored(rank: int, folder: Path) -> Heard:
    """A request that asks for every score, beside others."""
    loaded = engines.stage(folder, rank, 2)
    first = GenerationRequest(
        "scored", tuple(b"half of the model on each box"), 5, FREE.model_copy(update={"logprobs": 2}), prompt_logprobs=3
    )
    others = [GenerationRequest(str(n), tuple(b"beside it"), 9, FREE) for n in range(3)]
    heard = engines.serve(
        rank, loaded, lambda intake, heard: engines.ask_all(intake, heard, [others[0], first, *others[1:]])
    )
    return replace(heard, changed=None)


def test_scores_of_prompt_and_answer_are_the_models_own(tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model")
    heard = run_ranks(scored, folder, seconds=WITHIN)[0]
    events = [event for event in heard.events["scored"] if isinstance(event, Tokens)]
    told = [one for event in events for one in event.scored]
    prompt = b"half of the model on each box"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    whole = [*prompt, *heard.tokens["scored"]]
    with torch.no_grad():
        shares = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    assert [one.token for one in told] == whole
    assert told[0].logprob is None
    for position, one in enumerate(told[1:], start=1):
        assert one.logprob == pytest.approx(shares[position - 1, one.token].item(), abs=1e-3)
        best = shares[position - 1].topk(3 if position < len(prompt) else 2)
        assert [token for token, _ in one.top] == best.indices.tolist()


def cancel_one(rank: int, folder: Path) -> list[str]:
    """One slot: the second request can only begin once the first, which would go on for long, is given up."""
    loaded = engines.stage(folder, rank, 2)
    order: list[str] = []

    def ask(intake: Intake, heard: Heard) -> None:
        intake.submit(GenerationRequest("long", (1, 2, 3), 120, FREE), heard.note)
        intake.submit(GenerationRequest("next", (4, 5, 6), 3, FREE), heard.note)
        heard.wait(lambda: "long" in heard.tokens)
        intake.cancel("long")
        heard.wait(lambda: "next" in heard.reasons)
        order.extend(heard.reasons)
        until_idle(intake)

    engines.serve(rank, loaded, ask, slots=1)
    return order


def until_idle(intake: Intake) -> None:
    """Until the engine says that nothing runs."""
    deadline = threading.Event()
    for _ in range(600):
        stats = intake.stats()
        if stats.running == stats.waiting == 0:
            return
        deadline.wait(0.05)
    raise AssertionError(f"still at work: {stats}")


def test_a_request_that_is_given_up_frees_its_slot(tmp_path: Path) -> None:
    assert run_ranks(cancel_one, models.make(tmp_path / "model"), seconds=WITHIN)[0] == ["next"]


def share(rank: int, folder: Path) -> list[tuple[list[int], int]]:
    """The same long beginning three times: in a slot that is free again, and in one that is in use."""
    loaded = engines.stage(folder, rank, 2)
    prompts = [tuple(range(64)), (*range(64), 70), (*range(48), 80, 81)]
    cached: list[int] = []

    def ask(intake: Intake, heard: Heard) -> None:
        for number, prompt in enumerate(prompts):
            intake.submit(GenerationRequest(str(number), prompt, 40, FREE), heard.note)
            heard.wait(lambda asked=str(number): len(heard.tokens.get(asked, ())) >= (40 if asked == "0" else 1))
            cached.append(next(event.cached for event in heard.events[str(number)] if isinstance(event, Tokens)))
        heard.wait(lambda: len(heard.reasons) == len(prompts))

    heard = engines.serve(rank, loaded, ask)
    return [(heard.tokens[str(number)], cached[number]) for number in range(len(cached))]


def test_a_beginning_that_is_in_a_slot_already_is_not_computed_again(tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model")
    answers = run_ranks(share, folder, seconds=WITHIN)[0]
    assert [cached for _, cached in answers] == [0, 64, 48]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [tuple(range(64)), (*range(64), 70), (*range(48), 80, 81)]
    assert [tokens for tokens, _ in answers] == [reference(model, prompt, 40) for prompt in prompts]
