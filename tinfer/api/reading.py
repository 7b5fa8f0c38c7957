"""Answers read by their parsers, whole or as a stream, for whoever shows them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from tinfer.api.parsing import AnswerParser, ChatParsing, Piece, Said
from tinfer.api.service import Delta
from tinfer.api.serving import Answer
from tinfer.errors import ParserFailed

log = logging.getLogger(__name__)


class ParsedStream:
    """One streamed answer with its parser. One that has failed stays failed: it has no way back to
    where it was, and a delta may be offered twice."""

    def __init__(self, parsing: ChatParsing) -> None:
        self._parsing = parsing
        self._parser: AnswerParser | None = None
        self._token_ids: list[int] = []
        self._failure: ParserFailed | None = None
        self.has_called = False

    def piece(self, delta: Delta) -> Piece | None:
        """Raises `ParserFailed`."""
        if self._failure is not None:
            raise self._failure
        self._token_ids += delta.token_ids
        try:
            self._parser = self._parser or self._parsing.new()
            piece = _read(self._parser, delta)
        except Exception as error:  # noqa: BLE001 - a parser may raise anything about what it reads
            self._failure = _failed(error)
            raise self._failure from error
        self.has_called = self.has_called or bool(piece and piece.tool_calls)
        return piece

    def count_reasoning(self) -> int:
        return 0 if self._parser is None else self._parser.count_reasoning(self._token_ids)


def _read(parser: AnswerParser, delta: Delta) -> Piece | None:
    """What a delta adds, read step by step: many parsers lose what comes with what is before it."""
    begins = [(0, 0), *(delta.seams or ())]
    ends = [*begins[1:], (len(delta.text), len(delta.token_ids))]
    read: Piece | None = None
    for number, ((char, token), (end_char, end_token)) in enumerate(zip(begins, ends, strict=True)):
        finished = delta.finish_reason is not None and number == len(begins) - 1
        piece = parser.piece(delta.text[char:end_char], delta.token_ids[token:end_token], finished)
        read = piece if read is None else read.followed_by(piece)
    return read


def take_apart(parsing: ChatParsing, answers: Sequence[Answer]) -> list[Said]:
    """Raises `ParserFailed`."""
    try:
        return [parsing.new().whole("".join(said.text), said.token_ids) for said in answers]
    except Exception as error:  # a parser may raise anything about what it reads
        raise _failed(error) from error


def _failed(error: Exception) -> ParserFailed:
    log.error("a parser broke on an answer", exc_info=error)
    return ParserFailed(f"the parser broke on this answer: {type(error).__name__}")
