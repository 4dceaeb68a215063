"""LoRA adapters: merged rows equal PEFT's; an adapter that can't be merged is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from converters.checkpoints.base import Checkpoint
from converters.checkpoints.opening import open_checkpoint
from converters.cli import main
from converters.convert import convert
from converters.evaluate import built_in_text
from converters.lora import merge_adapter
from converters.merged_adapter import MergedAdapter, merged_adapter
from edge.bundles.bundle import file_digest, read_manifest
from edge.cli.exit_codes import ExitCode
from edge.errors import CheckpointError
from tests.support import bundles
from tests.support.checkpoint_files import (
    FIXTURES,
    GEMMA3,
    GEMMA4,
    bfloat16,
    read_arrays,
    write_gguf,
    write_packed_release,
    write_safetensors,
)

ADAPTERS = FIXTURES / "adapters"
WEIGHTS = "adapter_model.safetensors"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
Factors = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]


def write_adapter(folder: Path, factors: Factors, **config: Any) -> Path:
    """An adapter as PEFT saves it: `factors` has A and B by the module's name in the base model."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for module, (a, b) in factors.items():
        arrays[f"base_model.model.{module}.lora_A.weight"] = a
        arrays[f"base_model.model.{module}.lora_B.weight"] = b
    write_safetensors(folder / WEIGHTS, arrays)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config)
    )
    return folder


def factors_for(checkpoint: Checkpoint, name: str, rank: int = 2) -> tuple[Any, Any]:
    draw, (rows, columns) = np.random.default_rng(rank), checkpoint.tensors[name].shape
    return (
        draw.normal(size=(rank, columns)).astype(np.float32),
        draw.normal(size=(rows, rank)).astype(np.float32),
    )


@pytest.mark.parametrize("name", [GEMMA3, GEMMA4])
def test_a_bundle_with_an_adapter_computes_what_peft_and_transformers_compute(
    name: str, tmp_path: Path
) -> None:
    """The second adapter has rsLoRA, ranks and alphas by module, and per-layer projections."""
    merged = merge_adapter(open_checkpoint(FIXTURES / name), ADAPTERS / name)
    convert(merged, tmp_path / "bundle", "float32", 128)
    with np.load(ADAPTERS / name / "reference.npz") as file:
        ids, expected = file["ids"].tolist(), file["logits"]
    got = np.concatenate([b.copy() for b in bundles.open_decoder(tmp_path / "bundle").logits_of(ids)])
    np.testing.assert_allclose(got, expected, atol=5e-4)
    with np.load(FIXTURES / name / "reference.npz") as file:
        assert np.abs(file["logits"][: len(ids)] - expected).max() > 5


@settings(max_examples=30)
@given(
    rank=st.integers(1, 9),
    alpha=st.floats(0.125, 64),
    rslora=st.booleans(),
    bounds=st.tuples(st.integers(0, 127), st.integers(0, 127)).filter(lambda pair: pair[0] < pair[1]),
)
def test_any_slice_of_merged_rows_matches_the_formula(
    rank: int, alpha: float, rslora: bool, bounds: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkpoint = open_checkpoint(FIXTURES / GEMMA3)
    a, b = factors_for(checkpoint, "layers.0.query", rank)
    folder = write_adapter(
        tmp_path_factory.mktemp("adapter"),
        {"model.layers.0.self_attn.q_proj": (a, b)},
        r=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
    )
    tensor = merge_adapter(checkpoint, folder).tensors["layers.0.query"]
    base = checkpoint.tensors["layers.0.query"].array().astype(np.float64)
    scale = alpha / (rank**0.5 if rslora else rank)
    expected = base + scale * (b.astype(np.float64) @ a.astype(np.float64))
    start, stop = bounds
    np.testing.assert_allclose(tensor.rows(start, stop), expected[start:stop], rtol=1e-4, atol=1e-4)


def test_other_tensors_are_unchanged() -> None:
    checkpoint = open_checkpoint(FIXTURES / GEMMA3)
    merged = merge_adapter(checkpoint, ADAPTERS / GEMMA3)
    same = {name for name, tensor in merged.tensors.items() if tensor is checkpoint.tensors[name]}
    assert {"embedding", "final_norm", "layers.0.query_norm"} <= same
    assert not any(name.endswith(("query", "gate", "down")) for name in same)


@pytest.mark.parametrize("first", ["model.language_model.", "language_model.model.", "model.", ""])
def test_modules_are_found_with_every_prefix(first: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(FIXTURES / GEMMA4)
    factors = {f"{first}layers.1.mlp.up_proj": factors_for(checkpoint, "layers.1.up")}
    merged = merge_adapter(checkpoint, write_adapter(tmp_path, factors))
    assert merged.tensors["layers.1.up"].source_type == "BF16 with LoRA"


def test_the_chat_template_of_an_adapter_for_a_base_model_is_used(tmp_path: Path) -> None:
    """It is saved beside the adapter with the tokenizer; where it is another family's, the model's counts."""
    checkpoint = open_checkpoint(FIXTURES / GEMMA3)
    assert checkpoint.chat.prompt_format == "plain"
    folder = write_adapter(tmp_path, {"model.layers.1.mlp.up_proj": factors_for(checkpoint, "layers.1.up")})
    (folder / "chat_template.jinja").write_text("{{ '<start_of_turn>user' }}")
    merged = merge_adapter(checkpoint, folder)
    assert (merged.chat.prompt_format, merged.chat.stop_ids) == ("gemma3", (1, 106))
    (folder / "chat_template.jinja").write_text("{{ '<|im_start|>user' }}")
    assert merge_adapter(checkpoint, folder).chat == checkpoint.chat
    assert merge_adapter(merged, folder).chat == merged.chat


def test_towers_and_unused_keys_and_values_are_left_out(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(FIXTURES / GEMMA4)
    pair = factors_for(checkpoint, "layers.1.up")
    factors = {
        "model.language_model.layers.1.mlp.up_proj": pair,
        "model.vision_tower.encoder.layers.0.self_attn.q_proj": pair,
        "model.language_model.layers.7.self_attn.k_proj": pair,  # layer 7 reads the KV of another
    }
    merged = merge_adapter(checkpoint, write_adapter(tmp_path, factors))
    changed = [name for name, tensor in merged.tensors.items() if tensor is not checkpoint.tensors[name]]
    assert changed == ["layers.1.up"]


def test_a_merged_matrix_is_quantised_again_even_if_the_base_has_codes(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", GEMMA3, Kind.Q4_0)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    factors = {"model.layers.1.mlp.up_proj": factors_for(checkpoint, "layers.1.up")}
    merged = merge_adapter(checkpoint, write_adapter(tmp_path / "adapter", factors))
    assert merged.tensors["layers.1.up"].codes() is None
    assert merged.tensors["layers.1.down"].codes() is not None


def test_bfloat16_adapters_are_read(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(FIXTURES / GEMMA3)
    a, b = factors_for(checkpoint, "layers.0.query")
    write_adapter(tmp_path, {"model.layers.0.self_attn.q_proj": (a, b)})
    arrays = {key: bfloat16(array) for key, array in read_arrays(tmp_path / WEIGHTS).items()}
    write_safetensors(tmp_path / WEIGHTS, arrays)
    got = merge_adapter(checkpoint, tmp_path).tensors["layers.0.query"].array()
    expected = checkpoint.tensors["layers.0.query"].array() + 2 * b @ a
    np.testing.assert_allclose(got, expected, atol=0.1)


def refusal(folder: Path, checkpoint: Checkpoint | None = None) -> str:
    opened = checkpoint or open_checkpoint(FIXTURES / GEMMA3)
    with pytest.raises(CheckpointError) as caught:
        merge_adapter(opened, folder).tensors["layers.0.query"].rows(0, 4)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3': only LoRA adapters can be merged"),
        ({"use_dora": True}, "use_dora is True: DoRA is not supported; merge it with PEFT"),
        ({"bias": "all"}, "bias is 'all': adapters with trained biases"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True: transposed weights"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']: whole retrained modules"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4': this initialisation"),
        ({"r": 0}, "r of model.layers.0.self_attn.q_proj is 0, not a positive number"),
        ({"r": 2.5}, "the rank of model.layers.0.self_attn.q_proj is 2.5, not a whole number"),
        (
            {"lora_alpha": None},
            "lora_alpha of model.layers.0.self_attn.q_proj is None, not a positive number",
        ),
        ({"alpha_pattern": {"q_proj": "x"}}, "lora_alpha of model.layers.0.self_attn.q_proj is 'x'"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern has an invalid pattern"),
        ({"rank_pattern": [2]}, "rank_pattern must be an object"),
    ],
)
def test_unsupported_adapter_settings_are_named(setting: dict[str, Any], said: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(FIXTURES / GEMMA3)
    factors = {"model.layers.0.self_attn.q_proj": factors_for(checkpoint, "layers.0.query")}
    message = refusal(write_adapter(tmp_path, factors, **setting))
    assert message.startswith(f"{tmp_path}/adapter_config.json: {said}")


def rename(arrays: dict[str, NDArray[Any]], old: str, new: str) -> None:
    for key in [key for key in arrays if old in key]:
        arrays[key.replace(old, new)] = arrays.pop(key)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda a: rename(a, "layers.0.", "layers.7."),
            "module model.layers.7.self_attn.q_proj is not in this model",
        ),
        (
            lambda a: rename(a, "q_proj", "qkv_proj"),
            "module model.layers.0.self_attn.qkv_proj is not in this",
        ),
        (lambda a: rename(a, "layers.0.self_attn.q_proj", "embed_tokens"), "module model.embed_tokens"),
        (
            lambda a: rename(a, "model.layers.0.self_attn.q_proj", "lm_head"),
            "module lm_head: the output head is",
        ),
        (
            lambda a: rename(a, "lora_A", "lora_embedding_A"),
            "lora_embedding_A.weight is not part of a plain LoRA",
        ),
        (lambda a: a.pop(f"{Q_PROJ}.lora_B.weight"), "q_proj has lora_A only; fetch it again"),
        (
            lambda a: a.update({f"{Q_PROJ}.lora_A.weight": np.ones((2, 65), np.float32)}),
            "lora_A.weight is F32 of shape (2, 65); rank 2 and this model require (2, 64)",
        ),
        (
            lambda a: a.update({f"{Q_PROJ}.lora_B.weight": np.ones((128, 3), np.float32)}),
            "lora_B.weight is F32 of shape (128, 3); rank 2 and this model require (128, 2)",
        ),
        (
            lambda a: a.update({f"{Q_PROJ}.lora_A.weight": np.ones((2, 64), np.int8)}),
            "lora_A.weight is I8 of shape (2, 64)",
        ),
        (
            lambda a: a.update({f"{Q_PROJ}.lora_A.weight": np.full((2, 64), np.nan, np.float32)}),
            "lora_A.weight: has NaN or infinite values",
        ),
        (
            lambda a: a.update({key: np.full(array.shape, 1e30, np.float32) for key, array in a.items()}),
            "lora_B.weight: has NaN or infinite values",
        ),
        (
            lambda a: rename(a, "model.layers.0", "model.vision_tower.layers.0"),
            "has no module of the text decoder",
        ),
    ],
)
def test_tensors_that_do_not_match_are_named(
    damage: Callable[[dict[str, NDArray[Any]]], object], said: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(FIXTURES / GEMMA3)
    write_adapter(tmp_path, {"model.layers.0.self_attn.q_proj": factors_for(checkpoint, "layers.0.query")})
    arrays = read_arrays(tmp_path / WEIGHTS)
    damage(arrays)
    write_safetensors(tmp_path / WEIGHTS, arrays)
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}/{WEIGHTS}: ")
    assert said in message


def test_an_adapter_of_another_model_is_refused_by_module() -> None:
    message = refusal(ADAPTERS / GEMMA4)
    assert f"{ADAPTERS / GEMMA4}/{WEIGHTS}: " in message
    assert "model.language_model.layers.0.mlp" in message


def test_an_adapter_for_a_packed_release_is_refused(tmp_path: Path) -> None:
    write_packed_release(tmp_path / "model")
    message = refusal(ADAPTERS / GEMMA4, open_checkpoint(tmp_path / "model"))
    assert message.startswith(f"{tmp_path}/model: holds quantised integers, to which nothing can be added")


@pytest.mark.parametrize("missing", ["adapter_config.json", WEIGHTS])
def test_a_missing_file_is_named(missing: str, tmp_path: Path) -> None:
    shutil.copytree(ADAPTERS / GEMMA3, tmp_path / "adapter")
    (tmp_path / "adapter" / missing).unlink()
    assert refusal(tmp_path / "adapter").startswith(f"{tmp_path}/adapter/{missing}: is missing")


def test_the_command_merges_and_the_manifest_has_the_adapter_s_digest(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    arguments = [str(FIXTURES / GEMMA3), "-o", str(target), "--lora", str(ADAPTERS / GEMMA3)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert {WEIGHTS, "adapter_config.json"} <= read_manifest(target).source["sha256"].keys()
    refused = CliRunner().invoke(
        main, [*arguments[:2], str(tmp_path / "x"), "--lora", str(ADAPTERS / GEMMA4)]
    )
    assert refused.exit_code == 4
    assert refused.stderr.startswith(f"Error: {ADAPTERS / GEMMA4}/{WEIGHTS}: ")
    assert refused.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the adapter of GEMMA3 merged."""
    bundle = tmp_path_factory.mktemp("tuned") / "bundle"
    convert(merge_adapter(open_checkpoint(FIXTURES / GEMMA3), ADAPTERS / GEMMA3), bundle, "float32", 128)
    return bundle


def without_adapter_entry(bundle: Path, target: Path) -> Path:
    """The bundle as the version before adapters were recorded wrote it."""
    shutil.copytree(bundle, target)
    manifest = json.loads((target / "manifest.json").read_text())
    del manifest["source"]["adapter"]
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def test_the_manifest_and_inspect_name_the_merged_adapter(tuned: Path) -> None:
    digest = file_digest(ADAPTERS / GEMMA3 / WEIGHTS)
    manifest = read_manifest(tuned)
    assert manifest.source["adapter"] == {"name": GEMMA3, "sha256": digest}
    assert merged_adapter(manifest) == MergedAdapter(GEMMA3, digest)
    shown = CliRunner().invoke(main, ["inspect", str(tuned)]).output
    assert f"LoRA adapter '{GEMMA3}' merged, SHA-256 {digest[:16]}" in shown
    assert "LoRA" not in CliRunner().invoke(main, ["inspect", str(bundles.small_bundle(GEMMA3))]).output


def test_a_bundle_of_an_earlier_version_has_an_adapter_without_a_name(tuned: Path, tmp_path: Path) -> None:
    manifest = read_manifest(without_adapter_entry(tuned, tmp_path / "old"))
    assert merged_adapter(manifest) == MergedAdapter("", file_digest(ADAPTERS / GEMMA3 / WEIGHTS))


@pytest.mark.parametrize("entry", [1, {}, {"name": "x"}])
def test_a_malformed_adapter_entry_is_a_one_line_error(entry: object, tuned: Path, tmp_path: Path) -> None:
    copy = without_adapter_entry(tuned, tmp_path / "bundle")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["source"]["adapter"] = entry
    (copy / "manifest.json").write_text(json.dumps(manifest))
    result = CliRunner().invoke(main, ["inspect", str(copy)])
    assert result.exit_code == ExitCode.BUNDLE
    assert "source.adapter in the manifest must have name and sha256" in result.stderr


def evaluated(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    text = tmp_path / "text.txt"
    text.write_text(built_in_text()[:1500])
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = ["evaluate", *arguments, "--against", str(FIXTURES / GEMMA3), "--text", str(text), "--json"]
    result = CliRunner(env=environment).invoke(main, command)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_evaluate_merges_the_adapter_and_without_it_reports_the_difference(
    tuned: Path, tmp_path: Path
) -> None:
    adapter, base = str(ADAPTERS / GEMMA3), str(bundles.small_bundle(GEMMA3))
    fair, plain = evaluated(tmp_path, str(tuned), base, "--lora", adapter)
    assert fair["adapter_note"] == ""
    assert fair["maximum_error"] < 1e-3
    assert plain["adapter_note"] == f"--lora '{GEMMA3}' is not merged into this bundle; leave it out"
    unfair, plain = evaluated(tmp_path, str(tuned), base)
    expected = f"'{GEMMA3}' is merged into the bundle but not into the checkpoint; give --lora FOLDER"
    assert unfair["adapter_note"] == expected
    assert unfair["maximum_error"] > 1
    assert plain["adapter_note"] == ""


def test_evaluate_reports_that_another_adapter_was_merged(tuned: Path, tmp_path: Path) -> None:
    a, b = factors_for(open_checkpoint(FIXTURES / GEMMA3), "layers.0.query")
    other = write_adapter(tmp_path / "other", {"model.layers.0.self_attn.q_proj": (a, b)})
    (report,) = evaluated(tmp_path, str(tuned), "--lora", str(other))
    assert (
        report["adapter_note"]
        == f"'{GEMMA3}' is merged into the bundle, another one into the checkpoint: 'other'"
    )
