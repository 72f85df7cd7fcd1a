"""A merged model is what peft's merge makes, and says what cannot be merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from cluster.errors import RefusedError, WrongInputError
from launch.finetune.merge import merge
from launch.shard import quantize
from tests import models


def _adapter(base: Path, folder: Path, **changes: object) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(**{**settings, **changes}))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["llama-tied", "qwen3-moe"])
def test_it_is_what_peft_makes(name: str, rslora: bool, tmp_path: Path) -> None:
    base = models.make(tmp_path / "base", name)
    adapter = _adapter(base, tmp_path / "adapter", use_rslora=rslora)
    made = merge(base, adapter, tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    merged = transformers.AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32).state_dict()
    assert set(merged) == set(expected)
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-5)
    before = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    changed = [key for key, tensor in merged.items() if not torch.equal(tensor, before[key])]
    assert len(changed) == made.changed == 8
    transformers.AutoTokenizer.from_pretrained(made.folder)
    assert set(load_file(next(made.folder.glob("*.safetensors")))) == set(load_file(base / "model.safetensors"))


def test_what_cannot_be_merged_is_named(tmp_path: Path) -> None:
    base = models.make(tmp_path / "base")
    adapter = _adapter(base, tmp_path / "adapter")
    with pytest.raises(WrongInputError, match="is no PEFT LoRA folder"):
        merge(base, base, tmp_path / "merged")
    with pytest.raises(WrongInputError, match="is there already"):
        merge(base, adapter, base)
    with pytest.raises(RefusedError, match="comes in NF4"):
        merge(quantize.quantize(base, tmp_path / "copy").folder, adapter, tmp_path / "merged")
    with pytest.raises(WrongInputError, match="another"):
        merge(models.make(tmp_path / "small", num_attention_heads=2), adapter, tmp_path / "merged")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(RefusedError, match="uses use_dora"):
        merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
