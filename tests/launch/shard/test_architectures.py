"""Every architecture that is said to work does: two stages in a row write what the whole model writes, token for token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from launch.shard.stage import Stage
from launch.split import Cut
from tests import models

CPU = torch.device("cpu")
VARIANTS = {
    "granite-scaled": ("granite", {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.2})
}
NAMES = sorted({*models.ARCHITECTURES, *models.FAMILIES, *VARIANTS})
TOKENS = 16
PROMPTS = (b"two sparks", b"a cable that is a good deal longer than the window of any layer")


def _padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of PROMPTS, padded on the left."""
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[257] * (longest - len(prompt)) + list(prompt) for prompt in PROMPTS])
    return ids, (ids != 257).long()


def _made(folder: Path, name: str) -> Path:
    architecture, changes = VARIANTS.get(name, (name, {}))
    models.make(folder, architecture, **changes)
    if (
        architecture in models.FAMILIES
    ):  # as models.make does with the others: or every answer would be one token, repeated
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0) if parameter.ndim > 1 else None
        model.save_pretrained(folder)
    return folder


@torch.no_grad()
def _generate(stages: list[Stage], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    caches = [stage.new_cache() for stage in stages]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    made, inputs = [], ids
    for _ in range(TOKENS):
        hidden = inputs
        for stage, cache in zip(stages, caches, strict=True):
            hidden = stage.forward(hidden, attention_mask=mask, position_ids=positions, cache=cache, keep=1)
        inputs = hidden[:, -1].argmax(-1, keepdim=True)
        made.append(inputs)
        mask = torch.cat([mask, torch.ones(len(ids), 1, dtype=mask.dtype)], -1)
        positions = positions[:, -1:] + 1
    return torch.cat(made, -1)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_two_stages_write_what_the_whole_model_writes(name: str, tmp_path: Path) -> None:
    folder = _made(tmp_path / "model", name)
    ids, mask = _padded()
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = whole.generate(
        ids, attention_mask=mask, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, eos_token_id=None
    )[:, ids.shape[1] :]
    layers = whole.config.get_text_config(decoder=True).num_hidden_layers
    half = layers // 2
    stages = [
        Stage.load(folder, cut, dtype=torch.float32, device=CPU)
        for cut in (Cut(0, half, layers), Cut(half, layers, layers))
    ]
    assert _generate(stages, ids, mask).tolist() == expected.tolist()
