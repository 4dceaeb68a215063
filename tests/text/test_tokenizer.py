"""The tokenizer on the real vocabulary, against published encodings and against itself."""

from __future__ import annotations

import tracemalloc
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from converters.evaluate import built_in_text
from edge.errors import BundleError, RequestError
from edge.text.tokenizer import TextStream, Tokenizer
from edge.text.vocabulary import Vocabulary, flatten
from tests.support import real_vocabulary

VECTORS = {
    "Hello, world! 12345": [9259, 236764, 1902, 236888, 236743, 236770, 236778, 236800, 236812, 236810],
    "  spaced  text\n": [138, 169862, 138, 1005, 107],
    "你好，世界！": [144626, 236900, 12811, 237354],
    "Café — κόσμος 🚀": [160319, 236859, 2192, 150665, 148148, 236743, 242015],
}
CONTROL_NAMES = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<unused3>", "<pad>", "<unk>"]

any_text = st.text(st.characters(exclude_categories=["Cs"]))
tricky_text = st.lists(
    st.sampled_from([" ", "\n", "\t", "\u2581", "\0", "a", "</", "<0x41>", "é", "👩‍👩‍👧", *CONTROL_NAMES])
).map("".join)


@pytest.fixture(scope="module")
def gemma3() -> Tokenizer:
    return real_vocabulary.tokenizer("gemma3")


@pytest.mark.parametrize("text", VECTORS)
def test_encodes_as_published(gemma3: Tokenizer, text: str) -> None:
    assert gemma3.encode(text) == VECTORS[text]


def test_gemma4_control_tokens_have_the_published_ids_and_are_never_matched_in_text() -> None:
    text = "<|channel>thought\nplan<channel|><|tool_call>call:f{}<tool_call|>"
    with_specials = real_vocabulary.tokenizer("gemma4", specials_as_text=True)
    assert with_specials.encode(text) == [100, 45518, 107, 15081, 101, 48, 6639, 236787, 236760, 16454, 49]
    plain = real_vocabulary.tokenizer("gemma4")
    assert not any(plain.is_control(token) for token in plain.encode(text))
    assert plain.decode(plain.encode(text)) == text
    assert plain.control_id("<|tool_call>") == 48
    assert plain.control_id('<|"|>') == 52


@given(text=any_text | tricky_text)
def test_any_text_round_trips_without_control_tokens(text: str) -> None:
    gemma3 = real_vocabulary.tokenizer("gemma3")
    ids = gemma3.encode(text)
    assert gemma3.decode(ids) == text
    assert not any(gemma3.is_control(token) for token in ids)
    assert gemma3.vocabulary_size > max(ids, default=0)


pieces_of_text = st.lists(
    st.sampled_from(
        [
            "pump",
            " pressure",
            " 9.4",
            "bar",
            "\n\n",
            "  ",
            " " * 40,
            "\t",
            "<td>",
            "</td>",
            "</b",
            ">",
            "> </",
            "不能",
            "的",
        ]
    )
    | st.text("aeimnrst", max_size=8)
    | st.text(max_size=3)
).map("".join)


@cache
def published(family: str) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_proto=real_vocabulary.model(family))


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
@given(text=any_text | tricky_text | pieces_of_text)
def test_encodes_and_decodes_as_sentencepiece_does(family: str, text: str) -> None:
    text = text.replace("\u2581", "").encode(errors="ignore").decode()
    ids = published(family).encode(text)
    assert real_vocabulary.tokenizer(family).encode(text) == ids
    assert real_vocabulary.tokenizer(family).decode(ids) == text


def test_long_texts_are_encoded_as_sentencepiece_does() -> None:
    for text in (built_in_text(), "x" * 5000, "不能的" * 1000, "aGVsbG8gd29ybGQ" * 200):
        assert real_vocabulary.tokenizer("gemma3").encode(text) == published("gemma3").encode(text)


def test_a_cached_word_takes_few_bytes_and_a_long_word_is_not_cached() -> None:
    tokenizer = real_vocabulary.tokenizer("gemma3")
    worst = [" " + chr(0x10000 + number) * 15 for number in range(200)]  # four byte pieces a character
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for word in worst:
        tokenizer.encode(word)
        tokenizer.encode(word * 2)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 1500 * len(worst)  # the dictionary of the cache included


def test_every_piece_is_found_by_its_text_and_decodes_as_in_sentencepiece() -> None:
    model = real_vocabulary.model("gemma3")
    vocabulary, pieces = Vocabulary(flatten(model)), published("gemma3")
    assert vocabulary.size == pieces.vocab_size()
    for token in range(0, vocabulary.size, 7):
        assert vocabulary.text(token).decode() == pieces.id_to_piece(token)
        assert vocabulary.find(vocabulary.text(token)) == token
    assert vocabulary.find(b"no such piece") == -1


def test_a_vocabulary_is_compiled_once_and_then_mapped(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(real_vocabulary.model("gemma3"))
    first = Tokenizer.open(tmp_path / "tokenizer.model", "d1" * 32, tmp_path)
    [kept] = tmp_path.glob("*.vocabulary")
    (tmp_path / "tokenizer.model").unlink()
    again = Tokenizer.open(tmp_path / "tokenizer.model", "d1" * 32, tmp_path)
    assert again.encode("pump 7: 3 bar") == first.encode("pump 7: 3 bar")
    kept.write_bytes(kept.read_bytes()[:-1])
    (tmp_path / "tokenizer.model").write_bytes(real_vocabulary.model("gemma3"))
    repaired = Tokenizer.open(tmp_path / "tokenizer.model", "d1" * 32, tmp_path)
    assert repaired.encode("pump 7: 3 bar") == first.encode("pump 7: 3 bar")


def test_a_vocabulary_works_without_a_cache_directory(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(real_vocabulary.model("gemma3"))
    (tmp_path / "file").touch()
    tokenizer = Tokenizer.open(tmp_path / "tokenizer.model", "d1" * 32, tmp_path / "file")
    assert tokenizer.decode(tokenizer.encode("pump 7")) == "pump 7"


def test_every_piece_has_bytes_or_is_a_control_token(gemma3: Tokenizer) -> None:
    empty = [token for token in range(gemma3.vocabulary_size) if not gemma3.piece_bytes(token)]
    assert all(gemma3.is_control(token) or token == 3 for token in empty)
    assert gemma3.piece_bytes(238 + 0xE2) == b"\xe2"
    assert gemma3.piece_bytes(138) == b"  "
    assert gemma3.piece_bytes(105) == b""
    assert list(gemma3.all_piece_bytes()) == list(map(gemma3.piece_bytes, range(gemma3.vocabulary_size)))
    with pytest.raises(IndexError):
        gemma3.piece_bytes(gemma3.vocabulary_size)


def test_a_literal_space_marker_is_not_decoded_as_a_space(gemma3: Tokenizer) -> None:
    assert gemma3.encode("\u2581") == [238 + byte for byte in "\u2581".encode()]
    assert gemma3.encode("a\u2581b") != gemma3.encode("a b")


def test_a_lone_surrogate_is_refused_by_position(gemma3: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"lone surrogate \\ud800 at character 2") as caught:
        gemma3.encode("ab\ud800c")
    assert caught.value.code == "bad_request"


@pytest.mark.parametrize("model", [b"", b"\x00\x01not a model", b"\x0a\xff"])
def test_bytes_that_are_not_a_model_are_refused(model: bytes) -> None:
    with pytest.raises(BundleError, match="not a SentencePiece BPE model"):
        Tokenizer(model)


@pytest.mark.parametrize("piece", ["<|turn>", "the", ""])
def test_a_piece_that_is_not_a_control_piece_is_refused_by_name(gemma3: Tokenizer, piece: str) -> None:
    with pytest.raises(BundleError, match=f"no control piece {piece.replace('|', '.')}"):
        gemma3.control_id(piece)


def streamed(tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(real_vocabulary.tokenizer("gemma3"), stop)
    return [*(stream.push(token) for token in tokens), stream.finish()], stream


@given(tokens=st.lists(st.integers(0, 262143) | st.integers(238, 493)))
def test_a_stream_of_any_tokens_gives_their_text_in_whole_characters(tokens: list[int]) -> None:
    pieces, stream = streamed(tokens)
    assert "".join(pieces) == stream.text == real_vocabulary.tokenizer("gemma3").decode(tokens)
    assert not stream.stopped


def first_stop(text: str, stops: tuple[str, ...]) -> int | None:
    """The position of the first stop string, found one character at a time."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts)
    return None


@given(
    text=st.text("ab\né") | st.text("ab", min_size=8),
    stops=st.lists(st.text("ab\né", min_size=1, max_size=4), max_size=3).map(tuple),
    bytewise=st.booleans(),
)
def test_stop_strings_cut_at_the_same_place_for_any_tokenisation(
    text: str, stops: tuple[str, ...], bytewise: bool
) -> None:
    whole = real_vocabulary.tokenizer("gemma3").encode(text)
    pieces, stream = streamed([238 + byte for byte in text.encode()] if bytewise else whole, stops)
    cut = first_stop(text, stops)
    assert "".join(pieces) == stream.text == text[:cut]
    assert stream.stopped == (cut is not None)


def test_text_that_could_start_a_stop_string_is_withheld() -> None:
    tokenizer = real_vocabulary.tokenizer("gemma3")
    stream = TextStream(tokenizer, ("END!",))
    assert "".join(stream.push(token) for token in tokenizer.encode("so EN")) == "so "
    assert "".join(stream.push(token) for token in tokenizer.encode("D.")) == "END."
    assert "".join(stream.push(token) for token in tokenizer.encode("END!more")) == ""
    assert stream.stopped
    assert stream.finish() == ""
    assert stream.text == "so END."


def test_an_unfinished_character_waits_and_is_replaced_only_at_the_end() -> None:
    stream = TextStream(real_vocabulary.tokenizer("gemma3"))
    assert [stream.push(238 + byte) for byte in "é€".encode()[:4]] == ["", "é", "", ""]
    assert stream.finish() == "\ufffd"
