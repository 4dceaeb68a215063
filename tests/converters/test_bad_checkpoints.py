"""Bad checkpoints on the command line: a one-line error that names the file, and no leftovers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Kind

from converters.cli import main
from edge.cli.exit_codes import ExitCode
from tests.support.checkpoint_files import (
    GEMMA3,
    GEMMA4,
    bfloat16,
    copy_fixture,
    read_arrays,
    write_gguf,
    write_packed_release,
    write_safetensors,
)

UP = "model.language_model.layers.2.mlp.up_proj.weight"
TABLE = "model.language_model.embed_tokens_per_layer.weight"
NORM = "model.language_model.layers.2.input_layernorm.weight"
Damage = Callable[[Path], object]


def change_config(**keys: Any) -> Damage:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        (config["text_config"] if "quantization_config" not in keys else config).update(keys)
        path.write_text(json.dumps(config))

    return change


def change_tensor(name: str, change: Callable[[Any], Any] | None) -> Damage:
    def rewrite(folder: Path) -> None:
        arrays = read_arrays(folder / "model.safetensors")
        array = arrays.pop(name)
        if change is not None:
            arrays[name] = change(array)
        write_safetensors(folder / "model.safetensors", arrays)

    return rewrite


def with_value(value: float) -> Callable[[Any], Any]:
    """Change one value in the last row, which a conversion reads late."""

    def put(array: Any) -> Any:
        changed = array.copy()
        changed.reshape(-1)[-3] = bfloat16(np.array([value], np.float32))[0]
        return changed

    return put


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def remove_a_shard(folder: Path) -> None:
    arrays = read_arrays(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves: dict[str, dict[str, Any]] = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    where = {}
    for count, (name, array) in enumerate(arrays.items()):
        file = f"model-{1 + count % 2}.safetensors"
        halves[file][name], where[name] = array, file
    write_safetensors(folder / "model-1.safetensors", halves["model-1.safetensors"])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


BAD: dict[str, tuple[Damage, str]] = {
    "a missing shard": (remove_a_shard, "model-2.safetensors: is missing"),
    "a shard cut short": (cut_short, "model.safetensors: truncated or corrupt"),
    "a missing tensor": (change_tensor(UP, None), f": tensor {UP} is in none of the safetensors files"),
    "a wrong shape": (
        change_tensor(UP, lambda a: a[:-1]),
        f"tensor {UP} has shape (63, 64) but config.json requires",
    ),
    "NaN in a matrix": (change_tensor(UP, with_value(np.nan)), f"tensor {UP}: has NaN or infinite values"),
    "infinity in the table": (
        change_tensor(TABLE, with_value(np.inf)),
        f"tensor {TABLE}: has NaN or infinite",
    ),
    "NaN in a norm": (change_tensor(NORM, with_value(np.nan)), f"tensor {NORM}: has NaN or infinite values"),
    "an unknown quantisation": (
        change_config(quantization_config={"quant_method": "awq"}),
        "config.json: quant_method 'awq' is not supported",
    ),
    "Gemma 4 31B": (
        change_config(attention_k_eq_v=True, hidden_size_per_layer_input=0),
        "attention_k_eq_v = True belongs to the larger Gemma 4 models (12B, 26B, 31B); only E2B and E4B",
    ),
    "Gemma 4 26B": (
        change_config(enable_moe_block=True),
        "enable_moe_block = True belongs to the larger Gemma 4",
    ),
    "Gemma 4 12B": (
        change_config(hidden_size_per_layer_input=0),
        "hidden_size_per_layer_input = 0 belongs to the larger Gemma 4",
    ),
}


@pytest.mark.parametrize("recipe", ["int8", "int4", "mobile"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_checkpoint_is_a_one_line_error_and_leaves_nothing(
    kind: str, recipe: str, tmp_path: Path
) -> None:
    damage, said = BAD[kind]
    folder = copy_fixture(GEMMA4, tmp_path / "model")
    damage(folder)
    assert_refused(folder, said, ["--recipe", recipe])


def assert_refused(checkpoint: Path, said: str, options: list[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in checkpoint.parent.rglob("*")}
    result = CliRunner().invoke(main, [str(checkpoint), "-o", str(checkpoint.parent / "bundle"), *options])
    assert result.exit_code == ExitCode.CHECKPOINT, result.output
    error = result.stderr.splitlines()[-1]  # after lines of progress
    assert error.startswith(f"Error: {checkpoint}")
    assert said in error
    assert result.stderr.count("Error: ") == 1
    assert not result.stdout
    assert {path: path.stat().st_mtime_ns for path in checkpoint.parent.rglob("*")} == before


def test_nan_in_a_scale_of_the_mobile_release_is_refused_too(tmp_path: Path) -> None:
    write_packed_release(tmp_path / "model")
    name = "model.language_model.layers.7.mlp.down_proj.weight_scale"
    change_tensor(name, lambda a: np.where(np.arange(len(a))[:, None] == 9, np.float32(np.nan), a))(
        tmp_path / "model"
    )
    assert_refused(tmp_path / "model", f"tensor {name}: has NaN or infinite values", [])


@pytest.mark.parametrize(
    ("fields", "tensors", "said"),
    [
        ({"gemma4.expert_count": 128}, {}, "gemma4.expert_count = 128 belongs to the larger Gemma 4"),
        ({}, {"blk.3.ffn_up.weight": None}, "tensor blk.3.ffn_up.weight is missing"),
        (
            {},
            {"blk.3.ffn_up.weight": np.zeros((32, 64), np.float32)},
            "blk.3.ffn_up.weight has shape (32, 64)",
        ),
        (
            {},
            {"output_norm.weight": np.full(64, np.inf, np.float32)},
            "output_norm.weight: has NaN or infinite",
        ),
    ],
)
def test_a_bad_gguf_is_a_one_line_error_and_leaves_nothing(
    fields: dict[str, Any], tensors: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, GEMMA4, Kind.F32, fields, tensors)
    assert_refused(path, said, [])


def test_the_mobile_recipe_is_refused_for_a_gemma_3_checkpoint(tmp_path: Path) -> None:
    folder = copy_fixture(GEMMA3, tmp_path / "model")
    result = CliRunner().invoke(main, [str(folder), "-o", str(tmp_path / "bundle"), "--recipe", "mobile"])
    assert result.exit_code == 1
    assert result.stderr == "Error: --recipe mobile: is for Gemma 4, this is gemma3; choose int4 or int8\n"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
