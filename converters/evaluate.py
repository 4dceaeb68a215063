"""Runs bundles and their checkpoint over a text and reports how they differ.

The text is cut into chunks of 512 tokens that each start with `<bos>`; `converters.fidelity` compares the
logits. A layer's error is that of the keys that it stores, relative to their norm; it shows the error that
earlier layers caused in the residual stream. Layers that share another layer's keys have no error of their
own.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from converters.checkpoints.base import Checkpoint
from converters.checkpoints.opening import open_checkpoint
from converters.fidelity import CHUNK, Fidelity, compare, cut
from converters.lora import merge_adapter
from converters.merged_adapter import ADAPTER_WEIGHTS, MergedAdapter, merged_adapter
from converters.progress import ReportProgress, ignore_progress
from converters.reference_decoder import Floats, ReferenceDecoder
from edge.bundles.bundle import TOKENIZER, Bundle, file_digest
from edge.errors import BundleError
from edge.runtime.decoder import Decoder
from edge.text.tokenizer import Tokenizer

_TIMED_STEPS = 32

_TOGETHER = 16 * CHUNK
"""Tokens in one run of the checkpoint: 0.3 GB with the 270M, 0.6 GB with E2B."""


@dataclass(frozen=True)
class Report:
    """The measurements of one bundle; `bytes` is the size of its files.

    `layer_errors` is the relative error of each layer's keys by the layer's index, `tokens_per_second` the
    decode speed on this machine. `adapter_note` says how the adapters of bundle and checkpoint differ; "" if
    they are the same.
    """

    name: str
    recipe: str
    bytes: int
    fidelity: Fidelity
    layer_errors: Mapping[int, float]
    tokens_per_second: float
    adapter_note: str = ""

    def to_json(self) -> str:
        """One line of JSON with the fields of this class and of its fidelity, side by side."""
        fields = asdict(self)
        return json.dumps(fields | fields.pop("fidelity"))

    def __str__(self) -> str:
        """A few lines for a person."""
        errors = " ".join(f"{100 * error:.1f}" for error in self.layer_errors.values())
        return (
            f"{self.name}: {self.recipe}, {self.bytes / 1e6:,.1f} MB\n{self.fidelity}\n"
            f"  layers' keys   {errors} % off\n"
            f"  decode         {self.tokens_per_second:.1f} tokens/s on this machine"
            + (f"\n  adapter        {self.adapter_note}" if self.adapter_note else "")
        )


def built_in_text() -> str:
    """The default text: English prose about field work, 4,039 Gemma tokens."""
    return resources.files("converters").joinpath("data/verification_text.txt").read_text("utf-8")


def evaluate_bundles(
    directories: Sequence[Path],
    checkpoint_path: Path,
    text: str,
    cache_directory: Path,
    threads: int,
    report: ReportProgress = ignore_progress,
    lora: Path | None = None,
) -> list[Report]:
    """Run bundles and their checkpoint over `text`; LiteRT's packed weights are kept in `cache_directory`.

    With `lora`, that adapter is merged into the checkpoint. The checkpoint runs once for all bundles, and
    chunks are no longer than the shortest context. Raises BundleError, CheckpointError or RuntimeFailure if
    something can't be read or run, BundleError for a bundle of another model, and EdgeError if the text is
    too short for a perplexity.
    """
    checkpoint = open_checkpoint(checkpoint_path)
    adapter = None
    if lora is not None:
        checkpoint = merge_adapter(checkpoint, lora)
        adapter = MergedAdapter(Path(os.path.abspath(lora)).name, file_digest(lora / ADAPTER_WEIGHTS))
    bundles = [_opened(directory, checkpoint, cache_directory) for directory in directories]
    length = min(CHUNK, *(bundle.manifest.context for bundle in bundles))
    tokenizer = Tokenizer(bundles[0].path(TOKENIZER).read_bytes())
    chunks = cut(tokenizer.encode(text), bundles[0].manifest.bos_id, length)
    reference = _Reference(ReferenceDecoder(checkpoint))
    candidates = [
        _Candidate(Decoder(bundle, cache_directory, threads, length), reference) for bundle in bundles
    ]
    logits = reference.logits_of(chunks)
    measured = compare(chunks, logits, [candidate.logits_of for candidate in candidates], report)
    return [
        Report(
            name=bundle.directory.name,
            recipe=bundle.manifest.recipe,
            bytes=sum(entry.size for entry in bundle.manifest.files.values()),
            fidelity=fidelity,
            layer_errors=candidate.layer_errors(),
            tokens_per_second=_decode_speed(candidate.decoder, chunks[0]),
            adapter_note=_adapter_note(merged_adapter(bundle.manifest), adapter),
        )
        for bundle, candidate, fidelity in zip(bundles, candidates, measured, strict=True)
    ]


def _opened(directory: Path, checkpoint: Checkpoint, cache_directory: Path) -> Bundle:
    bundle = Bundle.open(directory, cache_directory)
    if bundle.manifest.architecture != checkpoint.architecture:
        raise BundleError(
            f"{directory}: its dimensions are not those of {checkpoint.path};"
            " name the checkpoint that it was made from"
        )
    return bundle


def _adapter_note(of_bundle: MergedAdapter | None, applied: MergedAdapter | None) -> str:
    """The difference between the adapters of a bundle and its checkpoint; "" if they are the same."""
    if of_bundle is None:
        return "" if applied is None else f"--lora {applied} is not merged into this bundle; leave it out"
    if applied is None:
        return f"{of_bundle} is merged into the bundle but not into the checkpoint; give --lora FOLDER"
    if of_bundle.sha256 != applied.sha256:
        return f"{of_bundle} is merged into the bundle, another one into the checkpoint: {applied}"
    return ""


class _AllLayers(dict[int, tuple[Floats, Floats]]):
    """A stream's K and V by layer; unlike others, they are kept after their last use."""

    def __delitem__(self, _layer: int) -> None:
        pass


class _Reference:
    """The checkpoint, run over a few chunks at a time, since each run reads all weights.

    `keys` are those of the current chunk, [kv_heads, n, head_dim], by the layers that own them.
    """

    def __init__(self, decoder: ReferenceDecoder) -> None:
        self.decoder = decoder
        self.keys: Mapping[int, Floats] = {}

    def logits_of(self, chunks: Sequence[Sequence[int]]) -> Iterator[Floats]:
        """The logits of each chunk, [n, vocabulary]."""
        step = max(1, _TOGETHER // len(chunks[0]))
        for start in range(0, len(chunks), step):
            streams = self.decoder.begin(chunks[start : start + step])
            for stream in streams:
                stream.kv = _AllLayers()
            self.decoder.run(streams)
            for stream in streams:
                self.keys = {layer: stream.kv[layer][0] for layer in self.decoder.arch.owners}
                yield self.decoder.head(self.decoder.finish(stream))


class _Candidate:
    """A bundle's decoder, and the error of its keys."""

    def __init__(self, decoder: Decoder, reference: _Reference) -> None:
        self.decoder = decoder
        self._reference = reference
        self._errors = dict.fromkeys(reference.decoder.arch.owners, 0.0)
        self._energy = dict(self._errors)

    def logits_of(self, ids: Sequence[int]) -> Iterator[Floats]:
        """Logits of the reference's current chunk, see `Decoder.logits_of`."""
        yield from self.decoder.logits_of(ids)
        for layer, keys in self._reference.keys.items():
            own = self.decoder.keys_of(layer)
            expected = keys[:, -own.shape[1] :]
            self._errors[layer] += float(np.square(own - expected).sum(dtype=np.float64))
            self._energy[layer] += float(np.square(expected).sum(dtype=np.float64))

    def layer_errors(self) -> dict[int, float]:
        """Root-mean-square error of each layer's keys over all chunks, relative to their norm."""
        return {layer: math.sqrt(error / self._energy[layer]) for layer, error in self._errors.items()}


def _decode_speed(decoder: Decoder, ids: Sequence[int]) -> float:
    """Tokens per second, head included, of the median decode step after the first half of `ids`."""
    half = len(ids) // 2
    decoder.rewind(())
    decoder.advance(ids[:half], lambda: None)
    seconds = []
    for token in ids[half : half + _TIMED_STEPS]:
        started = time.perf_counter()
        decoder.advance([token], lambda: None)
        decoder.logits()
        seconds.append(time.perf_counter() - started)
    return 1 / statistics.median(seconds)
