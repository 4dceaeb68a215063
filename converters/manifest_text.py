"""A bundle's manifest as text for a person."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from converters.merged_adapter import merged_adapter
from edge.bundles.bundle import Manifest


def manifest_text(bundle: Path, manifest: Manifest) -> str:
    """Several lines: the model, its source, formats, calibration and files. MB are 10^6 bytes."""
    arch, quantization = manifest.architecture, manifest.quantization
    full = sum(layer.attention == "full" for layer in arch.layers)
    lines = [
        f"{bundle}: {arch.family}, recipe {manifest.recipe}, context {manifest.context},"
        f" made by {manifest.made_by}",
        f"  from {manifest.source['name']}; licence: {manifest.licence}",
    ]
    if adapter := merged_adapter(manifest):
        lines.append(f"  LoRA adapter {adapter} merged, SHA-256 {adapter.sha256[:16]}")
    lines += [
        f"  {len(arch.layers)} layers: {full} with full attention, the others with a window of"
        f" {arch.sliding_window}",
        f"  hidden {arch.hidden}, {arch.query_heads} query and {arch.kv_heads} KV heads,"
        f" vocabulary {arch.vocabulary:,}",
        f"  prompt format {manifest.prompt_format}, begin {manifest.bos_id}, stop {list(manifest.stop_ids)}",
        f"  {quantization['bytes_per_token'] / 1e6:,.1f} MB of weights read per token",
    ]
    lines += [f"    {group:<28} {format}" for group, format in quantization["groups"].items()]
    if choice := quantization.get("choice"):
        lines.append(f"  formats chosen to fit {choice['budget'] / 1e6:,.1f} MB:")
        lines += _choice_lines(choice["formats"])
    if calibration := quantization.get("calibration"):
        lines.append(
            f"  calibrated on {calibration['text']}, {calibration['tokens']:,} tokens;"
            f" activations smoothed at {calibration['folds']} points"
        )
        errors = calibration["output_errors"].items()
        lines += [f"    {group:<28} output error {error:.2%}" for group, error in errors]
    lines += [
        f"  {entry.size / 1e6:>11,.3f} MB  {entry.sha256[:16]}  {n}" for n, entry in manifest.files.items()
    ]
    lines.append(f"  {sum(entry.size for entry in manifest.files.values()) / 1e6:>11,.3f} MB in all")
    return "\n".join(lines)


def _choice_lines(formats: Mapping[str, str]) -> list[str]:
    """For each group of matrices, the layers in which each format was chosen."""
    groups: dict[str, dict[str, list[int]]] = {}
    for name, format in formats.items():
        *layer, group = name.removeprefix("layers.").split(".")
        groups.setdefault(group, {}).setdefault(format, []).extend(map(int, layer))
    return [
        f"    {group:<28} " + "; ".join(f"{format}{_in_layers(layers)}" for format, layers in chosen.items())
        for group, chosen in groups.items()
    ]


def _in_layers(layers: list[int]) -> str:
    """Like " in 0-3, 7"; empty for a matrix outside the layers."""
    if not layers:
        return ""
    runs = [[layer, layer] for layer in sorted(layers)]
    for before, after in pairwise(list(runs)):
        if after[0] == before[1] + 1:
            after[0] = before[0]
            runs.remove(before)
    return " in " + ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)
