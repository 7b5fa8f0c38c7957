"""The events of a response's stream, in the shapes of OpenAI and the order of vLLM 0.32
`responses/streaming_events.py`: each item is added, filled and done before the next one.

An event says of itself what it is twice, in its `event:` line and in its data, and which one it is.
"""

from __future__ import annotations

from msgspec import Struct

from tinfer.api.responses import ChatLogprobEntry
from tinfer.api.responses_api.bodies import Item, OutputText, ReasoningText, Response
from tinfer.api.sse import named_event


class Event(Struct, kw_only=True):
    """What all events have: they are numbered from 0."""

    sequence_number: int = 0


class ResponseCreated(Event, tag="response.created", tag_field="type"):
    """The first event."""

    response: Response


class ResponseInProgress(Event, tag="response.in_progress", tag_field="type"):
    """The second one; it says the same."""

    response: Response


class ResponseCompleted(Event, tag="response.completed", tag_field="type"):
    """The last event of an answer that ended by itself."""

    response: Response


class ResponseIncomplete(Event, tag="response.incomplete", tag_field="type"):
    """The last event of an answer that was cut off."""

    response: Response


class ResponseFailed(Event, tag="response.failed", tag_field="type"):
    """The last event of an answer that failed midway, with its error."""

    response: Response


class ItemAdded(Event, tag="response.output_item.added", tag_field="type"):
    """An item begins."""

    output_index: int
    item: Item


class ItemDone(Event, tag="response.output_item.done", tag_field="type"):
    """An item as it will be in the response."""

    output_index: int
    item: Item


class PartAdded(Event, tag="response.content_part.added", tag_field="type"):
    """The text of a message, or of what was thought, begins."""

    item_id: str
    output_index: int
    part: OutputText | ReasoningText
    content_index: int = 0


class PartDone(Event, tag="response.content_part.done", tag_field="type"):
    """The whole of it."""

    item_id: str
    output_index: int
    part: OutputText | ReasoningText
    content_index: int = 0


class TextDelta(Event, tag="response.output_text.delta", tag_field="type"):
    """What is new in a message; `logprobs` on request, else empty."""

    item_id: str
    output_index: int
    delta: str
    logprobs: list[ChatLogprobEntry] = []
    content_index: int = 0


class TextDone(Event, tag="response.output_text.done", tag_field="type"):
    """The whole of a message, and the logprobs of all its tokens."""

    item_id: str
    output_index: int
    text: str
    logprobs: list[ChatLogprobEntry] = []
    content_index: int = 0


class ReasoningDelta(Event, tag="response.reasoning_text.delta", tag_field="type"):
    """What is new in what the model thinks."""

    item_id: str
    output_index: int
    delta: str
    content_index: int = 0


class ReasoningDone(Event, tag="response.reasoning_text.done", tag_field="type"):
    """All that it thought."""

    item_id: str
    output_index: int
    text: str
    content_index: int = 0


class ArgumentsDelta(Event, tag="response.function_call_arguments.delta", tag_field="type"):
    """What is new in the arguments of a call."""

    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(Event, tag="response.function_call_arguments.done", tag_field="type"):
    """All arguments of a call."""

    item_id: str
    output_index: int
    name: str
    arguments: str


EVENTS: tuple[type[Event], ...] = tuple(Event.__subclasses__())


class Numbered:
    """Numbers the events of one stream and makes them bytes."""

    def __init__(self) -> None:
        self._num_events = 0

    def frame(self, events: list[Event]) -> bytes:
        """Each of them with its number, in this order."""
        framed = []
        for event in events:
            event.sequence_number = self._num_events
            self._num_events += 1
            framed.append(named_event(name_of(type(event)), event))
        return b"".join(framed)


def name_of(kind: type[Event]) -> str:
    """The name of an event, which is its `type` too."""
    name = kind.__struct_config__.tag
    assert isinstance(name, str)
    return name
