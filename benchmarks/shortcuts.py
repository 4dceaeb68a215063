"""How often shortcuts change a greedy answer: the sensor requests answered with all of them, and with none.

    python -m benchmarks.shortcuts [--recipe int4] [--recipe int8] [--requests N]

With float32 weights none does (`tests/generation/test_generation.py`). XNNPACK rounds the activations of
quantised weights to 256 values, so what differs in the last bit before, because another number of tokens was
run together, may differ in the third digit after.
"""

from __future__ import annotations

import tempfile
from itertools import takewhile
from pathlib import Path

import click

from benchmarks import models, workload
from benchmarks.tasks import CONTEXT
from edge.generation.generator import Completion, Generator
from edge.generation.sampling import Sampler, Sampling
from edge.protocol.messages import Request


def with_all(generator: Generator, request: Request) -> str:
    """The answer as users get it."""
    *_, last = generator.generate(request, lambda: None)
    assert isinstance(last, Completion)
    return last.text


def with_none(generator: Generator, request: Request) -> str:
    """The answer with nothing of an earlier prompt, token by token, each from the whole head."""
    decoder = generator.decoder
    grammar = generator.grammars.compile(request)
    assert grammar is not None
    constraint = grammar.constrain(request.max_tokens)
    sampler = Sampler(Sampling(), generator.bundle.manifest.architecture.logit_softcap)
    decoder.rewind(())
    decoder.advance(generator.prompt_of(request), lambda: None)
    tokens: list[int] = []
    while not constraint.complete and constraint.remaining:
        token = constraint.choose(sampler, decoder.logits().copy())
        if token in generator.bundle.manifest.stop_ids:
            break
        constraint.accept(token)
        tokens.append(token)
        decoder.advance([token], lambda: None)
    return generator.tokenizer.decode(tokens)


@click.command()
@click.option("--recipe", "recipes", multiple=True, default=models.RECIPES[models.REAL], show_default=True)
@click.option("--requests", default=len(workload.load()), show_default=True, help="How many of the workload.")
@click.option("--threads", default=2, show_default=True)
def main(recipes: tuple[str, ...], requests: int, threads: int) -> None:
    """Count the requests of the workload whose answer is the same with all shortcuts and with none."""
    for recipe in recipes:
        with tempfile.TemporaryDirectory(prefix="edge-shortcuts-") as cache:
            generator = Generator.open(models.bundle(recipe), Path(cache), threads, CONTEXT)
            same, shared, length = 0, 0, 0
            for done, item in enumerate(workload.load()[:requests]):
                click.echo(f"{recipe}: {same} of {done}", err=True)
                request = item.request(chat=True)
                fast, plain = with_all(generator, request), with_none(generator, request)
                same += fast == plain
                shared += sum(
                    1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(fast, plain, strict=False))
                )
                length += len(plain)
            generator.close()
        click.echo(f"{recipe}: {same} of {requests} answers the same, {shared / length:.0%} of the text")


if __name__ == "__main__":
    main()
