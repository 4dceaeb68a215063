"""Hugging Face folders: every spelling gives the same checkpoint; invalid ones are refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.architectures.tensor_shapes import tensor_shapes
from converters.checkpoints.opening import open_checkpoint
from converters.checkpoints.tensor_reader import bfloat16_rows
from edge.errors import CheckpointError
from edge.text.tokenizer import Tokenizer
from tests.converters.test_checkpoints import read_all, refusal
from tests.support.checkpoint_files import (
    FIXTURES,
    GEMMA3,
    GEMMA4,
    NAMES,
    bfloat16,
    copy_fixture,
    read_arrays,
    write_safetensors,
)

SHARDED, TEXT_ONLY = "gemma3-two-kv-heads", "gemma4-two-kv-heads"


@given(st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=40))
def test_a_bfloat16_is_the_upper_half_of_a_float32(bits: list[int]) -> None:
    halves = np.array(bits, np.uint16)
    wide = bfloat16_rows(halves.view(np.uint8)[None, :])
    assert (wide.view(np.uint32) == halves.astype(np.uint32) << 16).all()
    finite = wide[np.isfinite(wide)]
    assert (bfloat16(finite) == halves[np.isfinite(wide[0])]).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_can_be_read_in_any_slice(name: str) -> None:
    checkpoint = open_checkpoint(FIXTURES / name)
    shapes = tensor_shapes(checkpoint.architecture)
    assert {key: tensor.shape for key, tensor in checkpoint.tensors.items()} == shapes
    for tensor in checkpoint.tensors.values():
        middle = tensor.shape[0] // 2
        parts = [tensor.rows(0, middle), tensor.rows(middle, tensor.shape[0])]
        np.testing.assert_array_equal(np.concatenate(parts), tensor.array())


def test_gemma3_norms_are_stored_minus_one_and_gemma4_norms_are_not() -> None:
    for name, added in ((GEMMA3, 1), (GEMMA4, 0)):
        tensor = open_checkpoint(FIXTURES / name).tensors["layers.0.attention_norm"]
        stored = read_arrays(FIXTURES / name / "model.safetensors")[tensor.name]
        expected = bfloat16_rows(stored.view(np.uint8)[None, :])[0] + np.float32(added)
        np.testing.assert_array_equal(tensor.array(), expected)
        assert 0.7 < tensor.array().mean() < 1.3


def test_float32_and_float16_files_give_the_same_values(tmp_path: Path) -> None:
    folder = copy_fixture(GEMMA3, tmp_path / "model")
    original = {key: tensor.array() for key, tensor in open_checkpoint(folder).tensors.items()}
    wide = {
        key: (bits.astype(np.uint32) << 16).view(np.float32)
        for key, bits in read_arrays(folder / "model.safetensors").items()
    }
    for kind in (np.float32, np.float16):
        write_safetensors(
            folder / "model.safetensors", {key: value.astype(kind) for key, value in wide.items()}
        )
        for key, tensor in open_checkpoint(folder).tensors.items():
            np.testing.assert_allclose(
                tensor.array(), original[key], rtol=0, atol=0 if kind == np.float32 else 1e-3
            )


def test_unused_keys_and_values_and_towers_are_optional(tmp_path: Path) -> None:
    with_dead = open_checkpoint(FIXTURES / GEMMA4)
    folder = copy_fixture(GEMMA4, tmp_path / "model")
    used = {tensor.name for tensor in with_dead.tensors.values()}
    arrays = read_arrays(folder / "model.safetensors")
    assert len(arrays) > len(used)
    write_safetensors(folder / "model.safetensors", {key: arrays[key] for key in sorted(used)})
    without = open_checkpoint(folder)
    assert without.architecture == with_dead.architecture
    for key, tensor in with_dead.tensors.items():
        np.testing.assert_array_equal(without.tensors[key].array(), tensor.array())


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", ""])
def test_the_prefix_of_the_text_decoder_is_found(prefix: str, tmp_path: Path) -> None:
    folder = copy_fixture(GEMMA4, tmp_path / "model")
    arrays = {
        key.replace("model.language_model.", prefix): value
        for key, value in read_arrays(folder / "model.safetensors").items()
    }
    write_safetensors(folder / "model.safetensors", arrays)
    read_all(folder)


def respell_per_layer_config(config: dict[str, Any]) -> None:
    text = config["text_config"]
    full = [index for index, kind in enumerate(text["layer_types"]) if kind == "full_attention"]
    text["per_layer_config"] = {
        f"{index:02d}": {"head_dim": text.pop("global_head_dim", 64)} for index in full
    }


def respell_rope_parameters(config: dict[str, Any]) -> None:
    config["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": config.pop("rope_theta")},
        "sliding_attention": {"rope_type": "default", "rope_theta": config.pop("rope_local_base_freq")},
    }


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        (GEMMA4, respell_per_layer_config),
        (GEMMA4, lambda config: config["text_config"].pop("rope_parameters")),
        (GEMMA4, lambda config: config["text_config"].update(use_bidirectional_attention="vision")),
        (GEMMA3, respell_rope_parameters),
        (GEMMA3, lambda config: config.pop("_sliding_window_pattern")),
        (
            GEMMA3,
            lambda config: config.update(
                layer_types=["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"]
            ),
        ),
    ],
)
def test_both_spellings_of_a_config_mean_the_same(
    name: str, edit: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    folder = copy_fixture(name, tmp_path / "model", edit)
    assert open_checkpoint(folder).architecture == open_checkpoint(FIXTURES / name).architecture


def test_a_separate_head_is_read_if_the_config_unties_it(tmp_path: Path) -> None:
    folder = copy_fixture(GEMMA3, tmp_path / "model")
    arrays = read_arrays(folder / "model.safetensors")
    head = np.full_like(arrays["model.embed_tokens.weight"], 0x3F80)
    write_safetensors(folder / "model.safetensors", arrays | {"lm_head.weight": head})
    assert "head" not in open_checkpoint(folder).tensors
    tied = open_checkpoint(folder).architecture
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    untied = open_checkpoint(folder)
    assert untied.architecture == replace(tied, tied_head=False)
    assert (untied.tensors["head"].array() == 1).all()


@pytest.mark.parametrize(
    ("name", "edit", "named"),
    [
        (GEMMA3, {"model_type": "gemma3n"}, "model_type 'gemma3n'"),
        (GEMMA3, {"model_type": None}, "model_type None"),
        (GEMMA3, {"model_type": "llama"}, "model_type 'llama'"),
        (GEMMA3, {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}, "rope_scaling"),
        (GEMMA3, {"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, "rope_type = 'linear'"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA3, {"hidden_activation": "silu"}, "hidden_activation"),
        (GEMMA3, {"hidden_size": None}, "hidden_size is missing"),
        (GEMMA3, {"hidden_size": -64}, "hidden_size = -64 is out of range"),
        (GEMMA3, {"hidden_size": 96}, "config.json requires (512, 96)"),
        (GEMMA3, {"vocab_size": 262144}, "config.json requires (262144, 64)"),
        (GEMMA3, {"layer_types": ["sliding_attention"]}, "layer_types must list 7 layers"),
        (GEMMA3, {"layer_types": ["linear_attention"] * 7}, "linear_attention"),
        (GEMMA3, {"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method 'bitsandbytes'"),
        (GEMMA3, {"quantization_config": {"bits": 4}}, "quant_method None"),
        (GEMMA4, {"attention_k_eq_v": True}, "attention_k_eq_v = True"),
        (GEMMA4, {"enable_moe_block": True}, "enable_moe_block = True"),
        (GEMMA4, {"hidden_size_per_layer_input": 0}, "hidden_size_per_layer_input = 0"),
        (GEMMA4, {"num_global_key_value_heads": 4}, "num_global_key_value_heads = 4"),
        (GEMMA4, {"num_kv_shared_layers": 8}, "num_kv_shared_layers = 8"),
        (GEMMA4, {"num_kv_shared_layers": 7}, "no full layer before layer 1"),
        (GEMMA4, {"model_type": "gemma3_text"}, "gemma3_text"),
        (GEMMA4, {"per_layer_config": {"2": {"num_key_value_heads": 2}}}, "num_key_value_heads for layer 2"),
        (GEMMA4, {"per_layer_config": {"2": {"head_dim": 64}}}, "different head_dim"),
    ],
)
def test_a_config_that_is_not_supported_is_refused_by_key(
    name: str, edit: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = copy_fixture(
        name, tmp_path / "model", lambda config: config.get("text_config", config).update(edit)
    )
    assert named in refusal(folder)


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (remove("config.json"), "config.json: is missing"),
        (write("config.json", "{"), "config.json: not JSON"),
        (write("config.json", "[]"), "config.json: must be a JSON object"),
        (write("config.json", "[" * 100_000), "config.json: not JSON"),
        (remove("tokenizer.model"), "neither tokenizer.model nor tokenizer.json"),
        (write("tokenizer.model", "nonsense"), "tokenizer.model: not a SentencePiece model"),
        (remove("model-00002-of-00003.safetensors"), "model-00002-of-00003.safetensors: is missing"),
        (write("model-00002-of-00003.safetensors", ""), "model-00002-of-00003.safetensors: truncated"),
        (write("model-00002-of-00003.safetensors", "{" * 99), "model-00002-of-00003.safetensors: truncated"),
        (write("model.safetensors.index.json", "{}"), "index.json: has no weight_map"),
        (write("model.safetensors.index.json", '{"weight_map": {"a": "../x"}}'), "outside the folder: ../x"),
        (remove("model.safetensors.index.json"), "model.safetensors: is missing"),
        (
            lambda folder: shutil.copy(
                folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors"
            ),
            "is also in model-00001-of-00003.safetensors",
        ),
    ],
)
def test_a_damaged_folder_is_refused_by_file(
    damage: Callable[[Path], object], named: str, tmp_path: Path
) -> None:
    folder = copy_fixture(SHARDED, tmp_path / "model")
    damage(folder)
    assert named in refusal(folder)


def test_a_missing_tensor_an_unknown_type_and_a_non_finite_value_are_refused_by_name(
    tmp_path: Path,
) -> None:
    folder = copy_fixture(GEMMA3, tmp_path / "model")
    arrays = read_arrays(folder / "model.safetensors")
    name = "model.layers.4.mlp.up_proj.weight"
    write_safetensors(folder / "model.safetensors", {key: arrays[key] for key in arrays if key != name})
    assert f"{name} is in none" in refusal(folder)
    write_safetensors(folder / "model.safetensors", arrays | {name: np.zeros((96, 64), np.int32)})
    assert f"{name}: type I32 is not supported" in refusal(folder)
    for bits in (0x7F80, 0xFF80, 0x7FC0):
        damaged = arrays[name].copy()
        damaged[95, 63] = bits
        write_safetensors(folder / "model.safetensors", arrays | {name: damaged})
        assert f"{name}: has NaN or infinite values" in refusal(folder)
    write_safetensors(folder / "model.safetensors", {"vision.weight": np.zeros((2, 2), np.float32)})
    assert "the text decoder is not in these files" in refusal(folder)


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    folder = copy_fixture(GEMMA3, tmp_path / "model")
    checkpoint = open_checkpoint(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="the file is truncated"):
        [tensor.array() for tensor in checkpoint.tensors.values()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_fixture(GEMMA3, tmp_path_factory.mktemp("folder") / "model")


@settings(max_examples=40)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_safetensors_file_truncated_anywhere_is_refused(share: float, folder: Path) -> None:
    whole = (FIXTURES / GEMMA3 / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
    assert "model.safetensors: truncated or corrupt" in refusal(folder)


@given(at=st.integers(0, 9000), value=st.integers(0, 255))
def test_a_damaged_safetensors_header_is_read_or_refused_but_never_crashes(
    at: int, value: int, folder: Path
) -> None:
    raw = bytearray((FIXTURES / GEMMA3 / "model.safetensors").read_bytes())
    raw[at] = value
    (folder / "model.safetensors").write_bytes(raw)
    try:
        read_all(folder)
    except CheckpointError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


def test_chat_template_and_licence_are_found_in_every_place(tmp_path: Path) -> None:
    folder = copy_fixture(GEMMA3, tmp_path / "model")
    assert open_checkpoint(folder).chat.prompt_format == "plain"
    assert open_checkpoint(folder).licence == ""
    template = "{{ '<start_of_turn>user' }}"
    named = [{"name": "tool_use", "template": "other"}, {"name": "default", "template": template}]
    for source in (template, named):
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
        assert open_checkpoint(folder).chat.prompt_format == "gemma3"
    (folder / "chat_template.jinja").write_text("no markers here")
    assert open_checkpoint(folder).chat.prompt_format == "plain"
    (folder / "LICENSE").write_text("\n  The Licence\nText")
    assert open_checkpoint(folder).licence == "Licence: The Licence"
    (folder / "README.md").write_text("---\nlibrary_name: x\nlicense: gemma\n---\n# Hello\n")
    assert "Gemma Terms of Use" in open_checkpoint(folder).licence
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert "Apache" in open_checkpoint(folder).licence


def test_tokenizer_json_alone_is_enough(tmp_path: Path) -> None:
    folder = copy_fixture(TEXT_ONLY, tmp_path / "model")
    (folder / "tokenizer.model").unlink()
    checkpoint = open_checkpoint(folder)
    assert folder / "tokenizer.json" in checkpoint.source_files


def test_tokens_added_to_the_vocabulary_are_encoded_as_single_tokens(tmp_path: Path) -> None:
    """As after add_tokens and resize_token_embeddings, which do not change tokenizer.model."""
    folder = copy_fixture(TEXT_ONLY, tmp_path / "model", lambda config: config.update(vocab_size=514))
    arrays = read_arrays(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.embed_tokens_per_layer.weight"):
        arrays[name] = np.concatenate([arrays[name], arrays[name][:2]])
    write_safetensors(folder / "model.safetensors", arrays)
    spelled = json.loads((folder / "tokenizer.json").read_text())
    spelled["added_tokens"] += [
        spelled["added_tokens"][-1] | {"id": 512, "content": "<valve>", "special": True},
        spelled["added_tokens"][-1] | {"id": 513, "content": "pump_7", "special": False},
    ]
    (folder / "tokenizer.json").write_text(json.dumps(spelled))
    tokenizer = Tokenizer(open_checkpoint(folder).tokenizer_model)
    before = Tokenizer(open_checkpoint(FIXTURES / TEXT_ONLY).tokenizer_model)
    assert tokenizer.encode("the pump_7") == [*before.encode("the "), 513]
    assert tokenizer.decode([513]) == "pump_7"
    assert tokenizer.control_id("<valve>") == 512
