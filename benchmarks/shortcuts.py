"""How often shortcuts change a greedy answer: the sensor requests answered with all of them, and with none.

    python -m benchmarks.shortcuts [--recipe int4] [--recipe int8] [--requests N]

With float32 weights no answer changes (`tests/generation/test_generation.py`). With quantised weights XNNPACK
rounds activations to 256 values. A different number of tokens in a pass can change the last bit of an
activation, and rounding can turn that into a difference in the third digit.
"""

from __future__ import annotations

import tempfile
from itertools import takewhile
from pathlib import Path

import click

from benchmarks import models, workload
from benchmarks.tasks import CONTEXT
from edge.generation.answer_format import AnswerFormat
from edge.generation.generator import Completion, Generator
from edge.generation.grammar import GrammarCompiler
from edge.generation.sampling import Sampler, Sampling
from edge.generation.token_choice import choose, take
from edge.protocol.messages import Request


def with_all(generator: Generator, request: Request) -> str:
    """The answer as users get it."""
    *_, last = generator.generate(request, lambda: None)
    assert isinstance(last, Completion)
    return last.text


def with_none(generator: Generator, compiler: GrammarCompiler, request: Request) -> str:
    """The answer with nothing of an earlier prompt, token by token, each from the whole head."""
    decoder = generator.decoder
    answer_format = AnswerFormat.of(request)
    assert answer_format is not None
    constraint = compiler.compile(answer_format).constrain(request.max_tokens)
    sampler = Sampler(Sampling(), generator.bundle.manifest.architecture.logit_softcap)
    decoder.rewind(())
    decoder.advance(generator.prompt_of(request), lambda: None)
    tokens: list[int] = []
    while not constraint.complete and constraint.remaining:
        forced = constraint.forced()
        if forced:
            token: int | None = take(constraint, forced[0], follow=False).token
        else:
            token = choose(constraint, sampler, decoder.logits(), follow=False).token
        if token is None or token in generator.bundle.manifest.stop_ids:
            break
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
            compiler = GrammarCompiler(generator.tokenizer, generator.bundle.manifest.stop_ids)
            same, shared, length = 0, 0, 0
            for done, item in enumerate(workload.load()[:requests]):
                click.echo(f"{recipe}: {same} of {done}", err=True)
                request = item.request(chat=True)
                fast, plain = with_all(generator, request), with_none(generator, compiler, request)
                same += fast == plain
                shared += sum(
                    1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(fast, plain, strict=False))
                )
                length += len(plain)
            generator.close()
        click.echo(f"{recipe}: {same} of {requests} answers the same, {shared / length:.0%} of the text")


if __name__ == "__main__":
    main()
