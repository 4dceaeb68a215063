"""Write the small checkpoints of `tests/fixtures` and what transformers computes from them.

    python -m venv oracle && oracle/bin/pip install -r tests/oracle/requirements.txt
    oracle/bin/python tests/oracle/make_fixtures.py [NAME ...]

Each folder holds a checkpoint as it would be published (config.json, bfloat16 safetensors, tokenizer.model)
and `reference.npz`, computed by transformers in float32 on exactly those bfloat16 values:

    ids     int64   [tokens]              the sequence, starting with <bos>
    logits  float32 [tokens, vocabulary]
    hidden  float32 [tokens, hidden]      after the final norm, i.e. what the head multiplies
    greedy  int64   [16]                  the greedy continuation of `ids`

Weights are random, but spread so that every feature shows in the logits: attention is neither flat nor
saturated, layer scalars are far from one, logits reach the softcap, and the sequence is several windows long.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import shutil
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
)

HERE = Path(__file__).parent
FIXTURES = HERE.parent / "fixtures"
TOKENIZER_TEXT = HERE / "tokenizer_text.txt"
VOCABULARY = 512
TOKENS = 80
BOS = 2
SLIDING, FULL = "sliding_attention", "full_attention"

COMMON: dict[str, Any] = {
    "dtype": "bfloat16",
    "vocab_size": VOCABULARY,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "bos_token_id": BOS,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
GEMMA3 = COMMON | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "max_position_embeddings": 32768,
}
GEMMA4_TEXT = COMMON | {
    "model_type": "gemma4_text",
    "vocab_size_per_layer_input": VOCABULARY,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "final_logit_softcapping": 30.0,
    "num_global_key_value_heads": None,
    "use_bidirectional_attention": None,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    },
}


@dataclass(frozen=True)
class Fixture:
    """One checkpoint: `released` writes the config and names of a published repository as they are spelled
    there; otherwise the folder is what transformers' own `save_pretrained` makes of it.
    """

    config: dict[str, Any]
    released: bool
    shards: bool = False
    chat: bool = False
    tokenizer_json: bool = False
    seed: int = 0
    extras: dict[str, tuple[int, ...]] = field(default_factory=dict)


FIXTURES_BY_NAME = {
    # As Google's first Gemma 3 repositories: flat RoPE keys, a pattern, no chat template.
    "gemma3-one-kv-head": Fixture(
        GEMMA3
        | {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 7,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "_sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        released=True,
        seed=1,
    ),
    # As transformers saves it today, in several shards; the scale is not 1/sqrt(head_dim).
    "gemma3-two-kv-heads": Fixture(
        GEMMA3
        | {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 7,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 24,
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, SLIDING, FULL],
            "rope_parameters": {
                FULL: {"rope_type": "default", "rope_theta": 1e6},
                SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        released=False,
        shards=True,
        chat=True,
        seed=2,
    ),
    # As the multimodal repositories: nested config, dead k/v of shared layers, tensors of the towers.
    "gemma4-one-kv-head": Fixture(
        {
            "architectures": ["Gemma4ForConditionalGeneration"],
            "model_type": "gemma4",
            "dtype": "bfloat16",
            "tie_word_embeddings": True,
            "vision_config": None,
            "audio_config": None,
            "eos_token_id": [1, 106],
            "text_config": GEMMA4_TEXT
            | {
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 8,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 32,
                "global_head_dim": 64,
                "hidden_size_per_layer_input": 32,
                "num_kv_shared_layers": 3,
                "use_double_wide_mlp": True,
                "sliding_window": 16,
                "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL, SLIDING, SLIDING, FULL],
            },
        },
        released=True,
        chat=True,
        seed=3,
        extras={
            "model.embed_vision.embedding_projection.weight": (64, 32),
            "model.vision_tower.patch_embedder.input_proj.weight": (32, 32),
            "model.vision_tower.encoder.layers.0.self_attn.q_proj.input_min": (),
            "model.audio_tower.output_proj.weight": (32, 32),
        },
    ),
    # A text-only save by transformers: other prefix and config spelling, no dead k/v, one FFN width.
    "gemma4-two-kv-heads": Fixture(
        GEMMA4_TEXT
        | {
            "architectures": ["Gemma4ForCausalLM"],
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "global_head_dim": 64,
            "hidden_size_per_layer_input": 32,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": False,
            "sliding_window": 16,
            "layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING, FULL],
        },
        released=False,
        tokenizer_json=True,
        seed=4,
    ),
}


def random_values(name: str, shape: tuple[int, ...], seed: int, plus_one: bool) -> torch.Tensor:
    """Random bfloat16 values for a tensor, from its name and the seed alone.

    `plus_one`: the family multiplies by 1 + w, so a norm's weight is stored minus one.
    """
    generator = torch.Generator().manual_seed((zlib.crc32(name.encode()) ^ seed) & 0x7FFFFFFF)
    noise = torch.randn(shape, generator=generator)
    if name.endswith("layer_scalar"):
        values = 0.2 + 0.7 * torch.rand(shape, generator=generator)
    elif "norm" in name:
        values = 1 + 0.25 * noise
        if name.endswith(("q_norm.weight", "k_norm.weight")) and not plus_one:
            values = values / shape[0] ** 0.25  # scores are not divided by sqrt(head_dim)
        if name.endswith("model.norm.weight"):
            values = 6 * values  # logits up to about 25
        values = values - 1 if plus_one else values
    else:
        values = noise / math.sqrt(shape[-1] if shape else 1)
    return values.to(torch.bfloat16)


def build(fixture: Fixture, folder: Path) -> None:
    """Write config.json and the safetensors of a fixture, in the spelling that it asks for."""
    gemma3 = fixture.config["model_type"] == "gemma3_text"
    (folder / "config.json").write_text(json.dumps(fixture.config, indent=2) + "\n")
    model = model_class(fixture)._from_config(model_class(fixture).config_class.from_pretrained(folder))
    values = {
        name: random_values(name, tuple(tensor.shape), fixture.seed, plus_one=gemma3)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    if not fixture.released:
        model.load_state_dict(values, strict=False)
        model.tie_weights()
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="200KB" if fixture.shards else "5GB")
        return
    for name, shape in (fixture.extras | dead_shapes(fixture.config)).items():
        values.setdefault(name, random_values(name, shape, fixture.seed, plus_one=gemma3))
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


def model_class(fixture: Fixture) -> Any:
    """The transformers class that a config names."""
    classes = (Gemma3ForCausalLM, Gemma4ForCausalLM, Gemma4ForConditionalGeneration)
    return next(c for c in classes if c.__name__ == fixture.config["architectures"][0])


def dead_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The k/v tensors of KV-shared layers, which published Gemma 4 files hold and nothing uses."""
    text = config.get("text_config", {})
    shapes: dict[str, tuple[int, ...]] = {}
    count = text.get("num_hidden_layers", 0)
    for index in range(count - text.get("num_kv_shared_layers", 0), count):
        size = text["global_head_dim"] if text["layer_types"][index] == FULL else text["head_dim"]
        prefix = f"model.language_model.layers.{index}.self_attn."
        shapes[prefix + "k_norm.weight"] = (size,)
        for name in ("k_proj", "v_proj"):
            shapes[f"{prefix}{name}.weight"] = (text["num_key_value_heads"] * size, text["hidden_size"])
    return shapes


def control_symbols(gemma4: bool) -> list[str]:
    """Pieces 4 to 106 with the turn and tool tokens at the numbers that the real vocabularies give them."""
    symbols = ["<mask>"] + [f"<unused{n}>" for n in range(102)]
    named = {105: "<start_of_turn>", 106: "<end_of_turn>"}
    if gemma4:
        tools = ("tool", "tool_call", "tool_response")
        pairs = [piece for name in tools for piece in (f"<|{name}>", f"<{name}|>")]
        named = dict(enumerate([*pairs, '<|"|>'], start=46))
        named |= {98: "<|think|>", 100: "<|channel>", 101: "<channel|>", 105: "<|turn>", 106: "<turn|>"}
    for number, piece in named.items():
        symbols[number - 4] = piece
    return symbols


def write_tokenizer(folder: Path, gemma4: bool) -> None:
    """Train a SentencePiece BPE model of Gemma's kind (no normalisation, byte fallback)."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TOKENIZER_TEXT.read_text().splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        pad_id=0,
        eos_id=1,
        bos_id=BOS,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        control_symbols=control_symbols(gemma4),
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def write_tokenizer_json(folder: Path) -> None:
    """Say the same in tokenizer.json, the only form in Gemma 4's repositories; checks that both agree.

    Merges: every split of a piece into two pieces, by the id of the result, then the longer left part first.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    names = [pieces.id_to_piece(n) for n in range(VOCABULARY)]
    vocabulary = {name: n for n, name in enumerate(names)}
    ordinary = [n for n in range(VOCABULARY) if not (pieces.is_control(n) or pieces.is_byte(n) or n == 3)]
    merges = [
        (names[n][:cut], names[n][cut:])
        for n in ordinary
        for cut in range(len(names[n]) - 1, 0, -1)
        if names[n][:cut] in vocabulary and names[n][cut:] in vocabulary
    ]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    control = [AddedToken(names[n], special=True, normalized=False) for n in range(107)]
    tokenizer.add_special_tokens(control)
    for line in [*TOKENIZER_TEXT.read_text().splitlines(), "\u4f60  \t caf\u00e9"]:
        if tokenizer.encode(line).ids != pieces.encode(line):
            raise SystemExit(f"tokenizer.json and tokenizer.model disagree on: {line}")
    tokenizer.save(str(folder / "tokenizer.json"))


def chat_template(gemma4: bool) -> str:
    """A short template of the family's turn format: its presence is what marks a chat model."""
    start, end = ("<|turn>", "<turn|>") if gemma4 else ("<start_of_turn>", "<end_of_turn>")
    return (
        "{{ bos_token }}{% for message in messages %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        f"{{{{ '{start}' + role + '\\n' + message['content'] | trim + '{end}\\n' }}}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ '{start}model\\n' }}}}{{% endif %}}\n"
    )


def reference(fixture: Fixture, folder: Path) -> dict[str, np.ndarray]:
    """What transformers computes from the folder; also checks its cached decoding against the full pass."""
    model = model_class(fixture).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    draws = np.random.default_rng(fixture.seed).integers(4, VOCABULARY, TOKENS - 1)
    ids = torch.from_numpy(np.concatenate([[BOS], draws]))[None]
    full = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    greedy = model.generate(
        ids,
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        attention_mask=torch.ones_like(ids),
    )
    again = model(input_ids=greedy, use_cache=False).logits[0, TOKENS - 1 : -1].argmax(-1)
    if not torch.equal(again, greedy[0, TOKENS:]):
        raise SystemExit(f"{folder.name}: cached greedy decoding and the full pass disagree")
    return {
        "ids": ids[0].numpy(),
        "logits": full.logits[0].float().numpy(),
        "hidden": full.hidden_states[-1][0].float().numpy(),
        "greedy": greedy[0, TOKENS:].numpy(),
    }


def write(name: str, fixture: Fixture) -> None:
    """Make one fixture in a temporary folder, then put it in place of the old one."""
    gemma4 = "gemma4" in fixture.config["model_type"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        folder.mkdir()
        build(fixture, folder)
        write_tokenizer(folder, gemma4)
        if fixture.tokenizer_json:
            write_tokenizer_json(folder)
        stops = ([1, 106, 50] if gemma4 else [1, 106]) if fixture.chat else 1
        if fixture.chat:
            (folder / "chat_template.jinja").write_text(chat_template(gemma4))
        generation = {"bos_token_id": BOS, "eos_token_id": stops, "pad_token_id": 0}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        arrays = reference(fixture, folder)
        np.savez_compressed(
            folder / "reference.npz",
            ids=arrays["ids"],
            logits=arrays["logits"],
            hidden=arrays["hidden"],
            greedy=arrays["greedy"],
        )
        shutil.rmtree(FIXTURES / name, ignore_errors=True)
        shutil.copytree(folder, FIXTURES / name)
    for file in (FIXTURES / name).iterdir():
        file.chmod(0o644)
    size = sum(file.stat().st_size for file in (FIXTURES / name).iterdir())
    spread = np.abs(arrays["logits"]).max()
    print(f"{name}: {size / 1e6:.2f} MB, logits up to {spread:.1f}")


def main() -> None:
    """Write all fixtures, or those that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(FIXTURES_BY_NAME), metavar="NAME")
    torch.set_grad_enabled(False)
    for name in parser.parse_args().names:
        write(name, FIXTURES_BY_NAME[name])


if __name__ == "__main__":
    main()
