"""Token ids in, hidden states or logits out, over one KV cache.

`prefill` only stores K and V of its tokens. `advance` also computes the last token's hidden state, for
`logits` and `logits_for`. `verify` runs a few tokens at once and stores nothing until `commit` gives the
number to keep, so a rejected draft leaves nothing to undo.
Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.bundles.architecture import Architecture, Attention, Rope
from edge.bundles.bundle import Bundle
from edge.errors import RequestError
from edge.runtime.compiled_model import CompiledModel
from edge.runtime.dynamic_quantization import dynamic_int8
from edge.runtime.kv_cache import Floats, KVCache
from edge.runtime.mapped_rows import MappedRows
from edge.runtime.opening import compile_graph
from edge.runtime.prefix_cache import PrefixCache
from edge.runtime.signature import Signature, aligned_array

_ATTENTIONS: tuple[Attention, ...] = ("sliding", "full")

_WORTHWHILE_SHARE = 0.5
"""A wide prefill is faster than several narrow ones if at least this share of its width is used."""


class Decoder:
    """A bundle's graph with a KV cache of at most `context` tokens."""

    def __init__(
        self,
        bundle: Bundle,
        cache_directory: Path,
        threads: int,
        context: int,
        compiled: CompiledModel | None = None,
    ) -> None:
        """`compiled` is the bundle's compiled graph, if there is one already. Raises RuntimeFailure."""
        manifest = bundle.manifest
        self.arch, self.context = manifest.architecture, context
        self.verify_width = manifest.verify_width
        self._prefixes = PrefixCache(cache_directory / "prefixes", bundle.digest)
        self._model = model = compiled or compile_graph(bundle, cache_directory, threads)
        self._tables = _Tables(bundle)
        self._cache = KVCache(self.arch, context)
        runs = {key: self._run_of(model, key) for key in ("decode", "verify")}
        self._decode, self._verify = runs["decode"], runs["verify"]
        self._chunks = {width: self._run_of(model, f"prefill_{width}") for width in manifest.prefill_widths}
        self._every_layer_owns_kv = len(self.arch.owners) == len(self.arch.layers)
        if self._every_layer_owns_kv:
            self._chunks[self.verify_width] = self._verify
        self._head = _Head(model.signatures["head"], self._decode.hidden)
        self._head_verify = _Head(model.signatures["head_verify"], self._verify.hidden)
        self._bind_caches()
        self._pending: Sequence[int] = ()
        self._tokens: list[int] = []

    def close(self) -> None:
        """Free all memory; the decoder can't be used afterwards."""
        self._model.close()

    def check_weights(self) -> bool:
        """Check the next few blocks of the packed weights, if a check is due; False if one is damaged."""
        weights = self._model.weights
        return weights is None or weights.check()

    def discard_cache(self) -> None:
        """Remove the packed weights, which are damaged, and all prefix snapshots from the cache directory."""
        if self._model.weights is not None:
            self._model.weights.remove()
        self._prefixes.clear()

    @property
    def tokens(self) -> Sequence[int]:
        """Ids of the tokens in the KV cache."""
        return self._tokens

    def rewind(self, ids: Sequence[int]) -> int:
        """Truncate the KV cache to the longest prefix of `ids` that it holds; returns its length."""
        common = next((i for i, (a, b) in enumerate(zip(ids, self._tokens, strict=False)) if a != b), None)
        length = min(len(ids), len(self._tokens)) if common is None else common
        if not self._cache.truncate(length):
            self._cache.length = length = 0
        del self._tokens[length:]
        self._pending = ()
        return length

    def recall(self, ids: Sequence[int]) -> int:
        """Load the longest prefix of `ids` in the KV cache or stored by `remember`; return its length."""
        cached = self.rewind(ids)
        found = self._prefixes.restore(ids, self._cache, cached, self._grow)
        if found:
            self._tokens = list(ids[:found])
        return found or cached

    def remember(self) -> None:
        """Store the KV cache for later conversations that start with the same tokens."""
        self._prefixes.store(self._tokens, self._cache)

    def prefill(self, ids: Sequence[int], interrupted: Callable[[], str | None]) -> str | None:
        """Store K and V of `ids`. Calls `interrupted` before each chunk and returns its reason, if any.

        Raises RequestError("too_long") if they do not fit into the context.
        """
        self._reserve(len(ids))
        done = 0
        while done < len(ids):
            reason = interrupted()
            if reason is not None:
                return reason
            run = self._chunks[self._chunk_width(len(ids) - done)]
            part = ids[done : done + run.width]
            self._advance(run, part)
            self._append(run, part)
            done += len(part)
        return None

    def advance(self, ids: Sequence[int], interrupted: Callable[[], str | None]) -> str | None:
        """Run `ids`, at least one; `logits` then gives the logits of the next token.

        Calls `interrupted` before each chunk, as `prefill` does. Raises RequestError("too_long").
        """
        tail = min(len(ids), self.verify_width) if self._every_layer_owns_kv else 1
        reason = self.prefill(ids[:-tail], interrupted) or interrupted()
        if reason is None:
            self._finish(ids[-tail:])
        return reason

    def logits(self) -> Floats:
        """Logits [vocabulary] after the last token run, before the softcap; valid until the next call."""
        return self._head.run().reshape(-1)

    def logits_for(self, ids: NDArray[np.int32]) -> Floats:
        """Logits [len(ids)] of some tokens only, as in `logits`, from only those rows of the head."""
        return self._tables.head_rows(ids, self._decode.hidden[0, 0])

    def verify(self, tokens: Sequence[int]) -> Floats:
        """Logits [len(tokens), vocabulary] after each of at most `verify_width` tokens, before the softcap.

        Nothing is stored until `commit`; the result is valid until the next call.
        """
        self._reserve(len(tokens))
        self._advance(self._verify, tokens)
        self._pending = tuple(tokens)
        return self._head_verify.run()[: len(tokens)]

    def commit(self, count: int) -> None:
        """Store the first `count` tokens of the last `verify`."""
        if count > len(self._pending):
            raise ValueError(f"{count} tokens to commit, {len(self._pending)} were verified")
        self._append(self._verify, self._pending[:count])
        self._pending = ()

    def logits_of(self, ids: Sequence[int]) -> Iterator[Floats]:
        """Logits, softcapped, after every token of a new conversation, in blocks [n, vocabulary]."""
        self.rewind(())
        for start in range(0, len(ids), self.verify_width):
            block = ids[start : start + self.verify_width]
            logits = self.verify(block)
            self.commit(len(block))
            cap = self.arch.logit_softcap
            yield logits if cap is None else cap * np.tanh(logits / cap)

    def keys_of(self, layer: int) -> Floats:
        """The keys in the KV cache of a layer, the latest last: [kv_heads, n, head_dim]."""
        return self._cache.keys_of(layer)

    def _finish(self, ids: Sequence[int]) -> None:
        """Run up to `verify_width` tokens and keep the last one's hidden state."""
        self._reserve(len(ids))
        if len(ids) == 1:
            self._advance(self._decode, ids)
            self._append(self._decode, ids)
        else:
            self._advance(self._verify, ids)
            self._append(self._verify, ids)
            self._decode.hidden[0, 0] = self._verify.hidden[0, len(ids) - 1]

    def _run_of(self, model: CompiledModel, key: str) -> _Run:
        return _Run(model.signatures[key], self.arch)

    def _chunk_width(self, left: int) -> int:
        widths = sorted(self._chunks)
        fitting = [width for width in widths if left >= _WORTHWHILE_SHARE * width]
        return fitting[-1] if fitting else widths[0]

    def _reserve(self, count: int) -> None:
        length = self._cache.length + count
        if length > self.context:
            raise RequestError("too_long", f"{length} tokens do not fit into the context of {self.context}")
        self._grow(length)

    def _grow(self, length: int) -> None:
        if self._cache.reserve(length):
            self._bind_caches()

    def _bind_caches(self) -> None:
        for run in {self._decode, self._verify, *self._chunks.values()}:
            run.bind_cache(self._cache)

    def _append(self, run: _Run, tokens: Sequence[int]) -> None:
        self._cache.append(run.new_keys, run.new_values, len(tokens))
        self._tokens += tokens

    def _advance(self, run: _Run, tokens: Sequence[int]) -> None:
        count = len(tokens)
        run.embeddings[0, :count] = self._tables.embeddings(tokens)
        if run.per_layer is not None:
            run.per_layer[0, :count] = self._tables.per_layer(tokens)
        run.write_positions(self._cache)
        run.signature.run()


class _Tables:
    """Embedding rows, scaled for the graph, and rows of the head."""

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        arch = manifest.architecture
        self._embedding = MappedRows(bundle.directory, manifest.embedding)
        self._head = MappedRows(bundle.directory, manifest.head)
        self._float_head = manifest.head.bits == 32
        self._embedding_scale = np.float32(arch.embedding_scale)
        if manifest.per_layer_embedding is not None:
            self._per_layer = MappedRows(bundle.directory, manifest.per_layer_embedding)
            self._per_layer_scale = np.float32(np.sqrt(arch.per_layer_width))

    def embeddings(self, tokens: Sequence[int]) -> Floats:
        return self._embedding.rows(tokens) * self._embedding_scale

    def head_rows(self, tokens: NDArray[np.int32], hidden: Floats) -> Floats:
        """Logits of `tokens` as the head computes them: its weights' rows times `hidden` [D], in float64.

        XNNPACK multiplies quantised weights by activations that it quantises first.
        """
        rows = self._head.rows(tokens).astype(np.float64)
        if self._float_head:
            return (rows @ hidden).astype(np.float32)
        codes, inverse = dynamic_int8(hidden)
        return (rows @ codes / inverse).astype(np.float32)

    def per_layer(self, tokens: Sequence[int]) -> Floats:
        return self._per_layer.rows(tokens) * self._per_layer_scale


class _Run:
    """One signature of T tokens with its own small inputs and outputs; the caches are shared."""

    def __init__(self, signature: Signature, arch: Architecture) -> None:
        self.signature, self._arch = signature, arch
        self.embeddings = signature.bind_new("embeddings")
        self.width: int = self.embeddings.shape[1]
        self.per_layer = signature.bind_new("per_layer") if "per_layer" in signature.inputs else None
        self._rotary = {
            a: (signature.bind_new(f"cos_{a}"), signature.bind_new(f"sin_{a}"), _frequencies(arch, a))
            for a in _ATTENTIONS
            if f"cos_{a}" in signature.inputs
        }
        self._masks: dict[Attention, Floats] = {}
        outputs = {name: signature.bind_new(name) for name in signature.outputs}
        self.hidden: Floats = outputs.get("hidden", np.empty(0, np.float32))
        self.new_keys = {i: outputs[f"new_key_{i}"] for i in arch.owners}
        self.new_values = {i: outputs[f"new_value_{i}"] for i in arch.owners}

    def bind_cache(self, cache: KVCache) -> None:
        """Bind the cache's arrays, and masks of matching width."""
        for i in self._arch.owners:
            for name, array in ((f"key_{i}", cache.keys[i]), (f"value_{i}", cache.values[i])):
                if name in self.signature.inputs:
                    self.signature.bind(name, array)
        for a in _ATTENTIONS:
            if f"mask_{a}" in self.signature.inputs:
                shape = (1, 1, self.width, cache.rows[a] + self.width)
                if a not in self._masks or self._masks[a].shape != shape:
                    self._masks[a] = aligned_array(shape)
                    self.signature.bind(f"mask_{a}", self._masks[a])

    def write_positions(self, cache: KVCache) -> None:
        """Fill masks and rotary tables for the tokens from `cache.length` on."""
        for attention, mask in self._masks.items():
            cache.write_mask(attention, mask)
        positions = cache.length + np.arange(self.width)
        for cos, sin, frequencies in self._rotary.values():
            angles = positions[:, None] * frequencies
            half = len(frequencies)
            cos[0, :, 0, :half] = cos[0, :, 0, half:] = np.cos(angles)
            sin[0, :, 0, half:] = np.sin(angles)
            np.negative(sin[0, :, 0, half:], out=sin[0, :, 0, :half])


class _Head:
    """The output head, applied to the hidden states of another signature."""

    def __init__(self, signature: Signature, hidden: Floats) -> None:
        self._signature = signature
        signature.bind("hidden", hidden)
        self._logits: Floats = signature.bind_new("logits")

    def run(self) -> Floats:
        self._signature.run()
        return self._logits.reshape(-1, self._logits.shape[-1])


def _frequencies(arch: Architecture, attention: Attention) -> NDArray[np.float64]:
    """Radians per position of each pair of a head: [head_dim / 2]."""
    rope: Rope = arch.rope(attention)
    head_dim = arch.head_dim(attention)
    frequencies = rope.base ** (-2.0 * np.arange(head_dim // 2) / head_dim)
    frequencies[int(rope.rotated_share * head_dim / 2) :] = 0.0
    return frequencies
