"""The conversation with the user: reads inputs until there are no more, asks, answers, obeys.

Whatever goes wrong with a question is one line on standard error, and the next input is read.
Answers go to standard output, all else to standard error.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tinfer.chat.answer import Answer
from tinfer.chat.asking import Asker
from tinfer.chat.conversation import Conversation, Turn
from tinfer.chat.typed import Source
from tinfer.client import ConnectionFailed, StreamBroken, TinferClientError

LEAVE = "Ctrl-D or /quit leaves"
HELP = f"""\
  /stats        how the last answer was served: times, tokens/s, route, workers
  /system TEXT  set the system prompt; /system shows it, /system off removes it
  /clear        forget what has been said; the system prompt stays
  /retry        ask the last question again
  /save FILE    write the conversation, as JSON if FILE ends in .json
  /help         this list
  /quit         leave, as Ctrl-D does
  A line that ends in \\ goes on in the next; \"\"\" begins and ends a block of lines;
  a paste is one question. A question that begins with / is written //...
  Ctrl-C stops the answer. {LEAVE}."""


class Screen(Protocol):
    """Where a session writes."""

    def show(self, text: str) -> None:
        """A piece of an answer."""
        ...

    def think(self, text: str) -> None:
        """A piece of the reasoning before it."""
        ...

    def end(self) -> None:
        """The answer is over, and its line too."""
        ...

    def say(self, text: str) -> None:
        """A line that is no answer."""
        ...


class Session:
    """One chat. `why_gone` says why an own server has ended, and nothing while it runs.

    Ctrl-C stops the answer where a person types (`interactive`), and all of it where none does.
    """

    def __init__(
        self,
        asker: Asker,
        source: Source,
        screen: Screen,
        system: str | None = None,
        transcript: Path | None = None,
        why_gone: Callable[[], str | None] | None = None,
        interactive: bool = True,
    ) -> None:
        self._asker = asker
        self._source = source
        self._screen = screen
        self._transcript = transcript
        self._why_gone = why_gone
        self._interactive = interactive
        self._conversation = Conversation(system)
        self._last: Answer | None = None
        self._last_is_turn = False
        self._saved: set[Path] = set()
        self._over = False
        self.num_failed = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/stats": self._stats,
            "/system": self._system,
            "/clear": self._clear,
            "/retry": self._retry,
            "/save": self._save,
            "/help": self._help,
            "/quit": self._quit,
        }

    def run(self) -> None:
        """Read and answer until the end of input or `/quit`.

        Raises `KeyboardInterrupt` on Ctrl-C unless a person types.
        """
        while not self._over:
            try:
                text = self._source.read()
                self._take(text)
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self._screen.end()
                self._screen.say(f"({LEAVE})")

    def _take(self, text: str) -> None:
        command = text.strip()
        if command.startswith("//"):
            self._ask(command[1:])
        elif command.startswith("/") and "\n" not in command:
            name, _, rest = command.partition(" ")
            known = self._commands.get(name)
            if known is None:
                self._complain(f"{name} is no command; /help lists them, //... is a question")
            else:
                known(rest.strip())
        elif command:
            self._ask(text)

    # --- questions ----------------------------------------------------------------------------

    def _ask(self, question: str) -> None:
        answer = Answer(question)
        self._last, self._last_is_turn = answer, False
        try:
            screen = self._screen
            asyncio.run(self._asker.fill(answer, self._conversation, screen.show, screen.think))
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            answer.cut = True
        except TinferClientError as error:
            answer.error = self._reason(error)
        if answer.pieces:
            self._screen.end()
        self._remember(answer)
        self._write(answer)

    def _reason(self, error: TinferClientError) -> str:
        """The end of an own server explains a broken connection better than the connection does."""
        broken = isinstance(error, ConnectionFailed | StreamBroken)
        gone = self._why_gone() if broken and self._why_gone is not None else None
        return gone or error.message

    def _remember(self, answer: Answer) -> None:
        if answer.error is not None:
            self._complain(answer.error)
        elif answer.cut and not answer.text:
            what = "its first token" if answer.reasoning is None else "it answered"
            self._screen.say(f"(stopped before {what}; the question is not kept)")
        else:
            turn = Turn(answer.question, answer.text, answer.cut)
            self._conversation.turns.append(turn)
            self._last_is_turn = True
            if answer.cut:
                self._screen.say("(stopped; what has come stays in the conversation)")
            elif not answer.text:
                is_full = answer.reasoning is not None and answer.finish_reason == "length"
                what = "has reached its greatest length before it began" if is_full else "is empty"
                self._screen.say(f"(the answer {what})")
            elif answer.finish_reason == "length":
                self._screen.say("(the answer has reached its greatest length)")

    def _write(self, answer: Answer) -> None:
        if self._transcript is None:
            return
        line = json.dumps(answer.record(), ensure_ascii=False)
        try:
            with self._transcript.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            self._complain(f"cannot write {self._transcript}: {error.strerror}")

    def _complain(self, text: str) -> None:
        self.num_failed += 1
        self._screen.say(f"error: {text}")

    # --- commands -----------------------------------------------------------------------------

    def _stats(self, _: str) -> None:
        self._screen.say("no answer yet" if self._last is None else self._last.figures())

    def _system(self, text: str) -> None:
        if not text:
            self._screen.say(f"system prompt: {self._conversation.system or 'none'}")
        elif text == "off":
            self._conversation.system = None
            self._screen.say("no system prompt")
        else:
            self._conversation.system = text
            self._screen.say("the system prompt is set")

    def _clear(self, _: str) -> None:
        self._conversation.turns.clear()
        self._last_is_turn = False
        self._screen.say("everything said is forgotten")

    def _retry(self, _: str) -> None:
        if self._last is None:
            self._complain("there is no question to ask again")
            return
        if self._last_is_turn:
            self._conversation.turns.pop()
        self._ask(self._last.question)

    def _save(self, name: str) -> None:
        path = Path(name).expanduser()
        if not name:
            self._complain("/save needs the name of a file")
            return
        if path.exists() and path.absolute() not in self._saved:
            self._complain(f"{path} exists; it is not overwritten")
            return
        as_json = path.suffix == ".json"
        text = self._conversation.as_json() if as_json else self._conversation.as_text()
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            self._complain(f"cannot write {path}: {error.strerror}")
            return
        self._saved.add(path.absolute())
        num_turns = len(self._conversation.turns)
        self._screen.say(f"{num_turns} turn{'' if num_turns == 1 else 's'} saved in {path}")

    def _help(self, _: str) -> None:
        self._screen.say(HELP)

    def _quit(self, _: str) -> None:
        self._over = True
