"""The workload is valid for a daemon, the gate names regressions, and random models can be run."""

import json
from collections import Counter
from pathlib import Path

import click
import numpy as np
import pytest

from benchmarks import gate, random_gguf, workload
from benchmarks.results import MACHINE, Results, spread, table
from converters.checkpoints.base import Checkpoint
from converters.checkpoints.opening import open_checkpoint
from converters.convert import convert
from converters.reference_decoder import ReferenceDecoder
from edge.bundles.bundle import read_manifest
from edge.generation.answer_format import AnswerFormat
from edge.generation.grammar import GrammarCompiler
from edge.protocol.messages import parse_request
from tests.support import bundles, real_vocabulary
from tests.support.checkpoint_files import FIXTURES, GEMMA4, write_gguf


def test_workload_covers_every_domain_with_every_type_of_answer() -> None:
    requests = workload.load()
    assert len(requests) >= 40
    assert len({request.id for request in requests}) == len(requests)
    by_domain = {request.domain: set[str]() for request in requests}
    for request in requests:
        by_domain[request.domain].add(request.kind)
    assert all(
        by_domain[domain] == set(workload.KINDS)
        for domain in ("pumps", "freezers", "greenhouses", "batteries", "weather")
    )


def test_system_prompts_are_few_and_some_have_about_a_thousand_tokens() -> None:
    tokenizer = real_vocabulary.tokenizer("gemma3")
    systems = Counter(request.system for request in workload.load())
    lengths = [len(tokenizer.encode(system)) for system in systems]
    assert len(systems) <= 6
    assert sum(700 <= length <= 1000 for length in lengths) >= 2


@pytest.mark.parametrize("chat", [False, True])
def test_every_request_is_accepted_by_a_daemon(chat: bool) -> None:
    for item in workload.load():
        request = item.request(chat)
        assert parse_request(request.to_json()) == request
        assert bool(request.messages) == chat


def test_every_schema_compiles_to_a_grammar() -> None:
    compiler = GrammarCompiler(real_vocabulary.tokenizer("gemma3"), (1,))
    for item in workload.load():
        answer_format = AnswerFormat.of(item.request(chat=False))
        assert answer_format is not None
        grammar = compiler.compile(answer_format)
        assert grammar.constrain(workload.MAX_TOKENS).completion() is not None


def run(decode: float = 80.0, ready: float = 0.5, peer: float | None = 70.0) -> Results:
    """A run of three rounds; one engine of ours, and perhaps a peer."""
    results = Results(facts={"edge int4": {"bits": 4, "ours": True}, "peer": {"bits": 4}})
    for noise in (0.9, 1.0, 1.1):
        results.add(MACHINE, "interpreter", 0.1 * noise)
        results.add("edge int4", "decode", decode * noise)
        results.add("edge int4", "bound", 100.0 * noise)
        results.add("edge int4", "ready", ready * noise)
        if peer is not None:
            results.add("peer", "decode", peer * noise)
    return results


@pytest.fixture
def baseline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A separate path for the baseline of a test."""
    path = tmp_path / "baseline.json"
    monkeypatch.setattr(gate, "BASELINE", path)
    return path


@pytest.mark.usefixtures("baseline")
def test_gate_passes_equal_or_better_results() -> None:
    gate.save(run())
    assert gate.check(run()) == []
    assert gate.check(run(decode=95, ready=0.4)) == []


@pytest.mark.usefixtures("baseline")
def test_gate_names_only_what_became_slower() -> None:
    gate.save(run())
    (line,) = gate.check(run(ready=0.9))
    assert "edge int4" in line
    assert "start to ready" in line
    assert "worse by 44%" in line


@pytest.mark.usefixtures("baseline")
def test_gate_detects_a_slower_step_relative_to_the_bound_and_to_the_peer() -> None:
    gate.save(run())
    assert len(gate.check(run(decode=50))) == 2
    assert len(gate.check(run(decode=50, peer=None))) == 1


@pytest.mark.usefixtures("baseline")
def test_gate_ignores_a_machine_that_is_slower_overall() -> None:
    gate.save(run())
    slow = run()
    for values in slow.values.values():
        for key, measured in values.items():
            values[key] = [value * (2 if key in ("interpreter", "ready") else 0.5) for value in measured]
    assert gate.check(slow) == []


def test_gate_without_a_baseline_explains_how_to_make_one(baseline: Path) -> None:
    with pytest.raises(click.ClickException, match="--save"):
        gate.check(run())
    assert not baseline.exists()


def test_table_has_medians_spreads_and_the_ratio_to_the_peer() -> None:
    text = table(run())
    assert "| 80 ±5%" in text
    assert "| 1.14 ±0%" in text
    assert spread([1.0, 2.0, 3.0]) == 0.25
    assert spread([2.0, 2.0, 2.0, 2.0, 9.0]) == 0
    assert spread([0.0, 0.0, 4.0]) == 0


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A random GGUF file with the dimensions of the small Gemma 4."""
    folder = tmp_path_factory.mktemp("random")
    write_gguf(folder / "vocabulary.gguf")
    config = json.loads((FIXTURES / GEMMA4 / "config.json").read_text())["text_config"]
    random_gguf.write_gguf(folder / "model.gguf", config, folder / "vocabulary.gguf")
    return open_checkpoint(folder / "model.gguf")


def test_a_random_gguf_has_the_requested_architecture(random_model: Checkpoint) -> None:
    assert random_model.architecture == open_checkpoint(FIXTURES / GEMMA4).architecture
    embedding = random_model.tensors["embedding"]
    assert embedding.source_type == "Q8_0"
    assert 0.9 < embedding.array().std() * embedding.shape[1] ** 0.5 < 1.1


def test_a_bundle_of_a_random_gguf_has_its_codes_and_agrees_with_its_values(
    random_model: Checkpoint, tmp_path: Path
) -> None:
    convert(random_model, tmp_path / "bundle", "int4", 128)
    quantization = read_manifest(tmp_path / "bundle").quantization
    matrices = [tensor for tensor in random_model.tensors.values() if tensor.source_type == "Q4_0"]
    assert quantization["stored_groups"] == sum(tensor.array().size for tensor in matrices) // 32
    assert quantization["kept_groups"] == quantization["stored_groups"]
    ids = [2, 17, 333, 5, 480, 9, 64, 71]
    expected = ReferenceDecoder(random_model).logits(ids)
    decoder = bundles.open_decoder(tmp_path / "bundle")
    logits = np.concatenate([block.copy() for block in decoder.logits_of(ids)])
    assert np.sqrt(np.mean(np.square(logits - expected))) < 0.2 * expected.std()
    assert len(set(expected.argmax(axis=1))) > 4  # otherwise any two models would agree
