"""Deltas that are written as they come, past the handler's task: when they are and when not."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import msgspec
import pytest

from tests.api.canned import say
from tests.api.conftest import Server, send
from tinfer.api.service import Delta
from tinfer.api.sse import Direct

PIECES = tuple("abcdefgh")
ASKED = {"prompt": "a", "stream": True}


class Wire:
    """A transport that keeps what it is given, and says how much of it is unsent."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.unsent = 0
        self.closing = False

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes) -> None:
        self.written.append(data)


def new_direct(wire: Wire) -> Direct:
    def encode(delta: Delta) -> bytes:
        if delta.text == "bad":
            raise ValueError("no such text")
        return delta.text.encode()

    return Direct(cast(asyncio.Transport, wire), encode)


def test_a_delta_is_one_chunk_of_the_transfer_coding() -> None:
    wire = Wire()
    assert new_direct(wire)(Delta("é" * 9))
    assert wire.written == [b"12\r\n" + "é".encode() * 9 + b"\r\n"]


@pytest.mark.parametrize(
    ("text", "unsent", "closing"), [("a", 1, False), ("a", 0, True), ("bad", 0, False)]
)
def test_what_cannot_be_written_now_is_left(text: str, unsent: int, closing: bool) -> None:
    wire = Wire()
    wire.unsent, wire.closing = unsent, closing
    assert not new_direct(wire)(Delta(text))
    assert wire.written == []


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_all_but_the_ends_of_a_stream_pass_the_handler(server: Server, path: str) -> None:
    script: list[Any] = []
    for delta in say(*PIECES):
        script += [delta, _soon()]
    server.service.script = lambda index: script
    body: dict[str, Any] = {"prompt": "a", "messages": [{"role": "user", "content": "hi"}]}
    del body["messages" if path == "/v1/completions" else "prompt"]
    events = await server.stream(path, stream_options={"include_usage": True}, **body)
    choices = [choice for event in events for choice in event["choices"]]
    texts = [one.get("text") or one.get("delta", {}).get("content") for one in choices]
    assert "".join(filter(None, texts)) == "".join(PIECES)
    assert events[-1]["usage"]["completion_tokens"] == len(PIECES)
    (stream,) = server.service.streams
    assert stream.num_written_through == len(PIECES) - 2


async def test_answers_of_several_sequences_go_by_the_handler(server: Server) -> None:
    server.service.script = lambda index: say(*PIECES)
    await server.stream("/v1/completions", prompt="a", n=2)
    assert [stream.num_written_through for stream in server.service.streams] == [0, 0]


async def test_a_client_of_http_1_0_gets_no_chunks(server: Server) -> None:
    server.service.script = lambda index: say(*PIECES)
    reader, writer = await send(server, "/v1/completions", ASKED, "HTTP/1.0")
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    events = [line for line in body.split(b"\n\n") if line]
    assert all(event.startswith(b"data: ") for event in events)
    assert _text(events) == "".join(PIECES)
    assert server.service.streams[0].num_written_through == 0
    writer.close()


async def test_a_client_that_does_not_read_gets_all_once_it_does(server: Server) -> None:
    pieces = [f"{number}{'x' * 100_000}" for number in range(100)]
    server.service.script = lambda index: [
        item for delta in say(*pieces) for item in (delta, _soon())
    ]
    reader, writer = await send(server, "/v1/completions", ASKED, "HTTP/1.1")
    await reader.readuntil(b"\r\n\r\n")
    await asyncio.sleep(0.3)
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    assert _text([line for line in body.split(b"\n\n") if line]) == "".join(pieces)
    assert server.service.streams[0].num_written_through < len(pieces) - 2
    writer.close()


def _soon() -> asyncio.Event:
    """Set in the next turns of the loop, so that what was written is sent."""
    event = asyncio.Event()
    asyncio.get_running_loop().call_later(0.01, event.set)
    return event


def _text(events: list[bytes]) -> str:
    assert events[-1] == b"data: [DONE]"
    chunks = [msgspec.json.decode(event.removeprefix(b"data: ")) for event in events[:-1]]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
