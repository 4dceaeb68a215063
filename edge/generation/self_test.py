"""Whether a bundle works on this board: what it makes of a short text, against what was recorded of it.

The recorded value is the mean negative log-likelihood of the text's tokens. It is not the answer to a prompt:
XNNPACK rounds activations to 8 bits, and an Arm rounds some of them differently than an x86, so where two
tokens are nearly as likely the answers part. The loss moves by hundredths of a nat then: 0.01 for the 270M in
int8, 0.04 in int4. A wrong kernel, a damaged table or another model move it by whole ones.

A short greedy answer follows, which goes through everything else: the prompt's format, the caches, the head.
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
    """The ids that a recording of `text` is over: `<bos>` and the first of the text."""
    return (bos_id, *tokenizer.encode(text))[: min(MOST_TOKENS, context)]


def mean_loss(decoder: Decoder, ids: Sequence[int]) -> float:
    """Mean negative log-likelihood of all `ids` but the first, in nats; not finite if a logit is not."""
    following, total = list(ids[1:]), 0.0
    for block in decoder.logits_of(ids[:-1]):
        for logits in block:
            largest = float(logits.max())
            total += largest - float(logits[following.pop(0)])
            total += math.log(float(np.exp(logits - largest).sum(dtype=np.float64)))
    decoder.rewind(())
    return total / (len(ids) - 1)


def record(generator: Generator, text: str) -> Golden:
    """Record what a bundle makes of `text`.

    Raises EdgeError if that is too short, BundleError if the result is not finite.
    """
    manifest = generator.bundle.manifest
    ids = golden_ids(generator.tokenizer, manifest.bos_id, text, generator.context)
    if len(ids) < FEWEST_TOKENS:
        raise EdgeError(f"the text has {len(ids)} tokens, {FEWEST_TOKENS} are needed; give a longer one")
    loss = mean_loss(generator.decoder, ids)
    if not math.isfinite(loss):
        raise BundleError(f"{generator.bundle.directory}: its logits are not finite; convert it again")
    return Golden(text, ids, round(loss, 2))


def self_test(generator: Generator) -> None:
    """Raise BundleError if the bundle does not do what was recorded of it, or does not answer."""
    bundle = generator.bundle
    golden = bundle.manifest.golden
    if golden is not None and len(golden.ids) <= generator.context:
        _compare(generator, golden)
    with contextlib.suppress(RequestError):  # a context that is too short for any question is no fault
        for _ in generator.generate(_QUESTION, lambda: None):
            pass


def _compare(generator: Generator, golden: Golden) -> None:
    bundle = generator.bundle
    ids = golden_ids(generator.tokenizer, bundle.manifest.bos_id, golden.text, len(golden.ids))
    if ids != golden.ids:
        raise BundleError(
            f"{bundle.directory}: the self-test's text has other tokens here than where it was recorded"
        )
    loss = mean_loss(generator.decoder, ids)
    if not abs(loss - golden.loss) <= TOLERANCE:  # also if it is not a number
        raise BundleError(
            f"{bundle.directory}: the self-test failed: the loss over its text is {loss:.2f},"
            f" recorded were {golden.loss:.2f}"
        )
