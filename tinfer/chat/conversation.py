"""What has been said: the turns that the server is shown again with every question.

Only whole turns are kept, so a conversation always alternates. An answer that the user cut short
stays, marked, since the user has read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from msgspec import Struct

Message = dict[str, str]


class Turn(Struct, frozen=True):
    """One question and what was answered; `cut` when the user stopped the answer."""

    question: str
    answer: str
    cut: bool = False


class Conversation:
    """The turns so far, oldest first, under one system prompt (None: the model's own)."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.turns: list[Turn] = []

    def messages(self, question: str, skip: int = 0) -> list[Message]:
        """What to send to have `question` answered, without the `skip` oldest turns."""
        messages: list[Message] = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        for turn in self.turns[skip:]:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        return [*messages, {"role": "user", "content": question}]

    def forget_oldest(self, num_turns: int) -> None:
        del self.turns[:num_turns]

    def as_text(self) -> str:
        """For a person to read."""
        return "\n\n".join(f"{who}:\n{text}" for who, text in self._said()) + "\n"

    def as_json(self) -> str:
        """For a program: messages as the chat endpoint takes them, a cut answer with `cut`."""
        messages: list[dict[str, Any]] = [*self.messages("")[:-1]]
        answers = [message for message in messages if message["role"] == "assistant"]
        for message, turn in zip(answers, self.turns, strict=True):
            if turn.cut:
                message["cut"] = True
        return json.dumps({"messages": messages}, ensure_ascii=False, indent=2) + "\n"

    def _said(self) -> Iterator[tuple[str, str]]:
        if self.system is not None:
            yield "system", self.system
        for turn in self.turns:
            yield "user", turn.question
            yield "assistant", turn.answer + (" [cut]" if turn.cut else "")
