"""The chat's questions to a server: what is sent, what is kept of an answer, and how a conversation
that has grown too long is trimmed."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from tests.api.canned import say
from tests.api.conftest import Server
from tests.api.test_trace import trace
from tinfer.api.keys import ApiKeys
from tinfer.chat.answer import Answer
from tinfer.chat.asking import Asker, Wishes
from tinfer.chat.conversation import Conversation, Turn
from tinfer.client import ApiError, BadRequest, ConnectionFailed, StreamBroken, Unauthorized
from tinfer.errors import EngineFailed, Overloaded


class Chat:
    """An asker of the canned server, with what it said and showed. The model takes 100 tokens, one
    per character; a message costs its role in brackets, and `<assistant>` ends the prompt."""

    def __init__(self, url: str, api_key: str | None = None, **wishes: Any) -> None:
        self.notices: list[str] = []
        self.shown: list[str] = []
        self.asker = Asker(url, api_key, Wishes(**wishes), self.notices.append)
        self.conversation = Conversation()

    async def ask(self, question: str) -> Answer:
        answer = Answer(question)
        await self.asker.fill(answer, self.conversation, self.shown.append)
        return answer


async def test_an_answer_with_its_figures(server: Server) -> None:
    server.service.script = lambda index: say("Hel", "lo", trace=trace())
    chat = Chat(server.url, max_tokens=7, temperature=0.5, model="tiny")
    answer = await chat.ask("hi")
    assert (answer.text, chat.shown, answer.finish_reason) == ("Hello", ["Hel", "lo"], "stop")
    assert answer.trace is not None and answer.trace["decode_worker"] == "decode-0"
    assert (answer.prompt_tokens, answer.output_tokens) == (19, 5)
    assert answer.ttft_s is not None and answer.e2el_s is not None
    (generation,) = server.service.generations
    assert (generation.sampling.max_tokens, generation.sampling.temperature) == (7, 0.5)
    assert [model.id for model in await chat.asker.models()] == ["tiny", "org/tiny"]


@pytest.mark.parametrize("options", [{"api_keys": ApiKeys(["sk-key"])}], indirect=True)
async def test_a_server_that_wants_a_key(server: Server) -> None:
    assert (await Chat(server.url, "sk-key").ask("hi")).text == "Hello"
    for key in (None, "sk-other"):
        with pytest.raises(Unauthorized, match="API key"):
            await Chat(server.url, key).ask("hi")


async def test_a_cut_answer_knows_its_tokens_and_stops_the_server(server: Server) -> None:
    never = asyncio.Event()
    server.service.script = lambda index: [*say("Hel", reason=None), never]  # type: ignore[arg-type]
    chat = Chat(server.url)
    answer, seen = Answer("hi"), asyncio.Event()
    asking = asyncio.create_task(
        chat.asker.fill(answer, chat.conversation, lambda text: seen.set())
    )
    await seen.wait()
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    assert (answer.text, answer.output_tokens, answer.trace) == ("Hel", 3, None)
    await server.service.streams[0].cancelled.wait()


async def test_what_fails_keeps_what_has_come(server: Server) -> None:
    chat = Chat(server.url)
    server.service.script = lambda index: [*say("Hel", reason=None), EngineFailed("broke")]  # type: ignore[arg-type]
    answer = Answer("hi")
    with pytest.raises(StreamBroken, match="broke"):
        await chat.asker.fill(answer, chat.conversation, chat.shown.append)
    assert answer.text == "Hel"


async def test_refusals_are_not_repeated(server: Server) -> None:
    server.service.script = lambda index: Overloaded("too many requests are waiting")
    with pytest.raises(ApiError, match="too many"):
        await Chat(server.url).ask("hi")
    with pytest.raises(ConnectionFailed):
        await Chat("http://127.0.0.1:1").ask("hi")


def turns(num: int) -> list[Turn]:
    """Turns of 21 tokens each; a question of one character takes 18."""
    return [Turn(str(i % 10), str(i % 10)) for i in range(num)]


@pytest.mark.parametrize(("num", "kept"), [(2, 2), (3, 3), (4, 2), (9, 2)])
async def test_the_oldest_turns_are_forgotten_when_it_gets_too_long(
    server: Server, num: int, kept: int
) -> None:
    chat = Chat(server.url)
    chat.conversation.turns = turns(num)
    await chat.ask("x")
    assert chat.conversation.turns == turns(num)[num - kept :]
    if num == kept:
        assert chat.notices == []
    else:
        (notice,) = chat.notices
        assert notice.endswith(f"the {num - kept} oldest turns are forgotten")
    (generation,) = server.service.generations
    room = 100 - len(generation.prompt_token_ids)
    assert room >= (25 if num != kept else 1), "a quarter of the model is left for the answer"


async def test_one_turn_is_one_turn(server: Server) -> None:
    chat = Chat(server.url)
    chat.conversation.turns = [Turn("x" * 70, "y")]
    await chat.ask("x")
    assert chat.notices == [
        "the conversation is longer than the model takes: the oldest turn is forgotten"
    ]


async def test_a_question_that_is_too_long_by_itself_forgets_nothing(server: Server) -> None:
    chat = Chat(server.url)
    chat.conversation.turns = turns(2)
    with pytest.raises(BadRequest, match="leaves no room"):
        await chat.ask("x" * 90)
    assert (chat.conversation.turns, chat.notices) == (turns(2), [])


async def test_a_refusal_for_another_reason_forgets_nothing(server: Server) -> None:
    chat = Chat(server.url, temperature=99.0)
    chat.conversation.turns = turns(2)
    with pytest.raises(BadRequest, match="temperature"):
        await chat.ask("x")
    assert (chat.conversation.turns, chat.notices) == (turns(2), [])


async def test_what_fails_after_trimming_forgets_nothing(server: Server) -> None:
    chat = Chat(server.url)
    chat.conversation.turns = turns(4)
    server.service.script = lambda index: Overloaded("full")
    with pytest.raises(ApiError, match="full"):
        await chat.ask("x")
    assert chat.conversation.turns == turns(4)


async def test_room_for_the_tokens_that_are_asked_for(server: Server) -> None:
    chat = Chat(server.url, max_tokens=60)
    chat.conversation.turns = turns(4)
    await chat.ask("x")
    assert chat.conversation.turns == turns(4)[3:]
    assert server.service.generations[0].sampling.max_tokens == 60
