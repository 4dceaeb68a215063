"""The `edge-convert` command: convert (the default), inspect, evaluate and golden."""

from __future__ import annotations

import difflib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converters.manifest_text import manifest_text
from converters.progress_display import ProgressDisplay
from edge.bundles.bundle import read_manifest
from edge.cli.program import Group, stop_on
from edge.errors import CheckpointError, EdgeError

if TYPE_CHECKING:
    from converters.calibration.text import CalibrationText

DEFAULT_CONTEXT = 4096
RECIPES = ("int8", "int4", "int4-all", "mobile")

_DIRECTORY = click.Path(path_type=Path)
_FILE = click.Path(path_type=Path, dir_okay=False)


def _size(_ctx: click.Context, _option: click.Parameter, value: str | None) -> int | None:
    """Parse 200MB or 1.5GB into bytes."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MG])B", value, re.IGNORECASE)
    if match is None:
        raise click.BadParameter(f"{value!r} is not a size; write it like 200MB or 1.5GB")
    return round(float(match[1]) * {"M": 10**6, "G": 10**9}[match[2].upper()])


def _existing_checkpoint(_ctx: click.Context, _argument: click.Parameter, path: Path) -> Path:
    """Report a path that does not exist before a missing option."""
    if not path.exists():
        from converters.checkpoints.recognition import missing_checkpoint

        raise CheckpointError(missing_checkpoint(path))
    return path


class _Program(Group):
    """A group whose first argument can be a checkpoint instead of a command; `convert` is the default."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command. Raises UsageError for a word that is neither a path nor a command."""
        if args[0] not in self.commands:
            similar = difflib.get_close_matches(args[0], self.commands, n=1)
            if similar and not os.path.lexists(args[0]):
                raise click.UsageError(f"no such command or file: {args[0]}; did you mean {similar[0]}?", ctx)
            args = ["convert", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert `convert` before options that do not belong to this group."""
        if args and args[0].startswith("-") and args[0] not in ("-h", "--help", "--version"):
            args = ["convert", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. A missing package is reported in one line, with what to install."""
        try:
            return super().invoke(ctx)
        except ImportError as error:
            raise click.ClickException(
                f"edge-convert needs packages that are not installed ({error});"
                " run: pip install 'edge-gemma[convert]'"
            ) from error


@click.group(cls=_Program)
def main() -> None:
    """Convert a Gemma checkpoint into a bundle for edge-daemon; inspect and evaluate bundles.

    \b
    Examples:
      edge-convert gemma-3-270m.gguf -o pump-bundle --recipe int4
      edge-convert ~/models/gemma-3-1b-it -o bundle --context 8192
      edge-convert gemma-3-270m.gguf -o small-bundle --recipe int4 --calibrate
      edge-convert inspect bundle
      edge-convert evaluate bundle small-bundle --against gemma-3-270m.gguf
      edge-convert golden bundle

    A checkpoint is a GGUF file or a Hugging Face folder (config.json, safetensors, tokenizer). For the
    options of a conversion, run `edge-convert convert --help`; the word `convert` can be omitted.
    """
    stop_on(signal.SIGTERM)
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        stop_on(signal.SIGHUP)  # the terminal was closed: clean up, as after Ctrl-C


@main.command()
@click.argument("checkpoint", type=_DIRECTORY, callback=_existing_checkpoint)
@click.option("-o", "--output", "target", type=_DIRECTORY, required=True, help="The bundle to write.")
@click.option(
    "--recipe",
    type=click.Choice((*RECIPES, "auto")),
    help="int8: one scale per channel. int4: blocks of 32, the output head in int8. int4-all: the head in"
    " int4 too. mobile: the bit widths of Gemma 4's mobile release. auto: mixed precision within --budget."
    " Default: the recipe that keeps the integers of a quantised checkpoint (mobile for Gemma 4's mobile"
    " release, int4 for Q4_0), otherwise int8.",
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
    help="Calibrate: choose codes by what the matrices compute when the model reads TEXT, a UTF-8 file of at"
    " least 2,044 tokens; without TEXT, a built-in text of sensor requests and prose. The bundle has the same"
    " size and speed, and is much closer to the checkpoint. Takes minutes.",
)
@click.option(
    "--budget",
    metavar="SIZE",
    callback=_size,
    help="With --recipe auto: the maximum size of the bundle, e.g. 200MB. Each matrix gets int2, int4 or"
    " int8, the most sensitive ones the most bits. Implies --calibrate.",
)
@click.option(
    "--context",
    type=click.IntRange(min=16),
    default=DEFAULT_CONTEXT,
    show_default=True,
    help="The maximum number of tokens in a conversation.",
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
    options and version give the same bytes. If anything fails, nothing is left behind.

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

    started = time.monotonic()
    opened = open_checkpoint(checkpoint)
    opened = opened if lora is None else merge_adapter(opened, lora)
    with ProgressDisplay() as display:
        result = run(opened, target, recipe, context, display.show, _calibration_text(calibration), budget)
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
@click.option("--json", "as_json", is_flag=True, help="Print the manifest itself.")
def inspect(bundle: Path, as_json: bool) -> None:
    """Print the contents of BUNDLE: model, formats, files.

    \b
    Example:
      edge-convert inspect bundle
    """
    manifest = read_manifest(bundle)
    click.echo(manifest.to_json() if as_json else manifest_text(bundle, manifest), nl=not as_json)


@main.command()
@click.argument("bundles", type=_DIRECTORY, nargs=-1, required=True, metavar="BUNDLE...")
@click.option("--against", type=_DIRECTORY, required=True, help="The checkpoint that they were made from.")
@click.option("--lora", type=_DIRECTORY, help="The LoRA adapter that was merged into them.")
@click.option(
    "--text",
    type=_FILE,
    help="A UTF-8 text file to run them over; the default is a built-in text of about 4,000 tokens.",
)
@click.option(
    "--picture",
    type=_FILE,
    help="Write an HTML page: a chart of size against fidelity, and a table of all figures.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=os.cpu_count(),
    show_default=True,
    help="Threads that a bundle runs on.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON for each bundle.")
def evaluate(
    bundles: tuple[Path, ...],
    against: Path,
    lora: Path | None,
    text: Path | None,
    picture: Path | None,
    threads: int,
    as_json: bool,
) -> None:
    """Compare each BUNDLE with its checkpoint on a text.

    Runs the bundle and a float32 decoder of the checkpoint. Reports perplexity, KL divergence, agreement on
    the top token, errors of logits and of each layer's keys, and tokens per second on this machine.

    \b
    Examples:
      edge-convert evaluate bundle --against gemma-3-270m.gguf --text field-notes.txt
      edge-convert evaluate int8 int4 --against gemma-3-270m.gguf --picture recipes.html
      edge-convert evaluate tuned --against gemma-3-270m.gguf --lora ~/adapters/pump-faults
    """
    from converters.evaluate import built_in_text, evaluate_bundles
    from converters.picture import picture as page

    with ProgressDisplay() as display:
        reports = evaluate_bundles(
            bundles,
            against,
            built_in_text() if text is None else _read_text(text),
            weight_cache_directory(),
            threads,
            display.show,
            lora,
        )
    for report in reports:
        click.echo(report.to_json() if as_json else str(report))
    if picture is not None:
        _write_text(picture, page(reports, against.name))


@main.command()
@click.argument("bundle", type=_DIRECTORY)
@click.option(
    "--text",
    type=_FILE,
    help="A UTF-8 text of your domain, of which the first 64 tokens are used; the default is"
    " a built-in text.",
)
def golden(bundle: Path, text: Path | None) -> None:
    """Record the reference for the self-test on boards in BUNDLE.

    A board runs a new bundle over the same text and uses it only if the mean loss is within 0.3 of the
    recorded one. This changes the manifest, so run it before signing; an existing signature is removed.

    \b
    Example:
      edge-convert golden bundle --text field-notes.txt
    """
    from converters.evaluate import built_in_text
    from converters.golden import record_golden

    recorded = record_golden(
        bundle, built_in_text() if text is None else _read_text(text), weight_cache_directory()
    )
    click.echo(f"{bundle}: recorded a loss of {recorded.loss:.2f} over {len(recorded.ids)} tokens")


def weight_cache_directory() -> Path:
    """The cache of packed weights on a laptop: $XDG_CACHE_HOME/edge-gemma, or ~/.cache/edge-gemma."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "edge-gemma")


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise EdgeError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise EdgeError(f"{path}: byte {error.start} is not UTF-8; save the text as UTF-8") from None


def _calibration_text(path: str | None) -> CalibrationText | None:
    """The text for --calibrate: None without the option, "" for the built-in one."""
    from converters.calibration.text import CalibrationText

    if path is None:
        return None
    return CalibrationText(path, _read_text(Path(path))) if path else CalibrationText.built_in()


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise EdgeError(f"{path}: can't be written: {error.strerror}") from None


def _peak_memory() -> int:
    """The peak resident size of this process in bytes, file pages included.

    Linux's ru_maxrss can include the memory of the parent process at the fork.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
