"""Static int8 activation scales beside the dynamic ones of this runtime: how fast, and how exact.

    python -m benchmarks.static_scales [--checkpoint PATH]

The quantised mobile releases of Gemma 4 carry a calibrated int8 scale for every matrix's input and output,
and for every KV cache. The graphs leave them aside: XNNPACK finds a scale for each row while it runs.

Speed: a feed-forward of E2B's size, int4 with a scale a row, in both forms. Static means QUANTIZE, an
int8 FULLY_CONNECTED and DEQUANTIZE; gate and up are then two matrices, since their outputs have scales of
their own. Exactness: the perplexity of a checkpoint in NumPy with float32 weights, so that nothing but the
activations and the KV cache is rounded; static scales are the largest magnitude on the calibration text.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import models
from benchmarks.speed import seconds
from converters.calibration.activations import round_activations
from converters.checkpoints.base import Checkpoint
from converters.checkpoints.opening import open_checkpoint
from converters.evaluate import built_in_text
from converters.fidelity import compare, cut
from converters.quantization import Floats
from converters.reference_decoder import Linear, ReferenceDecoder, Stream, multiply, run_layer
from converters.tflite.graph import Graph, Model, Region, Tensor, Weight
from converters.tflite.schema import schema
from converters.tflite.writer import ModelWriter
from edge.runtime.compiled_model import CompiledModel
from edge.runtime.signature import aligned_array
from edge.text.tokenizer import Tokenizer

HIDDEN, FEED_FORWARD, LAYERS, ROUNDS = 1536, 6144, 8, 30
WIDTHS = (1, 8, 64)
SEQUENCES = 8

KV = tuple[Floats, Floats]
LayerLinear = Callable[[int, str, Floats, Floats], Floats]


class StaticGraph(Graph):
    """A graph whose matrices multiply int8 values of one fixed scale and give such values."""

    def fully_connected(self, x: Tensor, weight: Weight) -> Tensor:
        """`x @ weight.T` between a QUANTIZE and a DEQUANTIZE."""
        quantized = self._int8(self._op("QUANTIZE", [x], x.shape))
        product = self._int8(super().fully_connected(quantized, weight))
        return self._op("DEQUANTIZE", [product], product.shape)

    def _int8(self, tensor: Tensor) -> Tensor:
        described = self._tensors[tensor.index]
        described.type = schema.TensorType.INT8
        described.quantization = schema.QuantizationParametersT()
        described.quantization.scale = np.array([0.05], np.float32)
        described.quantization.zeroPoint = np.zeros(1, np.int64)
        return tensor


def feed_forward(graph: Graph, x: Tensor, layer: int) -> Tensor:
    """One feed-forward with a residual, gate and up together where the graph is dynamic."""
    if isinstance(graph, StaticGraph):
        gate = graph.fully_connected(x, _weight(f"{layer}.gate", FEED_FORWARD, HIDDEN))
        up = graph.fully_connected(x, _weight(f"{layer}.up", FEED_FORWARD, HIDDEN))
    else:
        both = graph.fully_connected(x, _weight(f"{layer}.gate_up", 2 * FEED_FORWARD, HIDDEN))
        gate, up = graph.slice(both, 0, FEED_FORWARD), graph.slice(both, FEED_FORWARD, 2 * FEED_FORWARD)
    down = _weight(f"{layer}.down", HIDDEN, FEED_FORWARD)
    return graph.add(x, graph.fully_connected(graph.mul(graph.gelu(gate), up), down))


def _weight(name: str, rows: int, columns: int) -> Weight:
    return Weight(Region(name, rows * columns // 2), (rows, columns), "int4", name)


def write_model(path: Path, kind: type[Graph]) -> None:
    """A model of `LAYERS` feed-forwards with random int4 weights, one signature a width."""
    model = Model("static scales")
    for width in WIDTHS:
        graph = kind(model, f"width_{width}")
        model._graphs.append(graph)
        x = graph.input("x", (1, width, HIDDEN))
        for layer in range(LAYERS):
            x = feed_forward(graph, x, layer)
        graph.output("y", x)
    outputs = {region.name: HIDDEN if "down" in region.name else FEED_FORWARD for region in model.regions}
    outputs |= {name: 2 * FEED_FORWARD for name in outputs if "gate_up" in name}
    writer, noise = ModelWriter(path, model, outputs), np.random.default_rng(0)
    for region in model.regions:
        writer.write(region.name, noise.bytes(region.size))
        writer.scales(region.name, 0, np.full(outputs[region.name], 1e-3, np.float32))
    writer.finish()
    writer.close()


def speed(threads: int) -> None:
    """Print microseconds of a feed-forward in both forms, measured in turns."""
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, Any] = {}
        for kind in (Graph, StaticGraph):
            path = Path(folder, kind.__name__)
            write_model(path, kind)
            runs[kind.__name__] = CompiledModel(path, kind.__name__, Path(folder), threads).signatures
        for width in WIDTHS:
            both = [_bound(signatures[f"width_{width}"]) for signatures in runs.values()]
            times = [[seconds(run) for run in both] for _ in range(ROUNDS)]
            dynamic, static = (min(column) / LAYERS * 1e6 for column in zip(*times, strict=True))
            ratio = f"{static / dynamic:.2f} of it"
            click.echo(f"{width:3} tokens: dynamic {dynamic:6.0f} us, static {static:6.0f} us, {ratio}")


def _bound(signature: Any) -> Callable[[], None]:
    array = aligned_array(signature.shape("x"))
    array[:] = np.random.default_rng(1).standard_normal(array.shape, np.float32)
    signature.bind("x", array)
    signature.bind_new("y")
    run: Callable[[], None] = signature.run
    return run


class Ranges:
    """The largest magnitude at each matrix's input and output, and of K and V, on some text."""

    def __init__(self) -> None:
        self.inputs: dict[str, float] = defaultdict(float)
        self.outputs: dict[str, float] = defaultdict(float)
        self.caches: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def note_cache(self, layer: int, kv: KV) -> KV:
        """Note the range of K and V [kv_heads, n, head_dim] and leave them as they are."""
        self.caches[layer] = [
            max(float(np.abs(new).max()), old) for new, old in zip(kv, self.caches[layer], strict=True)
        ]
        return kv

    def rounded_cache(self, layer: int, kv: KV) -> KV:
        """K and V as int8 of one scale each."""
        key, value = (_fixed(rows, largest) for rows, largest in zip(kv, self.caches[layer], strict=True))
        return key, value

    def multiply(self, layer: int, name: str, x: Floats, weight: Floats) -> Floats:
        """Compute `x W^T`, noting both."""
        y = x @ weight.T
        key = f"{layer}.{name}"
        self.inputs[key] = max(self.inputs[key], float(np.abs(x).max()))
        self.outputs[key] = max(self.outputs[key], float(np.abs(y).max()))
        return y

    def rounded(self, layer: int, name: str, x: Floats, weight: Floats, *, outputs: bool) -> Floats:
        """Compute `Q_out(W Q_in(x))`, or without Q_out."""
        key = f"{layer}.{name}"
        y = _fixed(x, self.inputs[key]) @ weight.T
        return _fixed(y, self.outputs[key]) if outputs else y


def _fixed(x: Floats, largest: float) -> Floats:
    scale = np.float32(largest / 127)
    rounded: Floats = np.clip(np.rint(x / scale), -128, 127) * scale
    return rounded


def unrounded(_layer: int, name: str, x: Floats, weight: Floats) -> Floats:
    """Compute `W x`."""
    return multiply(name, x, weight)


def dynamic(_layer: int, _name: str, x: Floats, weight: Floats) -> Floats:
    """Compute `W Q(x)`, with a scale for each row."""
    return round_activations(x) @ weight.T


def unchanged(_layer: int, kv: KV) -> KV:
    """K and V in float32."""
    return kv


class Cache(dict[int, KV]):
    """The `kv` of a `Stream` that keeps what `change` makes of K and V."""

    def __init__(self, change: Callable[[int, KV], KV]) -> None:
        super().__init__()
        self._change = change

    def __setitem__(self, layer: int, kv: KV) -> None:
        super().__setitem__(layer, self._change(layer, kv))


def exactness(checkpoint: Checkpoint) -> None:
    """Print the perplexity with each way of rounding."""
    tokenizer = Tokenizer(checkpoint.tokenizer_model)
    calibration = resources.files("converters").joinpath("data/calibration_text.txt").read_text("utf-8")
    seen = cut(tokenizer.encode(calibration), checkpoint.chat.bos_id)[:SEQUENCES]
    chunks = cut(tokenizer.encode(built_in_text()), checkpoint.chat.bos_id)
    ranges = Ranges()
    run(checkpoint, seen, ranges.multiply, ranges.note_cache)
    exact = run(checkpoint, chunks, unrounded, unchanged)
    ways: Mapping[str, tuple[LayerLinear, Callable[[int, KV], KV]]] = {
        "dynamic inputs": (dynamic, unchanged),
        "static inputs": (partial(ranges.rounded, outputs=False), unchanged),
        "static inputs and outputs": (partial(ranges.rounded, outputs=True), unchanged),
        "static K and V": (unrounded, ranges.rounded_cache),
        "all static": (partial(ranges.rounded, outputs=True), ranges.rounded_cache),
    }
    head = ReferenceDecoder(checkpoint).head
    for name, way in ways.items():
        states = map(head, run(checkpoint, chunks, *way))
        (found,) = compare(chunks, map(head, exact), [partial(_following, states)])
        click.echo(f"{name}\n{found}\n")


def _following(logits: Iterator[Floats], _ids: Sequence[int]) -> Iterator[Floats]:
    yield next(logits)


def run(
    checkpoint: Checkpoint,
    chunks: Sequence[Sequence[int]],
    linear: LayerLinear,
    cache: Callable[[int, KV], KV],
) -> list[Floats]:
    """States [n, hidden] after the final norm; `linear` is told the layer too."""
    decoder = ReferenceDecoder(checkpoint)
    streams: list[Stream] = decoder.begin(chunks)
    for stream in streams:
        stream.kv = Cache(cache)
    for index in range(len(checkpoint.architecture.layers)):
        weights = decoder.layer_weights(index)
        of_layer: Linear = partial(linear, index)
        for stream in streams:
            run_layer(checkpoint.architecture, index, weights, stream, of_layer)
    return [decoder.finish(stream) for stream in streams]


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Without it: Gemma 3 270M.")
@click.option("--threads", default=2, show_default=True)
def main(checkpoint: Path | None, threads: int) -> None:
    """Compare static and dynamic int8 activations."""
    speed(threads)
    exactness(open_checkpoint(checkpoint or models.checkpoint()))


if __name__ == "__main__":
    main()
