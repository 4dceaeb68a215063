"""The `edge-convert` command: convert (the default), inspect, evaluate and golden."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge.bundles.bundle import Manifest, read_manifest
from edge.cli.program import Group, stop_on
from edge.errors import EdgeError

if TYPE_CHECKING:
    from converters.calibration.text import CalibrationText

DEFAULT_CONTEXT = 4096
RECIPES = ("int8", "int4", "int4-all", "mobile")

_DIRECTORY = click.Path(path_type=Path)
_FILE = click.Path(path_type=Path, dir_okay=False)


def _size(_ctx: click.Context, _option: click.Parameter, value: str | None) -> int | None:
    """The number of bytes that 200MB or 1.5GB is."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MG])B", value, re.IGNORECASE)
    if match is None:
        raise click.BadParameter(f"{value!r} is not a size; write it like 200MB or 1.5GB")
    return round(float(match[1]) * {"M": 10**6, "G": 10**9}[match[2].upper()])


class _ConvertByDefault(Group):
    """A group whose first argument may be a checkpoint instead of a command."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands:
            args = ["convert", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("-h", "--help", "--version"):
            args = ["convert", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_ConvertByDefault)
def main() -> None:
    """Turn a Gemma checkpoint into a bundle for edge-daemon, and look at bundles.

    \b
    Examples:
      edge-convert gemma-3-270m.gguf -o pump-bundle --recipe int4
      edge-convert ~/models/gemma-3-1b-it -o bundle --context 8192
      edge-convert gemma-3-270m.gguf -o small-bundle --recipe int4 --calibrate
      edge-convert inspect bundle
      edge-convert evaluate bundle small-bundle --against gemma-3-270m.gguf
      edge-convert golden bundle

    A checkpoint is a GGUF file or a Hugging Face folder (config.json, safetensors, tokenizer). Give
    `edge-convert convert --help` for the options of a conversion; the word `convert` may be left out.
    """
    stop_on(signal.SIGTERM)
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        stop_on(signal.SIGHUP)  # the terminal was closed: leave nothing, as with Ctrl-C


@main.command()
@click.argument("checkpoint", type=_DIRECTORY)
@click.option("-o", "--output", "target", type=_DIRECTORY, required=True, help="The bundle to write.")
@click.option(
    "--recipe",
    type=click.Choice((*RECIPES, "auto")),
    help="int8: one scale per channel. int4: blocks of 32, the output head in int8. int4-all: the head in"
    " int4 too. mobile: the bit widths of Gemma 4's mobile release. auto: what --budget allows. Default: the"
    " one that keeps the checkpoint's own integers (mobile for that release, int4 for Q4_0), else int8.",
)
@click.option(
    "--lora", type=_DIRECTORY, help="A folder with a PEFT LoRA adapter, merged before quantisation."
)
@click.option(
    "--calibrate",
    "calibration",
    is_flag=False,
    flag_value="",
    metavar="[TEXT]",
    help="Choose codes by what the matrices multiply when the model reads TEXT, a UTF-8 file of at least"
    " 2,044 tokens; without one, a built-in text of sensor requests and prose. The bundle gets no larger and"
    " no slower, and much closer to the checkpoint. Takes minutes.",
)
@click.option(
    "--budget",
    metavar="SIZE",
    callback=_size,
    help="With --recipe auto: the most that the bundle may take, e.g. 200MB. Each matrix gets int2, int4 or"
    " int8, so that the bytes go where they buy most, and is calibrated in any case.",
)
@click.option(
    "--context",
    type=click.IntRange(min=16),
    default=DEFAULT_CONTEXT,
    show_default=True,
    help="The most tokens that a conversation may have.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one line of JSON.")
def convert(
    checkpoint: Path,
    target: Path,
    recipe: str | None,
    lora: Path | None,
    calibration: str | None,
    budget: int | None,
    context: int,
    as_json: bool,
) -> None:
    """Convert CHECKPOINT into the bundle given by -o.

    Memory stays bounded: tensors are read, quantised and written a slice at a time. The same checkpoint,
    recipe and version give the same bytes. If anything goes wrong, nothing is left behind.

    \b
    Examples:
      edge-convert gemma-3-270m.gguf -o bundle
      edge-convert ~/models/gemma-3-1b-it -o bundle --recipe int4 --context 8192 --calibrate
      edge-convert gemma-3-270m.gguf -o bundle --recipe auto --budget 200MB --calibrate field-notes.txt
      edge-convert ~/models/gemma-4-E2B-it -o bundle --lora ~/adapters/pump-faults
    """
    from converters.checkpoints.opening import open_checkpoint
    from converters.convert import convert as run
    from converters.lora import merge_adapter
    from converters.progress import Progress

    started = time.monotonic()
    opened = open_checkpoint(checkpoint)
    opened = opened if lora is None else merge_adapter(opened, lora)
    with ProgressLine() as line:

        def report(progress: Progress) -> None:
            line.show(progress.done, progress.total, progress.name)

        result = run(opened, target, recipe, context, report, _calibration_text(calibration), budget)
    summary = {
        "bundle": str(target),
        "recipe": result.recipe,
        "bytes": result.bytes,
        "bytes_per_token": result.bytes_per_token,
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_bytes": _peak_memory(),
        "errors": list(result.error_lines),
    }
    if as_json:
        click.echo(json.dumps(summary))
        return
    click.echo("\n".join(result.error_lines))
    click.echo(
        f"{target}: {result.recipe}, {result.bytes / 1e6:,.1f} MB,"
        f" {result.bytes_per_token / 1e6:,.1f} MB read per token;"
        f" {summary['seconds']} s, peak memory {_peak_memory() / 1e6:,.0f} MB"
    )


@main.command()
@click.argument("bundle", type=_DIRECTORY)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as it is.")
def inspect(bundle: Path, as_json: bool) -> None:
    """Print what is in BUNDLE.

    \b
    Example:
      edge-convert inspect bundle
    """
    manifest = read_manifest(bundle)
    click.echo(manifest.to_json() if as_json else _description(bundle, manifest), nl=not as_json)


@main.command()
@click.argument("bundles", type=_DIRECTORY, nargs=-1, required=True, metavar="BUNDLE...")
@click.option("--against", type=_DIRECTORY, required=True, help="The checkpoint that they were made from.")
@click.option(
    "--text",
    type=_FILE,
    help="A UTF-8 text file to run them over; without it, a built-in one of about 4,000 tokens.",
)
@click.option(
    "--picture", type=_FILE, help="An HTML page to write: size against fidelity, and all figures in a table."
)
@click.option("--threads", type=click.IntRange(min=1), default=os.cpu_count(), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON for each bundle.")
def evaluate(
    bundles: tuple[Path, ...],
    against: Path,
    text: Path | None,
    picture: Path | None,
    threads: int,
    as_json: bool,
) -> None:
    """Run each BUNDLE and a float32 decoder of their checkpoint over a text, and report how they differ.

    Perplexity, KL divergence, agreement on the top token, error of logits and of each layer's keys, and
    tokens per second on this machine.

    \b
    Examples:
      edge-convert evaluate bundle --against gemma-3-270m.gguf --text field-notes.txt
      edge-convert evaluate int8 int4 --against gemma-3-270m.gguf --picture recipes.html
    """
    from converters.evaluate import built_in_text, evaluate_bundles
    from converters.picture import picture as page

    with ProgressLine() as line:
        reports = evaluate_bundles(
            bundles,
            against,
            built_in_text() if text is None else _read_text(text),
            weight_cache_directory(),
            threads,
            lambda done, total: line.show(done, total, "tokens"),
        )
    for report in reports:
        click.echo(report.to_json() if as_json else str(report))
    if picture is not None:
        _write_text(picture, page(reports, against.name))


@main.command()
@click.argument("bundle", type=_DIRECTORY)
@click.option(
    "--text",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A UTF-8 text of your field; its first 64 tokens count. Without it, a built-in one.",
)
def golden(bundle: Path, text: Path | None) -> None:
    """Record in BUNDLE what it makes of a short text, for the self-test of every board that it comes to.

    A board runs a new bundle over the same text, and uses it only if the mean loss is what it was here, to
    0.3. The manifest changes, so this comes before the signature; one that is there is removed.

    \b
    Example:
      edge-convert golden bundle --text field-notes.txt
    """
    from converters.evaluate import built_in_text
    from converters.golden import record_golden

    found = record_golden(
        bundle, built_in_text() if text is None else _read_text(text), weight_cache_directory()
    )
    click.echo(f"{bundle}: a loss of {found.loss:.2f} over {len(found.ids)} tokens is recorded")


def weight_cache_directory() -> Path:
    """Where packed weights of bundles that are run on a laptop are kept: $XDG_CACHE_HOME/edge-gemma."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "edge-gemma")


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise EdgeError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise EdgeError(f"{path}: byte {error.start} is not UTF-8; save the text as UTF-8") from None


def _calibration_text(asked: str | None) -> CalibrationText | None:
    """The text that --calibrate asks for, the built-in one if it names no file."""
    from converters.calibration.text import CalibrationText

    if asked is None:
        return None
    return CalibrationText(asked, _read_text(Path(asked))) if asked else CalibrationText.built_in()


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise EdgeError(f"{path}: can't be written: {error.strerror}") from None


def _peak_memory() -> int:
    """Most resident bytes that this process has had, file pages included.

    Linux's ru_maxrss would count what the parent had when it started us.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _description(bundle: Path, manifest: Manifest) -> str:
    arch = manifest.architecture
    full = sum(layer.attention == "full" for layer in arch.layers)
    lines = [
        f"{bundle}: {arch.family}, recipe {manifest.recipe}, context {manifest.context}, "
        f"made by {manifest.made_by}",
        f"  from {manifest.source['name']}; licence: {manifest.licence}",
        f"  {len(arch.layers)} layers ({full} full, the others of window {arch.sliding_window}), "
        f"hidden {arch.hidden}, {arch.query_heads} query and {arch.kv_heads} KV heads, "
        f"vocabulary {arch.vocabulary:,}",
        f"  prompt format {manifest.prompt_format}, begin {manifest.bos_id}, stop {list(manifest.stop_ids)}",
        f"  {manifest.quantization['bytes_per_token'] / 1e6:,.1f} MB of weights read per token",
    ]
    lines += [f"    {group:<28} {kind}" for group, kind in manifest.quantization["groups"].items()]
    if choice := manifest.quantization.get("choice"):
        lines.append(f"  chosen for at most {choice['budget'] / 1e6:,.1f} MB, in these layers:")
        lines += _choice_lines(choice["formats"])
    if notes := manifest.quantization.get("calibration"):
        lines.append(
            f"  calibrated on {notes['text']}, {notes['tokens']:,} tokens;"
            f" inputs made kinder at {notes['folds']} places"
        )
        lines += [
            f"    {group:<28} output error {error:.2%}" for group, error in notes["output_errors"].items()
        ]
    lines += [f"  {entry.size:>13,} bytes  {entry.sha256[:16]}  {n}" for n, entry in manifest.files.items()]
    return "\n".join(lines)


def _choice_lines(formats: Mapping[str, str]) -> list[str]:
    """For each group of matrices, the layers that each format was chosen for."""
    groups: dict[str, dict[str, list[int]]] = {}
    for name, kind in formats.items():
        *layer, group = name.removeprefix("layers.").split(".")
        groups.setdefault(group, {}).setdefault(kind, []).extend(map(int, layer))
    return [
        f"    {group:<28} " + "; ".join(f"{kind}{_in_layers(layers)}" for kind, layers in kinds.items())
        for group, kinds in groups.items()
    ]


def _in_layers(layers: list[int]) -> str:
    """Like " in 0-3, 7"; nothing for a matrix that is in no layer."""
    if not layers:
        return ""
    runs = [[layer, layer] for layer in sorted(layers)]
    for before, after in pairwise(list(runs)):
        if after[0] == before[1] + 1:
            after[0] = before[0]
            runs.remove(before)
    return " in " + ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


class ProgressLine:
    """One line on a terminal that is written over; silent where standard error is not a terminal.

    At the end of a `with` it is removed, so that an error does not stand behind it.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._shown = 0.0
        self._show: Callable[[str], None] = self._write if sys.stderr.isatty() else lambda _text: None

    def show(self, done: int, total: int, name: str) -> None:
        """Show the share done, what is in hand, and how long it may still take."""
        now = time.monotonic()
        if now - self._shown < 0.1 and done < total:
            return
        self._shown = now
        left = (now - self._started) * (total - done) / max(done, 1)
        self._show(f"{done / max(total, 1):4.0%}  {left:4.0f} s left  {name}")

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_error: object) -> None:
        self._show("")

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


if __name__ == "__main__":
    main()
