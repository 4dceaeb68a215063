"""Write the LoRA adapters of `tests/fixtures/adapters` with PEFT, and what transformers computes with them.

    oracle/bin/python tests/oracle/make_adapters.py

For each of two checkpoints a folder as PEFT saves it (adapter_config.json, adapter_model.safetensors) and
`reference.npz`: `ids` int64 [tokens] and `logits` float32 [tokens, vocabulary] of the checkpoint in float32
with the adapter beside it, not merged.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma3ForCausalLM, Gemma4ForConditionalGeneration

FIXTURES = Path(__file__).parent.parent / "fixtures"
TOKENS = 40
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
PER_LAYER = ["per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"]

ADAPTERS: dict[str, tuple[Any, LoraConfig]] = {
    "gemma3-one-kv-head": (
        Gemma3ForCausalLM,
        LoraConfig(r=4, lora_alpha=16, target_modules=[*ATTENTION, *MLP], task_type="CAUSAL_LM"),
    ),
    "gemma4-one-kv-head": (
        Gemma4ForConditionalGeneration,
        LoraConfig(
            r=8,
            lora_alpha=6,
            use_rslora=True,
            rank_pattern={"layers.2.self_attn.q_proj": 2, "down_proj": 3, "proj": 5},
            alpha_pattern={r"model\.language_model\.layers\.[0-3]\.mlp\.up_proj": 11, "gate_proj": 2},
            target_modules=[*ATTENTION, *MLP, *PER_LAYER],
        ),
    ),
}


def write(name: str, model_class: Any, config: LoraConfig) -> None:
    """Make one adapter with random values in both factors."""
    folder = FIXTURES / "adapters" / name
    shutil.rmtree(folder, ignore_errors=True)
    base = model_class.from_pretrained(FIXTURES / name, dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(7)
    model = get_peft_model(base, config).eval()
    for key, tensor in model.named_parameters():
        if "lora_" in key:
            tensor.data = torch.randn(tensor.shape) / math.sqrt(max(tensor.shape)) * 0.7
    model.save_pretrained(folder)
    for extra in set(folder.iterdir()) - {
        folder / "adapter_config.json",
        folder / "adapter_model.safetensors",
    }:
        extra.unlink()
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"base_model_name_or_path": f"example/{name}"}
    settings["target_modules"].sort()
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    with np.load(FIXTURES / name / "reference.npz") as file:
        ids = torch.from_numpy(file["ids"][:TOKENS])
        plain = file["logits"][:TOKENS]
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0].numpy()
    print(f"{name}: the adapter moves logits by up to {np.abs(logits - plain).max():.2f}")
    np.savez_compressed(folder / "reference.npz", ids=ids.numpy(), logits=logits)


if __name__ == "__main__":
    for adapter, (kind, settings) in ADAPTERS.items():
        write(adapter, kind, settings)
