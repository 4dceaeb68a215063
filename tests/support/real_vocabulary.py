"""The vocabulary of a real Gemma (262,144 pieces), for tests, from the 270M's GGUF file.

Gemma 3 and Gemma 4 share it but for the names of a few control pieces.
"""

from __future__ import annotations

from functools import cache

from converters.checkpoints import tokenizer_model
from converters.checkpoints.gguf_file import read_gguf
from edge.text.tokenizer import Tokenizer
from edge.text.vocabulary import USER_DEFINED
from tests.support import scratch
from tests.support.checkpoint_files import real_model

GEMMA4_NAMES = {
    46: "<|tool>",
    47: "<tool|>",
    48: "<|tool_call>",
    49: "<tool_call|>",
    50: "<|tool_response>",
    51: "<tool_response|>",
    52: '<|"|>',
    98: "<|think|>",
    100: "<|channel>",
    101: "<channel|>",
    105: "<|turn>",
    106: "<turn|>",
}


@cache
def model(family: str, specials_as_text: bool = False) -> bytes:
    """The ModelProto of "gemma3" or "gemma4".

    With `specials_as_text`, control tokens are recognised in text: how the whole rendered template would be
    tokenised, to compare with.
    """
    file = scratch.directory() / f"{family}-specials-as-text-{specials_as_text}.model"
    return scratch.made_once(
        file, lambda path: path.write_bytes(_build(family, specials_as_text))
    ).read_bytes()


def _build(family: str, specials_as_text: bool) -> bytes:
    path = real_model()
    metadata = read_gguf(path).metadata
    tokens = list(metadata["tokenizer.ggml.tokens"])
    kinds = list(metadata["tokenizer.ggml.token_type"])
    if family == "gemma4":
        for token, name in GEMMA4_NAMES.items():
            tokens[token] = name
    names = {2, 105, 106} | (set(GEMMA4_NAMES) if family == "gemma4" else set())
    if specials_as_text:
        # Renamed while the model is built, so that the converter takes them for text; same length, so that
        # the names can be put back in the bytes.
        renamed = {tokens[token]: tokens[token].replace("<", "\x01").replace(">", "\x02") for token in names}
        for token in names:
            tokens[token] = renamed[tokens[token]]
            kinds[token] = USER_DEFINED
    changed = metadata | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    serialised = tokenizer_model.from_gguf(changed, path, len(tokens))
    if specials_as_text:
        for name, stand_in in renamed.items():
            serialised = serialised.replace(stand_in.encode(), name.encode())
    return serialised


@cache
def tokenizer(family: str, specials_as_text: bool = False) -> Tokenizer:
    """A shared tokenizer over `model`."""
    return Tokenizer(model(family, specials_as_text))
