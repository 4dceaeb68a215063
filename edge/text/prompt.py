"""Requests as token ids, and a model's output ids as answer, reasoning and tool calls.

Turn formats are those of the chat templates published with Gemma 3 and Gemma 4 (E2B and E4B). Control tokens
are inserted by number, and each text between two of them is encoded on its own, without parsing control
tokens. So the ids are those of the rendered template, and no text can forge a turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from edge.errors import RequestError
from edge.protocol.messages import Message, Request, ToolCall
from edge.text import tool_syntax
from edge.text.tokenizer import TextStream, Tokenizer
from edge.text.tool_syntax import QUOTE, Control, Segment, ToolCallError

THINK, CHANNEL, CHANNEL_END = Control("<|think|>"), Control("<|channel>"), Control("<channel|>")
TURN, TURN_END = Control("<|turn>"), Control("<turn|>")
TOOL, TOOL_END = Control("<|tool>"), Control("<tool|>")
CALL, CALL_END = Control("<|tool_call>"), Control("<tool_call|>")
RESPONSE, RESPONSE_END = Control("<|tool_response>"), Control("<tool_response|>")


def render(request: Request, prompt_format: str, tokenizer: Tokenizer, bos_id: int) -> list[int]:
    """Return the prompt's ids, from `bos_id` to the place where the model continues.

    `prompt_format` is "plain" (a base model: `prompt` is continued), "gemma3" or "gemma4" (a `prompt` is one
    user turn). Raises RequestError("bad_request"), naming the message, if the format can't express the
    request.
    """
    if prompt_format == "plain":
        segments = _plain(request)
    else:
        messages = request.messages or (Message("user", request.prompt or ""),)
        segments = {"gemma3": _gemma3, "gemma4": _gemma4}[prompt_format](request, messages)
    return [bos_id, *encode_segments(segments, tokenizer)]


def encode_segments(segments: Iterable[Segment], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of `segments`. Adjacent texts are encoded as one, so tokens can span two of them."""
    ids: list[int] = []
    text = ""
    for segment in segments:
        if isinstance(segment, str):
            text += segment
        else:
            ids += tokenizer.encode(text)
            ids.append(tokenizer.control_id(segment.piece))
            text = ""
    return ids + tokenizer.encode(text)


def _refuse(what: str) -> NoReturn:
    raise RequestError("bad_request", what)


def _plain(request: Request) -> Iterator[Segment]:
    if request.prompt is None:
        _refuse("messages: this is a base model without a chat format; send prompt")
    _no_tools_or_thoughts(request, "a base model")
    yield request.prompt


def _no_tools_or_thoughts(request: Request, model: str) -> None:
    if request.tools:
        _refuse(f"tools: {model} has no tool calls; leave tools out, or use a Gemma 4 bundle")
    if request.reasoning:
        _refuse(f"reasoning: {model} has no thinking mode; leave it out, or use a Gemma 4 bundle")


def _gemma3(request: Request, messages: Sequence[Message]) -> Iterator[Segment]:
    _no_tools_or_thoughts(request, "a Gemma 3")
    system = ""
    if messages[0].role == "system":
        system = messages[0].content + "\n\n"
    first = len(system) > 0
    for index, message in enumerate(messages[first:], first):
        expected = ("user", "assistant")[(index - first) % 2]
        if message.role != expected or message.tool_calls:
            actual = "a tool call" if message.tool_calls else message.role
            _refuse(
                f"messages[{index}]: expected {expected}, not {actual}; Gemma 3 alternates user and assistant"
            )
        role = "user" if expected == "user" else "model"
        yield Control("<start_of_turn>")
        yield f"{role}\n{system}{message.content.strip()}"
        yield Control("<end_of_turn>")
        yield "\n"
        system = ""
    if messages[-1].role != "user":
        _refuse(f"messages[{len(messages) - 1}]: the last message must be from user, not {messages[-1].role}")
    yield from (Control("<start_of_turn>"), "model\n")


def _gemma4(request: Request, messages: Sequence[Message]) -> Iterator[Segment]:
    _check_gemma4(messages)
    first = messages[0].role == "system"
    if first or request.tools or request.reasoning:
        yield from (TURN, "system\n")
        if request.reasoning:
            yield from (THINK, "\n")
        if first:
            yield messages[0].content.strip()
        for tool in request.tools:
            yield from (TOOL, *tool_syntax.declaration(tool), TOOL_END)
        yield from (TURN_END, "\n")
    yield from _gemma4_turns(messages[first:])
    if begins_in_thought(request):
        yield from (CHANNEL, "thought\n")
    elif not _is_open(messages):
        yield from (TURN, "model\n")


def begins_in_thought(request: Request) -> bool:
    """Whether a Gemma 4's prompt ends in an open channel, so that the output starts inside the reasoning."""
    return request.reasoning and _is_open(request.messages)


def _is_open(messages: Sequence[Message]) -> bool:
    """Whether the model's turn continues after a tool's result."""
    last = next((message for message in reversed(messages) if message.role != "tool"), None)
    return last is not None and last.role == "assistant" and not _without_thoughts(last.content)


def _check_gemma4(messages: Sequence[Message]) -> None:
    """Refuse a misplaced system message, calls without results, and messages that end without a question."""
    unanswered: list[str] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.role == "tool":
            if message.tool_name not in unanswered:
                _refuse(f"{where}: a result of {message.tool_name}, which was not called before")
            unanswered.remove(message.tool_name)
        elif unanswered:
            _refuse(f"{where}: expected the result of the call of {unanswered[0]}, not {message.role}")
        elif message.role == "system" and index:
            _refuse(f"{where}: a system message can only be the first")
        unanswered += [call.name for call in message.tool_calls]
    last = len(messages) - 1
    if unanswered:
        _refuse(f"messages[{last}]: the call of {unanswered[0]} has no result; add a tool message")
    if messages[last].role not in ("user", "tool"):
        _refuse(f"messages[{last}]: the last message must be from user or tool, not {messages[last].role}")


def _gemma4_turns(messages: Sequence[Message]) -> Iterator[Segment]:
    """Yield all turns but the system's. A call's results belong to the model's turn, and leave it open."""
    last_user = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
    roles = [message.role for message in messages]
    previous = ""
    for index, message in enumerate(messages):
        if message.role == "tool":
            continue
        following = next((role for role in roles[index + 1 :] if role != "tool"), "")
        if message.role == "user":
            yield from (TURN, f"user\n{message.content.strip()}", TURN_END, "\n")
        else:
            if previous != "assistant":
                yield from (TURN, "model\n")
            if message.reasoning and index > last_user:
                yield from (CHANNEL, f"thought\n{message.reasoning}\n", CHANNEL_END)
            content = _without_thoughts(message.content)
            yield from _calls(message, messages[index + 1 :])
            yield content
            if following == "assistant":
                yield "\n"
            elif content or following or not message.tool_calls:
                yield from (TURN_END, "\n")
        previous = message.role


def _calls(message: Message, after: Sequence[Message]) -> Iterator[Segment]:
    """Write the calls of one message, then their results."""
    for call in message.tool_calls:
        yield from (CALL, *tool_syntax.call(call), CALL_END)
    for result in after[: len(message.tool_calls)]:
        yield from (RESPONSE, *tool_syntax.response(result.tool_name or "", result.content), RESPONSE_END)


def _without_thoughts(content: str) -> str:
    """Cut reasoning that a client left in an answer; the model must not see it again."""
    parts = content.split(CHANNEL_END.piece)
    return "".join(part.split(CHANNEL.piece)[0] for part in parts).strip()


@dataclass(frozen=True)
class Increment:
    """Text of the answer and of the reasoning that became certain with one more token; each is often ""."""

    text: str = ""
    reasoning: str = ""


class OutputParser:
    """Output ids in, increments of answer and reasoning out; tool calls are collected in `tool_calls`.

    A Gemma 4 reasons between `<|channel>` and `<channel|>` (after a first line that names the channel), and
    calls tools between `<|tool_call>` and `<tool_call|>`. Everything else, and all output of other formats,
    is the answer. Stop strings count in the answer only. A call that can't be read, or is incomplete, stays
    in the answer as the text that the model wrote: nothing is lost, and nobody acts on half a call.

    `prompt` holds the ids that the output continues; they may end in an open channel.
    """

    def __init__(
        self, prompt_format: str, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._answer = TextStream(tokenizer, stop)
        self._thoughts = _Thoughts(tokenizer)
        self._call: list[int] = []
        self._tool_calls: list[ToolCall] = []
        self._section = "answer"
        self._controls: dict[int, Control] = {}
        if prompt_format == "gemma4":
            known = (CHANNEL, CHANNEL_END, CALL, CALL_END, QUOTE)
            self._controls = {tokenizer.control_id(control.piece): control for control in known}
        last = max((i for i, token in enumerate(prompt) if token in self._controls), default=0)
        tail = prompt[last:]
        if tail and self._controls.get(tail[0]) == CHANNEL:
            for token in tail:
                self.push(token)

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._answer.text

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return self._thoughts.text

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The complete calls; their ids count up from `call_0`."""
        return tuple(self._tool_calls)

    @property
    def stopped(self) -> bool:
        """Whether a stop string occurred; nothing after it is returned."""
        return self._answer.stopped

    def push(self, token: int) -> Increment:
        """Take one more token. Control tokens without a meaning here, including stop ids, are skipped."""
        control = self._controls.get(token)
        if self._section == "call" and control in (None, QUOTE):
            self._call.append(token)
            return Increment()
        if control is None:
            if self._section == "thought":
                return Increment(reasoning=self._thoughts.push(token))
            return Increment(self._answer.push(token))
        unread = self._end_call(control == CALL_END) if self._section == "call" else ""
        if control == CHANNEL:
            self._thoughts.open()
        self._section = {CHANNEL: "thought", CALL: "call"}.get(control, "answer")
        return Increment(unread)

    def finish(self) -> Increment:
        """No more tokens: return what was held back."""
        unread = self._end_call(False) if self._section == "call" else ""
        self._section = "answer"
        return Increment(unread + self._answer.finish(), self._thoughts.finish())

    def _end_call(self, complete: bool) -> str:
        """Read the collected call; return it as text if it is not a call."""
        quote = self._tokenizer.control_id(QUOTE.piece)
        parts: list[list[int]] = [[]]
        for token in self._call:
            if token == quote:
                parts.append([])
            else:
                parts[-1].append(token)
        self._call = []
        texts = [self._tokenizer.decode(part) for part in parts]
        try:
            if complete:
                name, arguments = tool_syntax.parse_call(texts)
                self._tool_calls.append(ToolCall(name, arguments, f"call_{len(self._tool_calls)}"))
                return ""
        except ToolCallError:
            pass
        end = CALL_END.piece if complete else ""
        return self._answer.push_text(CALL.piece + QUOTE.piece.join(texts) + end)


class _Thoughts:
    """Text of all channels, without the line that names a channel and the newlines at its end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._stream = TextStream(tokenizer)
        self._in_header = False
        self._newlines = ""
        self.text = ""

    def open(self) -> None:
        """Begin a channel."""
        self._in_header = True
        self._newlines = "\n" if self.text else ""

    def push(self, token: int) -> str:
        """Take one more token of the open channel."""
        return self._show(self._stream.push(token))

    def finish(self) -> str:
        """No more tokens."""
        return self._show(self._stream.finish())

    def _show(self, text: str) -> str:
        if self._in_header:
            _name, newline, text = text.partition("\n")
            self._in_header = not newline
        body = text.rstrip("\n")
        if not body:
            self._newlines += text
            return ""
        shown = self._newlines + body
        self._newlines = text[len(body) :]
        self.text += shown
        return shown
