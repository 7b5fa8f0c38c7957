"""Answers with tool calls and reasoning: a tokenizer that has their marks, what a model would say
with it, and what a client makes of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from tests.api.canned import token, write_model_dir
from tinfer.api.parsing import Asked, Piece, Said
from tinfer.api.render import Renderer
from tinfer.api.service import Delta
from tinfer.api.vllm_parsers import ParserNames, VllmParsers, load_parsers
from tinfer.core.sampling import SamplingSpec
from tinfer.master.streams import merge

# Templates show their tools, and calls and results of the past.
TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments.city }}"
    "{% endfor %}{% endfor %}<assistant>"
)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
USER = [{"role": "user", "content": "hi"}]
MARKS = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>")


def write_marked_model_dir(path: Path) -> Path:
    """The byte tokenizer of the other tests, with one token per mark."""
    write_model_dir(path, TEMPLATE)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(mark, special=False) for mark in MARKS])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


class Speaker:
    """Says texts as an engine would, and has the parsers that read them."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self._tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._loaded: dict[ParserNames, VllmParsers] = {}

    async def parsers(self, tool_call: str | None, reasoning: str | None = None) -> VllmParsers:
        names = ParserNames(tool_call, reasoning)
        if names not in self._loaded:
            renderer = await Renderer.load(self.model_dir)
            self._loaded[names] = load_parsers(names, renderer.tokenizer, self.model_dir)
            renderer.close()
        return self._loaded[names]

    def say(
        self, text: str, reason: str = "stop", step: int = 1, logprobs: bool = False
    ) -> list[Delta | BaseException]:
        """A token per step, `step` of which merge; a character comes with its last byte."""
        token_ids = self.ids(text)
        steps = []
        before = ""
        for end, one in enumerate(token_ids, start=1):
            so_far = self._tokenizer.decode(token_ids[:end], skip_special_tokens=False)
            shown = so_far.removesuffix("\ufffd")
            tops = [token("x", token_id=one)] if logprobs else None
            steps.append(Delta(shown[len(before) :], [one], tops))
            before = shown
        assert before == text
        steps[-1].finish_reason = reason  # type: ignore[assignment]
        return [_merged(steps[i : i + step]) for i in range(0, len(steps), step)]

    def ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _merged(steps: list[Delta]) -> Delta:
    """As they wait in the master for a client that is behind."""
    first, *rest = steps
    for step in rest:
        merge(first, step)
    return first


def reassembled(events: Sequence[Any], index: int = 0) -> dict[str, Any]:
    """What a client of a stream has at its end, in the words of a whole answer but for ids."""
    said: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}, "finish_reason": None}
    for event in events:
        for choice in event["choices"]:
            if choice["index"] != index:
                continue
            delta = choice["delta"]
            said["content"] += delta.get("content") or ""
            said["reasoning"] += delta.get("reasoning") or ""
            said["finish_reason"] = choice["finish_reason"] or said["finish_reason"]
            for call in delta.get("tool_calls", ()):
                _add(said["calls"], call)
    said["calls"] = [tuple(said["calls"][i]) for i in sorted(said["calls"])]
    return said


def _add(calls: dict[int, list[str]], call: dict[str, Any]) -> None:
    known = calls.get(call["index"])
    if known is None:  # the first piece of a call says what it is, and no other does
        assert call["id"] and call["type"] == "function"
        known = calls[call["index"]] = ["", ""]
    else:
        assert "id" not in call
    function = call.get("function", {})
    known[0] += function.get("name", "")
    known[1] += function.get("arguments", "")


def whole(said: Any, index: int = 0) -> dict[str, Any]:
    """The same of an answer that is not streamed."""
    choice = said["choices"][index]
    message = choice["message"]
    return {
        "content": message["content"] or "",
        "reasoning": message["reasoning"] or "",
        "calls": [
            (call["function"]["name"], call["function"]["arguments"])
            for call in message.get("tool_calls", ())
        ],
        "finish_reason": choice["finish_reason"],
    }


class Broken:
    """Parsers that fail at the text "!", and never again say anything sensible."""

    tools = reasoning = True

    def chat(self, asked: Asked) -> Broken:
        return self

    def adjusted(self, spec: SamplingSpec) -> SamplingSpec:
        return spec

    def new(self) -> Broken:
        return self

    def whole(self, text: str, token_ids: object) -> Said:
        if "!" in text:
            raise KeyError("secret words")
        return Said(None, text, [], 0)

    def piece(self, text: str, token_ids: object, finished: bool) -> Piece | None:
        if "!" in text:
            raise KeyError("secret words")
        return Piece(None, text, [])

    def count_reasoning(self, token_ids: object) -> int:
        return 0
