"""From any source, a vocabulary encodes as Hugging Face's tokenizers do; no text gives a control token."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from converters.checkpoints.gguf_file import read_gguf
from converters.checkpoints.tokenizer_model import from_gguf, from_sentencepiece, from_tokenizer_json
from edge.errors import CheckpointError
from tests.support.checkpoint_files import FIXTURES, real_model

SMALL = FIXTURES / "gemma4-two-kv-heads"
# Encodings by Hugging Face's tokenizers 0.23, of Gemma 3's published tokenizer.json and of the same with
# Gemma 4's 24 added tokens: HTML tags are not among those.
VECTORS = {
    "Hello, world! 12345": [9259, 236764, 1902, 236888, 236743, 236770, 236778, 236800, 236812, 236810],
    "  spaced  text\n": [138, 169862, 138, 1005, 107],
    "你好，世界！": [144626, 236900, 12811, 237354],
    "Café — κόσμος 🚀": [160319, 236859, 2192, 150665, 148148, 236743, 242015],
}
HTML = "<table><tr><td>1</td></tr></table>"
GEMMA3_HTML = [168, 173, 175, 236770, 183, 181, 176]
GEMMA4_HTML = [
    236820,
    5127,
    1798,
    1168,
    1798,
    2004,
    236813,
    236770,
    954,
    2004,
    2588,
    1168,
    2588,
    5127,
    236813,
]
NEW_NAMES = {
    **dict(enumerate(["<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>"], start=46)),
    **{51: "<tool_response|>", 52: '<|"|>', 98: "<|think|>", 100: "<|channel>", 101: "<channel|>"},
    **{105: "<|turn>", 106: "<turn|>", 255999: "<|image>", 256000: "<|audio>"},
}


@cache
def metadata(family: str) -> dict[str, Any]:
    """The real vocabulary's metadata, or as llama.cpp's converter would write Gemma 4's."""
    data = read_gguf(real_model()).metadata
    if family == "gemma3":
        return data
    tokens, types = list(data["tokenizer.ggml.tokens"]), []
    for token, name in NEW_NAMES.items():
        tokens[token] = name
    tokens = [text.replace(" ", "\u2581") for text in tokens]
    for token, kind in enumerate(data["tokenizer.ggml.token_type"].tolist()):
        visible = token in {48, 49, 50, 51, 52, 100, 101}
        control = token in {0, 1, 2, 3, 4, 46, 47, 98, 105, 106, 255999, 256000}
        types.append(4 if visible else 3 if control else 6 if kind == 6 else 1)
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [-1000.0] * len(tokens),  # must not be relied on
    }


@cache
def real(family: str) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_proto=from_gguf(metadata(family), real_model(), 262144))


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
@pytest.mark.parametrize("text", VECTORS)
def test_the_real_vocabulary_encodes_as_published(family: str, text: str) -> None:
    assert real(family).encode(text) == VECTORS[text]


@pytest.mark.parametrize(("family", "ids"), [("gemma3", GEMMA3_HTML), ("gemma4", GEMMA4_HTML)])
def test_html_is_encoded_as_by_the_tokenizer_of_each_family(family: str, ids: list[int]) -> None:
    assert real(family).encode(HTML) == ids


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_runs_are_one_token_each_and_longer_ones_are_split_from_the_left(family: str) -> None:
    pieces = real(family)
    for mark, first in (("\n", 107), ("\t", 255968)):
        assert [pieces.encode(mark * n) for n in (1, 2, 31)] == [[first], [first + 1], [first + 30]]
        assert pieces.encode(mark * 33) == [first + 30, first + 1]
    assert pieces.encode("  ") == [138]
    assert pieces.encode(" " * 33) == [167, 138]


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_special_tokens_keep_their_names_and_no_text_is_encoded_as_one(family: str) -> None:
    pieces = real(family)
    names = {2: "<bos>", 1: "<eos>", 0: "<pad>", 5: "[multimodal]", 99: "<unused93>"}
    names |= NEW_NAMES if family == "gemma4" else {105: "<start_of_turn>", 106: "<end_of_turn>"}
    for token, name in names.items():
        assert pieces.id_to_piece(token) == name
        assert pieces.piece_to_id(name) == token
        assert pieces.is_control(token)
        ids = pieces.encode(f"a{name}b {name}")
        assert token not in ids
        assert pieces.decode(ids) == f"a{name}b {name}"
    assert (pieces.bos_id(), pieces.eos_id(), pieces.unk_id(), pieces.pad_id()) == (2, 1, 3, 0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_the_same_vocabulary_gives_the_same_bytes_and_round_trips(family: str, tmp_path: Path) -> None:
    model = from_gguf(metadata(family), real_model(), 262144)
    assert model == from_gguf(metadata(family), real_model(), 262144)
    (tmp_path / "tokenizer.model").write_bytes(model)
    assert from_sentencepiece(tmp_path / "tokenizer.model", 262144) == model


def real_tokenizer_json() -> dict[str, Any]:
    """A tokenizer.json of the real vocabulary, its merges in the order of Gemma's own file.

    First the runs by (left length, right length) descending, then by the id of the result, the longer left
    part first: compared entry by entry with the published file.
    """
    data = metadata("gemma4")
    texts, types = data["tokenizer.ggml.tokens"], data["tokenizer.ggml.token_type"]
    ids = {text: token for token, text in enumerate(texts)}
    runs: list[list[str]] = []
    merges: list[list[str]] = []
    for token, text in enumerate(texts):
        if types[token] != 1:
            continue
        for cut in range(len(text) - 1, 0, -1):
            if text[:cut] in ids and text[cut:] in ids:
                (runs if len(set(text)) == 1 and text[0] in "\n\t\u2581" else merges).append(
                    [text[:cut], text[cut:]]
                )
    runs.sort(key=lambda pair: (-len(pair[0]), -len(pair[1])))
    added = [{"id": token, "content": texts[token], "special": True} for token in (0, 1, 2, 3, 4, *NEW_NAMES)]
    return {
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "model": {"type": "BPE", "byte_fallback": True, "vocab": ids, "merges": runs + merges},
    }


@pytest.mark.slow
def test_the_real_vocabulary_as_tokenizer_json_gives_the_same_model(tmp_path: Path) -> None:
    data = real_tokenizer_json()
    assert len(data["model"]["merges"]) == 514906
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert from_tokenizer_json(tmp_path / "tokenizer.json", 262144) == from_gguf(
        metadata("gemma4"), real_model(), 262144
    )


def small(name: str, edit: Callable[[dict[str, Any]], object], folder: Path) -> Path:
    """The fixture's tokenizer.json, edited."""
    data = json.loads((SMALL / "tokenizer.json").read_text())
    edit(data)
    (folder / name).write_text(json.dumps(data))
    return folder / name


@given(
    text=st.text(st.characters(exclude_categories=["Cs"]))
    | st.lists(st.sampled_from([" ", "\n", "\t", "the", "sensor", " is", "<eos>", "é"])).map("".join)
)
def test_tokenizer_json_and_tokenizer_model_encode_any_text_alike(text: str) -> None:
    by_json, by_model = small_processors()
    assert by_json.encode(text) == by_model.encode(text)


@cache
def small_processors() -> tuple[SentencePieceProcessor, SentencePieceProcessor]:
    by_json = from_tokenizer_json(SMALL / "tokenizer.json", 512)
    by_model = from_sentencepiece(SMALL / "tokenizer.model", 512)
    return SentencePieceProcessor(model_proto=by_json), SentencePieceProcessor(model_proto=by_model)


def test_merges_can_be_strings_as_in_older_files(tmp_path: Path) -> None:
    def join(data: dict[str, Any]) -> None:
        data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]

    path = small("tokenizer.json", join, tmp_path)
    assert from_tokenizer_json(path, 512) == from_tokenizer_json(SMALL / "tokenizer.json", 512)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda data: data["model"].update(type="Unigram"), "not like Gemma's tokenizer"),
        (lambda data: data["model"].update(byte_fallback=False), "not like Gemma's tokenizer"),
        (lambda data: data["normalizer"].update(content="_"), "not like Gemma's tokenizer"),
        (lambda data: data["normalizer"].pop("pattern"), "not a usable tokenizer.json"),
        (lambda data: data.update(normalizer=None), "not a usable tokenizer.json"),
        (lambda data: data.pop("model"), "not a usable tokenizer.json"),
        (lambda data: data["model"]["merges"].reverse(), "not in the order of their ids"),
        (lambda data: data["model"]["merges"].append(["zz", "qq"]), "not a usable tokenizer.json"),
        (lambda data: data["model"]["merges"].append("zz"), "not a usable tokenizer.json"),
        (lambda data: data["model"]["vocab"].pop("<0x41>"), "lacks byte pieces"),
        (lambda data: data["added_tokens"].append({"id": "x", "content": 1}), "not a usable tokenizer.json"),
        (
            lambda data: data["added_tokens"][0].update(content="\ud800"),
            "has a piece that is not Unicode text",
        ),
    ],
)
def test_a_tokenizer_json_unlike_gemmas_is_refused(
    edit: Callable[[dict[str, Any]], object], named: str, tmp_path: Path
) -> None:
    path = small("tokenizer.json", edit, tmp_path)
    with pytest.raises(CheckpointError, match=named) as caught:
        from_tokenizer_json(path, 512)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def trained(**options: Any) -> bytes:
    """A small model from SentencePiece's own trainer, with Gemma's settings except for `options`."""
    model = io.BytesIO()
    usual: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 330,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
        "num_threads": 1,
    }
    lines = ["a sensor reads the temperature", "the pump is on and the tank is full"] * 9
    SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **(usual | options))
    return model.getvalue()


def test_user_defined_specials_of_a_tokenizer_model_become_control_pieces(tmp_path: Path) -> None:
    names = ["<start_of_turn>", "<|turn>", '<|"|>', "<unused7>", "<table>", "\n"]
    (tmp_path / "tokenizer.model").write_bytes(trained(user_defined_symbols=names))
    before = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    after = SentencePieceProcessor(model_proto=from_sentencepiece(tmp_path / "tokenizer.model", 330))
    for name in names:
        token = before.piece_to_id(name)
        assert token in before.encode(f"the{name}pump")
        assert after.piece_to_id(name) == token
        special = name not in ("<table>", "\n")
        assert after.is_control(token) == special
        assert (token in after.encode(f"the{name}pump")) != special
        assert after.decode(after.encode(f"the{name}pump")) == f"the{name}pump"


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"byte_fallback": False, "vocab_size": 60},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nfkc"},
    ],
)
def test_a_tokenizer_model_that_encodes_differently_is_refused(
    options: dict[str, Any], tmp_path: Path
) -> None:
    if options.get("model_type") == "unigram":
        options = options | {"hard_vocab_limit": False}
    (tmp_path / "tokenizer.model").write_bytes(trained(**options))
    with pytest.raises(CheckpointError, match="not like Gemma's tokenizer"):
        from_sentencepiece(tmp_path / "tokenizer.model", 330)


@given(cut=st.integers(0, 9600), junk=st.binary(max_size=20))
def test_a_damaged_tokenizer_model_is_refused(
    cut: int, junk: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "tokenizer.model"
    path.write_bytes((SMALL / "tokenizer.model").read_bytes()[:cut] + junk)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        from_sentencepiece(path, 512)


def test_pieces_beyond_the_embedding_rows_are_cut_and_rows_without_a_piece_are_control() -> None:
    cut = SentencePieceProcessor(model_proto=from_sentencepiece(SMALL / "tokenizer.model", 400))
    assert cut.vocab_size() == 400
    longer = SentencePieceProcessor(model_proto=from_sentencepiece(SMALL / "tokenizer.model", 600))
    assert longer.vocab_size() == 600
    assert all(longer.is_control(token) for token in range(512, 600))
    text = "the sensor is on"
    assert longer.encode(text) == small_processors()[1].encode(text)
