"""The parser of server-sent events: what is cut anywhere, ended anyhow and mixed with comments."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinfer.client.sse import EventTooLarge, SseEvent, SseParser

LINE_ENDS = st.sampled_from([b"\n", b"\r", b"\r\n"])
# Within a data line; what would end it is put between lines instead.
LINES = st.text(st.characters(exclude_characters="\r\n", codec="utf-8"))
NOISE = st.sampled_from(
    [b": a comment", b":", b"id: 7", b"retry: 10", b"other", b"x: y", b"dat: z"]
)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[SseEvent]]:
    """A stream and its events, with every liberty that the format gives."""
    text = draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
    events = []
    for _ in range(draw(st.integers(0, 4))):
        lines = draw(st.lists(LINES, min_size=1, max_size=3))
        name = draw(st.sampled_from(["", "", "error"]))
        fields = [b"data:" + draw(st.sampled_from([b" ", b""])) + x.encode() for x in lines]
        # Without the space, a line that starts with one would lose it.
        fields = [
            b"data: " + x.encode() if x.startswith(" ") else f
            for x, f in zip(lines, fields, strict=True)
        ]
        fields += [b"event: " + name.encode()] if name else []
        for field in fields:
            for noise in draw(st.lists(NOISE, max_size=1)):
                text += noise + draw(LINE_ENDS)
            text += field + draw(LINE_ENDS)
        # CR then LF would be one line end.
        text += b"\n" if not text.endswith(b"\r") else draw(st.sampled_from([b"\r", b"\r\n"]))
        events.append(SseEvent("\n".join(lines), name or "message"))
    return text, events


def parse(pieces: list[bytes]) -> list[SseEvent]:
    parser = SseParser()
    return [event for piece in pieces for event in parser.feed(piece)]


@given(streams(), st.data())
def test_cuts_change_nothing(stream: tuple[bytes, list[SseEvent]], data: st.DataObject) -> None:
    text, events = stream
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(pieces) == events
    assert parse([text[i : i + 1] for i in range(len(text))]) == events


@given(st.lists(st.binary(max_size=20), max_size=6))
@example([b"data: a\r", b"\n", b"\r\n"])
@example([b"data: a\r", b"", b"\ndata: b\n\n"])
@example([b"\xef", b"\xbb", b"\xbfdata: a\n\n"])
@example([b"\xef", b"data: a\n\n"])
def test_any_bytes_are_read_the_same_in_any_pieces(pieces: list[bytes]) -> None:
    whole = b"".join(pieces)
    assert parse(pieces) == parse([whole]) == parse([whole[i : i + 1] for i in range(len(whole))])


@pytest.mark.parametrize(
    ("text", "data"),
    [
        (b"data: a\n\n", ["a"]),
        (b"data:a\ndata: b\n\n", ["a\nb"]),
        (b"data\n\n", [""]),
        (b"data:  two spaces\r\n\r\n", [" two spaces"]),
        (b"data: a\n\ndata: not ended\n", ["a"]),
        (b"\n\n: only a comment\n\n", []),
        (b"event: x\n\ndata: y\n\n", ["y"]),
        (b"data: caf\xc3\xa9 \xf0\x9f\x99\x82\n\n", ["caf\u00e9 \U0001f642"]),
        (b"data: \xff\n\n", ["\ufffd"]),
        # Ends of lines for Unicode, not for this format.
        ("data: a\u2028b\u0085c\x0bd\n\n".encode(), ["a\u2028b\u0085c\x0bd"]),
    ],
)
def test_fields(text: bytes, data: list[str]) -> None:
    assert [event.data for event in parse([text])] == data


def test_an_endless_event_is_refused() -> None:
    parser = SseParser(max_event_bytes=100)
    assert parser.feed(b"data: " + b"x" * 80 + b"\n\n") != []
    with pytest.raises(EventTooLarge):
        parser.feed(b"data: " + b"x" * 200)
    lines = SseParser(max_event_bytes=100)
    with pytest.raises(EventTooLarge):
        for _ in range(200):
            lines.feed(b"data:\n")
