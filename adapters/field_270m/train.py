"""Train the LoRA adapter on the output of `examples.py`: torch, transformers and peft, on a CPU or a GPU.

    python adapters/field_270m/train.py CHECKPOINT.gguf EXAMPLES.jsonl -o FOLDER

The loss looks only at tokens that the grammar leaves open, and only at what it allows there: the very choice
that the product makes. So the output head, more than half of the model, is a few dozen rows. FOLDER always
holds the latest adapter, written every few minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, GgufConfig

BASE = "google/gemma-3-270m"
RANK, ALPHA = 16, 32
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = list(range(7, 18))
"""The first layers are not trained, so no gradients are computed for them."""

BATCH = 4
WARM_UP = 20
"""Steps in which the learning rate rises."""

COOL_DOWN = 0.4
"""Share of the time, at its end, in which it falls to nothing."""

SAVE_EVERY_S = 180
WINDOW = 16
"""So many batches are drawn at once and sorted by length, so that little is padded."""

Example = dict[str, Any]


def adapted(checkpoint: Path, device: str, dtype: torch.dtype) -> Any:
    """The frozen model, with a new adapter for each of its matrices."""
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.parent, gguf_file=checkpoint.name, dtype=dtype, quantization_config=unpacked
    )
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=MODULES, layers_to_transform=LAYERS, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config).to(device)


def batches(examples: list[Example], seed: int) -> Iterator[list[Example]]:
    """Each example once, in batches of about one length."""
    draw = random.Random(seed)
    order = draw.sample(examples, len(examples))
    for start in range(0, len(order) - BATCH + 1, BATCH * WINDOW):
        window = sorted(order[start : start + BATCH * WINDOW], key=lambda example: len(example["ids"]))
        groups = [window[i : i + BATCH] for i in range(0, len(window) - BATCH + 1, BATCH)]
        yield from draw.sample(groups, len(groups))


def choice_logits(model: Any, batch: list[Example], device: str) -> Iterator[tuple[Tensor, int]]:
    """For every choice of a batch the logits of what is allowed, and the index of the right one."""
    kept = [example["ids"][: example["choices"][-1][0]] for example in batch]
    longest = max(map(len, kept))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in kept], device=device)
    decoder = model.get_base_model()
    hidden = decoder.model(input_ids=ids, use_cache=False).last_hidden_state
    rows = decoder.lm_head.weight
    for index, example in enumerate(batch):
        for position, allowed, right in example["choices"]:
            yield rows[torch.tensor(allowed, device=device)] @ hidden[index, position - 1], right


def loss_of(model: Any, batch: list[Example], device: str) -> tuple[Tensor, list[bool]]:
    """Mean loss over the batch's choices, and which examples are right throughout."""
    losses, rights, choices = [], [], choice_logits(model, batch, device)
    for example in batch:
        found = [next(choices) for _ in example["choices"]]
        targets = [torch.tensor(right, device=device) for _, right in found]
        losses += [
            functional.cross_entropy(logits.float(), t) for (logits, _), t in zip(found, targets, strict=True)
        ]
        rights.append(all(int(logits.argmax()) == right for logits, right in found))
    return torch.stack(losses).mean(), rights


def save(model: Any, folder: Path) -> None:
    """Write the adapter as PEFT does, its weights as float16."""
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(folder, save_embedding_layers=False)  # else it asks the network about the base
    (folder / "README.md").unlink()  # a form that nobody has filled in
    weights = folder / "adapter_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights)


def train(args: argparse.Namespace) -> None:
    """Run through all examples once."""
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    examples = [json.loads(line) for line in args.examples.read_text().splitlines()]
    model = adapted(args.checkpoint, device, dtype)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.rate, weight_decay=0.0, betas=(0.9, 0.99))
    log, clock = Log(), Clock(args.minutes)
    for step, batch in enumerate(batches(examples, args.seed)):
        if clock.share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min((step + 1) / WARM_UP, (1 - clock.share) / COOL_DOWN, 1.0)
        with torch.autocast(device, dtype, enabled=args.bfloat16), disable_input_dtype_casting(model):
            loss, rights = loss_of(model, batch, device)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.add(step, batch, loss.item(), rights)
        if clock.due():
            save(model, args.output)
    save(model, args.output)


class Clock:
    """The share of the time used, and the times to save."""

    def __init__(self, minutes: float) -> None:
        self._seconds, self._started = 60 * minutes, time.monotonic()
        self._saved = self._started

    @property
    def share(self) -> float:
        """Of the time, from 0 to 1."""
        return (time.monotonic() - self._started) / self._seconds

    def due(self) -> bool:
        """Whether a save is due; if so, the interval starts again."""
        if time.monotonic() - self._saved < SAVE_EVERY_S:
            return False
        self._saved = time.monotonic()
        return True


class Log:
    """Prints the progress of training regularly."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._losses: list[float] = []
        self._rights: dict[str, list[bool]] = {}

    def add(self, step: int, batch: list[Example], loss: float, rights: list[bool]) -> None:
        """Count a batch; every 40th time print."""
        self._losses.append(loss)
        for example, right in zip(batch, rights, strict=True):
            self._rights.setdefault(example["kind"], []).append(right)
        if len(self._losses) == 40:
            share = {kind: f"{sum(found) / len(found):.0%}" for kind, found in sorted(self._rights.items())}
            seen, seconds = BATCH * (step + 1), time.monotonic() - self._started
            print(f"{seconds:.0f} s, {seen} examples, loss {sum(self._losses) / 40:.3f}", share, flush=True)
            self._losses, self._rights = [], {}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("examples", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rate", type=float, default=5e-4, help="the highest learning rate")
    parser.add_argument(
        "--minutes", type=float, default=31, help="how long; it ends earlier without examples"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bfloat16", action="store_true", help="twice as fast where the CPU has it")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
