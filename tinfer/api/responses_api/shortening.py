"""`truncation: "auto"`: as much of the newest part of a conversation as the model takes."""

from __future__ import annotations

import msgspec

from tinfer.api.chat import Prepared, prepare
from tinfer.api.context import Api
from tinfer.api.schemas import ChatRequest, Message
from tinfer.errors import PromptTooLong

_RULES = ("system", "developer")


async def prepare_newest(api: Api, asked: ChatRequest) -> Prepared:
    """`prepare`, where that is too long without the oldest turns, as few as will do.

    What the model is told at the head of a conversation stays, and what is left begins with a
    message of the user, so that no result of a tool stands without its call; the answer has the
    room that is asked for. Renders as often as the number of turns has bits. Raises what `prepare`
    raises, for the last turn alone too.
    """
    try:
        return await prepare(api, asked)
    except PromptTooLong as error:
        num_rules, begins = _turns(asked.messages)
        if error.param != "messages" or not begins:
            raise
    found: Prepared | None = None
    first, last = 0, len(begins) - 1
    while first < last:
        middle = (first + last) // 2
        ready = await _fitting(api, _from(asked, num_rules, begins[middle]))
        if ready is None:
            first = middle + 1
        else:
            found, last = ready, middle
    return found or await prepare(api, _from(asked, num_rules, begins[-1]))


def _turns(messages: list[Message]) -> tuple[int, list[int]]:
    """How many messages stay, and where the conversation can begin after them."""
    num_rules = 0
    while num_rules < len(messages) and messages[num_rules].role in _RULES:
        num_rules += 1
    begins = [i for i in range(num_rules + 1, len(messages)) if messages[i].role == "user"]
    return num_rules, begins


def _from(asked: ChatRequest, num_rules: int, begin: int) -> ChatRequest:
    kept = [*asked.messages[:num_rules], *asked.messages[begin:]]
    return msgspec.structs.replace(asked, messages=kept)


async def _fitting(api: Api, asked: ChatRequest) -> Prepared | None:
    try:
        ready = await prepare(api, asked)
    except PromptTooLong:
        return None
    return ready if ready.spec.max_tokens >= (asked.max_completion_tokens or 1) else None
