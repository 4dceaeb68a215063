"""Describes a TFLite model: subgraphs with a signature each, small constants, and weights stored outside.

A weight is a `Region`: a name and a byte count. This module does not handle its bytes; `writer` appends
them to the file and passes their positions to `Model.pack`. Every subgraph that names a region shares it.
Shapes are checked only where the builder needs them; LiteRT checks the rest when it loads the file.
Schema: schema.fbs of TensorFlow Lite, through the classes that `converters.tflite.schema` loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flatbuffers
import numpy as np
from numpy.typing import NDArray

from converters.tflite.schema import schema

DYNAMIC = -1
"""A dimension that the runtime sets by the buffer it binds."""

_TYPES = {"float32": 0, "float16": 1, "int32": 2, "int8": 9, "int4": 17, "int2": 19}


@dataclass(frozen=True)
class Region:
    """Bytes outside the flatbuffer, shared by all subgraphs that name it."""

    name: str
    size: int


@dataclass(frozen=True)
class Tensor:
    """A value in one subgraph: its index there and its shape, `DYNAMIC` where it is not fixed."""

    index: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """A constant matrix [out, in] for FULLY_CONNECTED.

    `type` is float32, int8, int4 or int2. Quantised weights have either per-channel scales, which are
    written into the flatbuffer and found by `scales_key`, or (`block` > 0) blockwise scales in a region
    of float16 [out, in / block].
    """

    codes: Region
    shape: tuple[int, int]
    type: str
    scales_key: str = ""
    block: int = 0
    block_scales: Region | None = None


class _Quantization(schema.QuantizationParametersT):  # type: ignore[misc]  # generated without types
    """Quantisation parameters that all subgraphs share: written into a flatbuffer once."""

    def __init__(self) -> None:
        super().__init__()
        self._written: tuple[Any, int] | None = None

    def Pack(self, builder: Any) -> int:  # noqa: N802 - the generated class's name
        if self._written is None or self._written[0] is not builder:
            self._written = builder, super().Pack(builder)
        return self._written[1]


@dataclass
class _Signature:
    key: str
    inputs: list[tuple[str, int]] = field(default_factory=list)
    outputs: list[tuple[str, int]] = field(default_factory=list)


class Model:
    """Collects subgraphs; `pack` makes the flatbuffer."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._buffers: list[Region | bytes] = [b""]
        self._buffer_of: dict[Region | bytes, int] = {}
        self._opcodes: dict[int, int] = {}
        self._quantizations: dict[str, _Quantization] = {}
        self._graphs: list[Graph] = []

    def graph(self, key: str) -> Graph:
        """A new, empty subgraph that runs as signature `key`."""
        graph = Graph(self, key)
        self._graphs.append(graph)
        return graph

    @property
    def regions(self) -> list[Region]:
        """Every region named so far, in the order of first use."""
        return [item for item in self._buffers if isinstance(item, Region)]

    def buffer(self, content: Region | bytes) -> int:
        """Index of the buffer that holds `content`; equal contents share one."""
        if content not in self._buffer_of:
            self._buffer_of[content] = len(self._buffers)
            self._buffers.append(content)
        return self._buffer_of[content]

    def per_channel(self, key: str, channels: int) -> _Quantization:
        """Quantisation parameters whose scales `pack` gets under `key`; zero points are 0."""
        if key not in self._quantizations:
            self._quantizations[key] = _Quantization()
            self._quantizations[key].zeroPoint = np.zeros(channels, np.int64)
        return self._quantizations[key]

    def opcode(self, builtin: int) -> int:
        """Index of a builtin operator's code."""
        return self._opcodes.setdefault(builtin, len(self._opcodes))

    def pack(self, offsets: Mapping[str, int], scales: Mapping[str, NDArray[np.float32]]) -> bytes:
        """The flatbuffer, its length independent of the values in `offsets` and `scales`.

        `offsets` gives each region's absolute position in the file (it must not be 0), `scales` the
        per-channel scales, float32 [out], of every weight by its `scales_key`.
        """
        for key, quantization in self._quantizations.items():
            quantization.scale = scales[key]
        model = schema.ModelT()
        model.version = 3
        model.description = self._description
        model.operatorCodes = [_operator_code(builtin) for builtin in self._opcodes]
        model.buffers = [_buffer(item, offsets) for item in self._buffers]
        model.subgraphs = [graph.to_schema() for graph in self._graphs]
        model.signatureDefs = [_signature(graph.signature, i) for i, graph in enumerate(self._graphs)]
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


def _operator_code(builtin: int) -> Any:
    code = schema.OperatorCodeT()
    code.builtinCode = builtin
    code.deprecatedBuiltinCode = min(builtin, 127)
    code.version = 1
    return code


def _buffer(item: Region | bytes, offsets: Mapping[str, int]) -> Any:
    buffer = schema.BufferT()
    if isinstance(item, Region):
        buffer.offset, buffer.size = offsets[item.name], item.size
    elif item:
        buffer.data = np.frombuffer(item, np.uint8)
    return buffer


def _signature(signature: _Signature, subgraph: int) -> Any:
    definition = schema.SignatureDefT()
    definition.signatureKey = signature.key
    definition.subgraphIndex = subgraph
    definition.inputs = [_tensor_map(*pair) for pair in signature.inputs]
    definition.outputs = [_tensor_map(*pair) for pair in signature.outputs]
    return definition


def _tensor_map(name: str, index: int) -> Any:
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = name, index
    return entry


class Graph:
    """One subgraph. Each operator method adds a node and returns its output; all values are float32."""

    def __init__(self, model: Model, key: str) -> None:
        self.signature = _Signature(key)
        self._model = model
        self._tensors: list[Any] = []
        self._operators: list[Any] = []
        self._shared: dict[Any, Tensor] = {}

    def input(self, name: str, shape: Sequence[int]) -> Tensor:
        """A signature input. A `DYNAMIC` dimension takes its size from the bound buffer."""
        tensor = self._tensor(tuple(shape), name=f"{self.signature.key}_{name}")
        self.signature.inputs.append((name, tensor.index))
        return tensor

    def output(self, name: str, tensor: Tensor) -> None:
        """Make `tensor` a signature output."""
        self.signature.outputs.append((name, tensor.index))

    def constant(self, array: NDArray[Any]) -> Tensor:
        """A small constant inside the flatbuffer (float32 or int32)."""
        key = (array.tobytes(), array.shape, array.dtype.name)
        if key not in self._shared:
            buffer = self._model.buffer(array.tobytes())
            self._shared[key] = self._tensor(array.shape, array.dtype.name, buffer)
        return self._shared[key]

    def scalar(self, value: float) -> Tensor:
        """A float32 constant of shape [1]."""
        return self.constant(np.array([value], np.float32))

    def fully_connected(self, x: Tensor, weight: Weight) -> Tensor:
        """`x @ weight.T`: [..., in] -> [..., out]."""
        options = schema.FullyConnectedOptionsT()
        options.keepNumDims = True
        inputs = [x, self._weight(weight)]
        shape = (*x.shape[:-1], weight.shape[0])
        return self._op("FULLY_CONNECTED", inputs, shape, "FullyConnectedOptions", options, extra_input=-1)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """Elementwise sum, broadcasting."""
        return self._op("ADD", [a, b], _broadcast(a, b), "AddOptions", schema.AddOptionsT())

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        """Elementwise product, broadcasting."""
        return self._op("MUL", [a, b], _broadcast(a, b), "MulOptions", schema.MulOptionsT())

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the last axis, which is kept with size 1."""
        options = schema.ReducerOptionsT()
        options.keepDims = True
        axis = self.constant(np.array([len(x.shape) - 1], np.int32))
        return self._op("MEAN", [x, axis], (*x.shape[:-1], 1), "ReducerOptions", options)

    def rsqrt(self, x: Tensor) -> Tensor:
        """1 / sqrt(x)."""
        return self._op("RSQRT", [x], x.shape)

    def tanh(self, x: Tensor) -> Tensor:
        """tanh(x)."""
        return self._op("TANH", [x], x.shape)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU in its tanh approximation."""
        options = schema.GeluOptionsT()
        options.approximate = True
        return self._op("GELU", [x], x.shape, "GeluOptions", options)

    def softmax(self, x: Tensor) -> Tensor:
        """Softmax over the last axis."""
        options = schema.SoftmaxOptionsT()
        options.beta = 1.0
        return self._op("SOFTMAX", [x], x.shape, "SoftmaxOptions", options)

    def matmul(self, a: Tensor, b: Tensor, *, transpose_b: bool = False) -> Tensor:
        """Batched `a @ b`, or `a @ b^T` over the last two axes."""
        options = schema.BatchMatMulOptionsT()
        options.adjY = transpose_b
        shape = (*a.shape[:-1], b.shape[-2] if transpose_b else b.shape[-1])
        return self._op("BATCH_MATMUL", [a, b], shape, "BatchMatMulOptions", options)

    def concat(self, parts: Sequence[Tensor]) -> Tensor:
        """Concatenation along the last axis."""
        options = schema.ConcatenationOptionsT()
        options.axis = len(parts[0].shape) - 1
        last = [part.shape[-1] for part in parts]
        shape = (*parts[0].shape[:-1], DYNAMIC if DYNAMIC in last else sum(last))
        return self._op("CONCATENATION", list(parts), shape, "ConcatenationOptions", options)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """The same values as `shape`; one dimension may be `DYNAMIC`. A no-op adds no node."""
        if tuple(shape) == x.shape:
            return x
        options = schema.ReshapeOptionsT()
        options.newShape = list(shape)
        target = self.constant(np.array(shape, np.int32))
        return self._op("RESHAPE", [x, target], tuple(shape), "ReshapeOptions", options)

    def transpose(self, x: Tensor, order: Sequence[int]) -> Tensor:
        """Axes permuted."""
        shape = tuple(x.shape[axis] for axis in order)
        inputs = [x, self.constant(np.array(order, np.int32))]
        return self._op("TRANSPOSE", inputs, shape, "TransposeOptions", schema.TransposeOptionsT())

    def slice(self, x: Tensor, start: int, stop: int | None, axis: int = -1) -> Tensor:
        """`x[start:stop]` along one axis; negative indices count from the end, also of a dynamic axis."""
        rank = len(x.shape)
        axis %= rank
        size, others = x.shape[axis], ((1 << rank) - 1) & ~(1 << axis)
        options = schema.StridedSliceOptionsT()
        options.beginMask = others
        options.endMask = others | ((1 << axis) if stop is None else 0)
        begin, end = np.zeros(rank, np.int32), np.zeros(rank, np.int32)
        begin[axis], end[axis] = start, 0 if stop is None else stop
        width = DYNAMIC if size == DYNAMIC else len(range(*slice(start, stop).indices(size)))
        if size == DYNAMIC and start < 0 and stop is None:
            width = -start
        inputs = [x, *map(self.constant, (begin, end, np.ones(rank, np.int32)))]
        shape = (*x.shape[:axis], width, *x.shape[axis + 1 :])
        return self._op("STRIDED_SLICE", inputs, shape, "StridedSliceOptions", options)

    def to_schema(self) -> Any:
        """This subgraph in the schema's object API."""
        graph = schema.SubGraphT()
        graph.name = self.signature.key
        graph.tensors, graph.operators = self._tensors, self._operators
        graph.inputs = [index for _, index in self.signature.inputs]
        graph.outputs = [index for _, index in self.signature.outputs]
        return graph

    def _tensor(
        self, shape: Sequence[int], dtype: str = "float32", buffer: int = 0, name: str = ""
    ) -> Tensor:
        tensor = schema.TensorT()
        tensor.shape = [1 if size == DYNAMIC else size for size in shape]
        if DYNAMIC in shape:
            tensor.shapeSignature = list(shape)
        tensor.type, tensor.buffer = _TYPES[dtype], buffer
        tensor.name = name or f"t{len(self._tensors)}"
        self._tensors.append(tensor)
        return Tensor(len(self._tensors) - 1, tuple(shape))

    def _weight(self, weight: Weight) -> Tensor:
        if weight not in self._shared:
            tensor = self._tensor(
                weight.shape, weight.type, self._model.buffer(weight.codes), weight.codes.name
            )
            if weight.type != "float32":
                self._tensors[tensor.index].quantization = self._quantization(weight)
            self._shared[weight] = tensor
        return self._shared[weight]

    def _quantization(self, weight: Weight) -> Any:
        if weight.block_scales is None:
            return self._model.per_channel(weight.scales_key, weight.shape[0])
        quantization = schema.QuantizationParametersT()
        shape = (weight.shape[0], weight.shape[1] // weight.block)
        buffer = self._model.buffer(weight.block_scales)
        details = schema.BlockwiseQuantizationT()
        details.scales = self._tensor(shape, "float16", buffer, weight.block_scales.name).index
        details.zeroPoints, details.blockSize = -1, weight.block
        quantization.detailsType = schema.QuantizationDetails.BlockwiseQuantization
        quantization.details = details
        return quantization

    def _op(
        self,
        builtin: str,
        inputs: Sequence[Tensor],
        shape: Sequence[int],
        options_type: str = "",
        options: Any = None,
        extra_input: int | None = None,
    ) -> Tensor:
        output = self._tensor(shape)
        operator = schema.OperatorT()
        operator.opcodeIndex = self._model.opcode(getattr(schema.BuiltinOperator, builtin))
        operator.inputs = [tensor.index for tensor in inputs] + ([] if extra_input is None else [extra_input])
        operator.outputs = [output.index]
        if options is not None:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, options_type)
            operator.builtinOptions = options
        self._operators.append(operator)
        return output


def _broadcast(a: Tensor, b: Tensor) -> tuple[int, ...]:
    rank = max(len(a.shape), len(b.shape))
    left = (1,) * (rank - len(a.shape)) + a.shape
    right = (1,) * (rank - len(b.shape)) + b.shape
    return tuple(y if x == 1 else x for x, y in zip(left, right, strict=True))
