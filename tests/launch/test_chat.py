"""A conversation becomes the same tokens when it is trained on and when it is asked; only answers are learned."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from cluster.errors import WrongInputError
from launch.chat import IGNORED, PLAIN_TEMPLATE, Sample, encode_prompt, encode_row
from launch.rows import Row, Turn
from tests import models

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Its prompts end in a space, which a whole conversation's tokens would join to the answer's first word.
SPACED = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ 'Question: ' + message['content'] + '\nAnswer: ' }}{% endif %}{% endfor %}"
)
# As Qwen3 does: of earlier answers only what is said remains, the last one gets an empty thought.
FORGETFUL = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ 'A<think></think>' + message['content'] + eos_token }}"
    "{% else %}{{ message['role'][0] | upper + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'A' }}{% endif %}"
)
# As DeepSeek-R1 does: who asks gets a thought opened that no answer in a conversation has.
OPENING = (
    "{% for message in messages %}{{ message['role'] + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant<think>' }}{% endif %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"

ONE = Row((Turn("user", "Où est le câble?"), Turn("assistant", "Là, en dessous. 😀")))
TWO = Row(
    (
        Turn("system", "Answer in one word."),
        Turn("user", "Which box is rank 0?"),
        Turn("assistant", "The head."),
        Turn("user", "And rank 1?"),
        Turn("assistant", "The peer."),
        Turn("user", "Thanks!"),
    )
)


def _bytes() -> Any:
    return models.tokenizer()


def _merging() -> Any:
    """One whose tokens span several characters, ` The` and `:\n` for instance, so that where text is cut matters."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = ["Question: And\nAnswer: The head. The peer. Question: Which box is rank 0? Answer in one word.\n\n"] * 9
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


def _chatml(tokenizer: Any) -> Any:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def _spaced(tokenizer: Any) -> Any:
    tokenizer.chat_template = SPACED
    return tokenizer


# How to make one, and what stands around an answer's words.
TOKENIZERS = {
    "plain": (_bytes, " ", "<end>"),
    "plain-merging": (_merging, " ", "<end>"),
    "spaced-merging": (lambda: _spaced(_merging()), "", "<end>"),
    "chatml": (lambda: _chatml(_bytes()), "", "<|im_end|>\n"),
    "chatml-merging": (lambda: _chatml(_merging()), "", "<|im_end|>\n"),
}


def _learned(tokenizer: Any, sample: Sample) -> list[str]:
    """The runs of learned tokens, decoded."""
    runs: list[list[int]] = [[]]
    for token, label in zip(sample.ids, sample.labels, strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("made", TOKENIZERS)
def test_only_answers_and_their_ends_are_learned(made: str) -> None:
    make, start, end = TOKENIZERS[made]
    tokenizer = make()
    assert _learned(tokenizer, encode_row(tokenizer, ONE)) == [f"{start}Là, en dessous. 😀{end}"]
    assert _learned(tokenizer, encode_row(tokenizer, TWO)) == [f"{start}The head.{end}", f"{start}The peer.{end}"]


@pytest.mark.parametrize("made", TOKENIZERS)
def test_a_sample_reads_as_the_template_renders_it_up_to_its_last_answer(made: str) -> None:
    tokenizer = TOKENIZERS[made][0]()
    messages = [{"role": turn.role, "content": turn.content} for turn in TWO.turns[:-1]]
    template = tokenizer.chat_template or PLAIN_TEMPLATE
    rendered = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert tokenizer.decode(encode_row(tokenizer, TWO).ids) == rendered


def test_a_base_model_is_asked_in_plain_words() -> None:
    tokenizer = _bytes()
    assert tokenizer.decode(encode_prompt(tokenizer, TWO.turns[:4])) == (
        "Answer in one word.\n\nQuestion: Which box is rank 0?\nAnswer: The head.<end>Question: And rank 1?\nAnswer:"
    )


@pytest.mark.parametrize("made", TOKENIZERS)
def test_who_asks_gives_the_tokens_that_stood_before_the_answer_in_training(made: str) -> None:
    tokenizer = TOKENIZERS[made][0]()
    for row, asked in ((ONE, 1), (TWO, 2), (TWO, 4)):
        sample = encode_row(tokenizer, Row(row.turns[: asked + 1]))
        prompt = encode_prompt(tokenizer, row.turns[:asked])
        assert sample.ids[: len(prompt)] == tuple(prompt)
        assert sample.labels[len(prompt) - 1] == IGNORED
        assert IGNORED not in sample.labels[len(prompt) :], "right behind the prompt the answer begins"


def test_the_first_token_has_no_predecessor_to_learn_it_from() -> None:
    assert Sample((1, 2, 3), (1, 2, 3)).learned == 2
    assert Sample((1, 2, 3), (1, IGNORED, 3)).learned == 1
    assert Sample((1,), (1,)).learned == 0


@pytest.mark.parametrize("text", ["Learned whole.", "Learned whole.<end>"])
def test_plain_text_is_learned_whole_and_ends_once(text: str) -> None:
    tokenizer = _bytes()
    sample = encode_row(tokenizer, Row(text=text))
    assert sample.ids == sample.labels
    assert tokenizer.decode(sample.ids) == "Learned whole.<end>"
    unending = _bytes()
    unending.eos_token = None
    assert unending.decode(encode_row(unending, Row(text="Learned whole.")).ids) == "Learned whole."


def _refusal(tokenizer: Any, row: Row) -> WrongInputError:
    with pytest.raises(WrongInputError) as wrong:
        encode_row(tokenizer, row)
    assert "\n" not in wrong.value.message
    return wrong.value


def test_a_template_that_rewrites_earlier_turns_trains_on_single_answers_only() -> None:
    tokenizer = _bytes()
    tokenizer.chat_template = FORGETFUL
    assert _learned(tokenizer, encode_row(tokenizer, ONE)) == ["<think></think>Là, en dessous. 😀<end>"]
    wrong = _refusal(tokenizer, Row(TWO.turns, where="rows.jsonl:7"))
    assert wrong.message.startswith("rows.jsonl:7: the model's chat template rewrites earlier turns")
    assert "single answer" in wrong.fix
    asked = tokenizer.decode(encode_prompt(tokenizer, TWO.turns[:4]))
    assert asked == "SAnswer in one word.<end>UWhich box is rank 0?<end>AThe head.<end>UAnd rank 1?<end>A"


def test_where_the_prompt_opens_a_thought_the_answer_is_learned_behind_it() -> None:
    tokenizer = _bytes()
    tokenizer.chat_template = OPENING
    sample = encode_row(tokenizer, ONE)
    assert _learned(tokenizer, sample) == ["Là, en dessous. 😀<end>"]
    asked = encode_prompt(tokenizer, ONE.turns[:1])
    assert tokenizer.decode(asked).endswith("assistant<think>")
    assert list(sample.ids[: len(asked)]) == asked, "in training the answer stands where it stands when asked"


def test_a_template_that_rewrites_the_answer_is_named() -> None:
    tokenizer = _bytes()
    tokenizer.chat_template = OPENING.replace("message['content']", "message['content'] | upper")
    assert "rewrites the answer itself" in _refusal(tokenizer, ONE).message


def test_what_the_template_says_against_a_conversation_is_passed_on() -> None:
    tokenizer = _bytes()
    tokenizer.chat_template = STRICT
    wrong = _refusal(tokenizer, Row(TWO.turns, where="rows.jsonl:7"))
    assert wrong.message == (
        "rows.jsonl:7: the model's chat template refuses the conversation: System role not supported"
    )
    with pytest.raises(WrongInputError, match="System role not supported"):
        encode_prompt(tokenizer, TWO.turns[:2])


def test_without_a_template_answers_need_a_token_to_end_with() -> None:
    unending = _bytes()
    unending.eos_token = None
    assert "neither a chat template nor an end-of-text token" in _refusal(unending, ONE).message
    unending.chat_template = CHATML
    assert _learned(unending, encode_row(unending, ONE)) == ["Là, en dessous. 😀<|im_end|>\n"]
