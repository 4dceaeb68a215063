"""Checks that a bundle works on this board: its loss over a short text must match the recorded loss.

The loss is the mean negative log-likelihood of the text's tokens. A recorded answer would not do: XNNPACK
rounds activations to 8 bits, and an Arm rounds some of them differently from an x86, so answers diverge where
two tokens are almost equally likely. The loss differs by only hundredths of a nat then: 0.01 for the 270M in
int8, 0.04 in int4. A wrong kernel, a damaged table or another model changes it by whole nats.

Then a short greedy answer is generated, which uses everything else: prompt format, caches, head.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import numpy as np

from edge.bundles.bundle import Golden
from edge.errors import BundleError, EdgeError, RequestError
from edge.generation.generator import Generator
from edge.protocol.messages import Request
from edge.runtime.decoder import Decoder
from edge.text.tokenizer import Tokenizer

FEWEST_TOKENS, MOST_TOKENS = 16, 64
TOLERANCE = 0.3
"""Nats. The 270M in int8 and in int4 are 0.4 apart."""

_QUESTION = Request("self-test", prompt="1", max_tokens=4, stream=False)


def golden_ids(tokenizer: Tokenizer, bos_id: int, text: str, context: int) -> tuple[int, ...]:
    """Return the ids that the loss over `text` is computed on: `<bos>` and the first ids of the text."""
    return (bos_id, *tokenizer.encode(text))[: min(MOST_TOKENS, context)]


def mean_loss(decoder: Decoder, ids: Sequence[int]) -> float:
    """Return the mean negative log-likelihood of all `ids` but the first, in nats.

    It is not finite if a logit is not.
    """
    following, total = list(ids[1:]), 0.0
    for block in decoder.logits_of(ids[:-1]):
        for logits in block:
            largest = float(logits.max())
            total += largest - float(logits[following.pop(0)])
            total += math.log(float(np.exp(logits - largest).sum(dtype=np.float64)))
    decoder.rewind(())
    return total / (len(ids) - 1)


def record(generator: Generator, text: str) -> Golden:
    """Record a bundle's loss over `text`.

    Raises EdgeError if the text is too short, BundleError if the loss is not finite.
    """
    manifest = generator.bundle.manifest
    ids = golden_ids(generator.tokenizer, manifest.bos_id, text, generator.context)
    if len(ids) < FEWEST_TOKENS:
        raise EdgeError(f"the text has {len(ids)} tokens, but {FEWEST_TOKENS} are needed; use a longer text")
    loss = mean_loss(generator.decoder, ids)
    if not math.isfinite(loss):
        raise BundleError(
            f"{generator.bundle.directory}: the logits are not finite; convert the bundle again"
        )
    return Golden(text, ids, round(loss, 2))


def self_test(generator: Generator) -> None:
    """Raise BundleError if the bundle's loss differs from the recorded loss, or if it does not answer."""
    bundle = generator.bundle
    golden = bundle.manifest.golden
    if golden is not None and len(golden.ids) <= generator.context:
        _compare(generator, golden)
    with contextlib.suppress(RequestError):  # a context that is too short for the question is not a fault
        for _ in generator.generate(_QUESTION, lambda: None):
            pass


def _compare(generator: Generator, golden: Golden) -> None:
    bundle = generator.bundle
    ids = golden_ids(generator.tokenizer, bundle.manifest.bos_id, golden.text, len(golden.ids))
    if ids != golden.ids:
        raise BundleError(
            f"{bundle.directory}: the self-test's text has other token ids than recorded; convert it again"
        )
    loss = mean_loss(generator.decoder, ids)
    if not abs(loss - golden.loss) <= TOLERANCE:  # also if it is NaN
        raise BundleError(
            f"{bundle.directory}: the self-test failed: the loss over its text is {loss:.2f},"
            f" but {golden.loss:.2f} was recorded; install the bundle again"
        )
