"""Asks the server: one question, streamed, in a conversation that fits the model.

A conversation that the server finds too long loses its oldest turns, as many as it takes; what is
too long is the server's word, how much too long its tokenizer's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import Struct

from tinfer.chat.answer import Answer
from tinfer.chat.conversation import Conversation
from tinfer.client import AsyncClient, BadRequest, Model, TinferClientError

TRACE_HEADERS = {"X-Tinfer-Trace": "1"}
# With usage in every chunk the number of tokens is known of an answer that is cut, too.
USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
# Room that is made for an answer whose length nobody has limited: trimming again at each question
# would cost more than a few turns.
ROOM_TOKENS = 256


class Wishes(Struct, frozen=True):
    """How to answer; None leaves it to the server."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None


def unseen(text: str) -> None:
    """Shows nothing."""


class Asker:
    """One server, and how to ask it. `say` gets the notices."""

    def __init__(
        self, url: str, api_key: str | None, wishes: Wishes, say: Callable[[str], None]
    ) -> None:
        self.url = url
        self._api_key = api_key
        self._wishes = wishes
        self._say = say
        # Its check of the address, before anything starts.
        self._client()

    def _client(self) -> AsyncClient:
        """A client per question: between two of them no event loop runs to keep a connection.

        Raises `ValueError` for an address that is none.
        """
        return AsyncClient(
            self.url, self._api_key, timeout_s=None, max_retries=0, headers=TRACE_HEADERS
        )

    async def models(self) -> list[Model]:
        """What is served there. Raises `TinferClientError`."""
        async with self._client() as client:
            return await client.models()

    async def fill(
        self,
        answer: Answer,
        conversation: Conversation,
        show: Callable[[str], None],
        think: Callable[[str], None] = unseen,
    ) -> None:
        """Stream the answer into `answer` and, piece by piece, to `show`; its reasoning to `think`.

        Cancelling stops the server too. Raises `TinferClientError`; what has come is in `answer`.
        """
        async with self._client() as client:
            try:
                await self._stream(client, answer, conversation, show, think)
            except BadRequest:
                num_turns = await self._turns_too_many(client, conversation, answer.question)
                if not num_turns:
                    raise
                oldest = "oldest turn is" if num_turns == 1 else f"{num_turns} oldest turns are"
                self._say(
                    f"the conversation is longer than the model takes: the {oldest} forgotten"
                )
                try:
                    await self._stream(client, answer, conversation, show, think, num_turns)
                finally:
                    if answer.pieces:
                        conversation.forget_oldest(num_turns)

    async def _stream(
        self,
        client: AsyncClient,
        answer: Answer,
        conversation: Conversation,
        show: Callable[[str], None],
        think: Callable[[str], None],
        skip: int = 0,
    ) -> None:
        wishes: dict[str, Any] = {
            "model": self._wishes.model,
            "max_tokens": self._wishes.max_tokens,
            "temperature": self._wishes.temperature,
        }
        messages = conversation.messages(answer.question, skip)
        async with client.stream_chat(messages, extra=USAGE, **wishes) as stream:
            try:
                async for chunk in stream:
                    if chunk.reasoning:
                        answer.thoughts.append(chunk.reasoning)
                        think(chunk.reasoning)
                    if chunk.text:
                        answer.pieces.append(chunk.text)
                        show(chunk.text)
            finally:
                answer.see(stream)

    async def _turns_too_many(
        self, client: AsyncClient, conversation: Conversation, question: str
    ) -> int:
        """How many of the oldest turns keep the question from being answered; 0 if they do not."""

        async def num_tokens(skip: int) -> tuple[int, int]:
            told = await client.tokenize(conversation.messages(question, skip))
            return told.count, told.max_model_len

        num_turns = len(conversation.turns)
        least = self._wishes.max_tokens or 1
        try:
            count, limit = await num_tokens(0)
            if count + least <= limit or not num_turns:
                return 0
            if (await num_tokens(num_turns))[0] + least > limit:
                return 0
            room = self._wishes.max_tokens or min(ROOM_TOKENS, limit // 4)
            low, high = 1, num_turns
            while low < high:
                middle = (low + high) // 2
                if (await num_tokens(middle))[0] + room <= limit:
                    high = middle
                else:
                    low = middle + 1
        except TinferClientError:
            # A server without a tokenizer to ask: its own words say enough.
            return 0
        return low
