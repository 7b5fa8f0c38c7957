"""`LLM`: a server of its own behind two methods.

The server is a child (`own_server.py`) on a loopback port with a key that nobody else has; requests
go to it through the client, in the client's thread. All of it ends with `close()`, with the block
of a `with`, with the object, or with the process, whichever comes first.
"""

from __future__ import annotations

import os
import secrets
import sys
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from tinfer.client import AsyncClient, ConnectionFailed
from tinfer.client.loop_thread import LoopThread
from tinfer.client.many import each
from tinfer.errors import StartError
from tinfer.offline.outputs import RequestOutput, of_chat, of_completion
from tinfer.offline.params import (
    Conversation,
    Conversations,
    Prompt,
    Sampling,
    as_conversations,
    as_prompts,
    chat_fields,
    completion_fields,
    per_input,
)
from tinfer.offline.serve_words import serve_words
from tinfer.own_server import OwnServer

# As many sequences as two workers take in one step (--max-num-seqs).
DEFAULT_CONCURRENCY = 512
NUM_LAST_LINES = 3

_Ask = Callable[[], Coroutine[Any, Any, RequestOutput]]


class LLM:
    """A model for a script; what runs it is started here and ends with it.

        with tinfer.LLM("Qwen/Qwen3-8B", prefill=1, decode=3) as llm:
            for output in llm.generate(prompts, tinfer.SamplingParams(max_tokens=64)):
                print(output.prompt, output.outputs[0].text)

    `model` and `serve_options` are those of `tinfer serve`, by name (docs/config.md), without those
    of its address and of who may ask it; without a model it is the built-in one. `show` gets the
    progress of the start, line by line. At most `max_concurrency` requests are under way at once,
    each for `timeout_s` at most.

    Raises `StartError` where the server does not start and `TypeError` for an unknown option. The
    methods raise `TinferClientError`: the first error ends the call and all that it has under way.
    Several threads may call them. Once the server has ended, they raise `ConnectionFailed`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        max_concurrency: int = DEFAULT_CONCURRENCY,
        timeout_s: float | None = None,
        show: Callable[[str], None] | None = None,
        **serve_options: Any,
    ) -> None:
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency is {max_concurrency}, and at least 1 is needed")
        key = secrets.token_urlsafe(32)
        self._server = _started(serve_words(model, serve_options), key, show)
        self._client = AsyncClient(
            self._server.url, key, timeout_s=timeout_s, max_connections=max_concurrency
        )
        self._max_concurrency = max_concurrency
        self._thread = LoopThread(self._client.close)
        self._close = weakref.finalize(self, _shut, self._thread, self._server, os.getpid())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server and wait until it has; calls of other threads fail."""
        self._close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Sampling | Sequence[Sampling] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue each prompt; outputs are in the order of the prompts.

        A prompt is text or token ids, or a mapping with `prompt` or `prompt_token_ids`. Sampling
        parameters, for all or one for each, are `SamplingParams` or a mapping with fields of
        `/v1/completions`.
        """
        asked = as_prompts(prompts)
        client = self._client

        def ask(prompt: str | list[int], fields: Mapping[str, Any]) -> _Ask:
            async def answer() -> RequestOutput:
                return of_completion(prompt, await client.completions(prompt, extra=fields))

            return answer

        fields = [completion_fields(one) for one in per_input(sampling_params, len(asked))]
        return self._all([ask(*one) for one in zip(asked, fields, strict=True)], use_tqdm)

    def chat(
        self,
        messages: Conversations,
        sampling_params: Sampling | Sequence[Sampling] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several, in their order; text is a user's message.

        Sampling parameters as of `generate`, mappings with fields of `/v1/chat/completions`. The
        last five say how the chat template makes a prompt of the messages. As with vLLM's `LLM` an
        answer is the text that the model wrote, calls of `tools` included, unless a mapping's
        `tool_choice` has the server look for them.
        """
        asked = as_conversations(messages)
        client = self._client
        choice = None if tools is None else "none"

        def ask(conversation: Conversation, fields: Mapping[str, Any]) -> _Ask:
            async def answer() -> RequestOutput:
                said = await client.chat(
                    conversation,
                    extra=fields,
                    chat_template=chat_template,
                    chat_template_kwargs=chat_template_kwargs,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tools=tools,
                    tool_choice=choice,
                )
                return of_chat(said)

            return answer

        fields = [chat_fields(one) for one in per_input(sampling_params, len(asked))]
        return self._all([ask(*one) for one in zip(asked, fields, strict=True)], use_tqdm)

    def _all(self, asks: Sequence[_Ask], use_tqdm: bool) -> list[RequestOutput]:
        max_concurrency = min(self._max_concurrency, len(asks))
        if not asks:
            return []
        with tqdm(total=len(asks), unit="req", file=sys.stderr, disable=not use_tqdm) as bar:
            try:
                return self._thread.run(lambda: _in_order(asks, max_concurrency, bar.update))
            except ConnectionFailed as error:
                why = self._server.why_gone() if self._close.alive else None
                if why is None:
                    raise
                raise ConnectionFailed(why) from error


async def _in_order(
    asks: Sequence[_Ask], max_concurrency: int, on_done: Callable[[], object]
) -> list[RequestOutput]:
    """What each comes to. It keeps no `LLM`, which must not end in the thread that runs this."""
    found: dict[int, RequestOutput] = {}

    async def answer(item: tuple[int, _Ask]) -> None:
        number, ask = item
        found[number] = await ask()
        on_done()

    numbered: Iterator[tuple[int, _Ask]] = iter(enumerate(asks))
    await each(numbered, answer, max_concurrency)
    return [found[number] for number in range(len(asks))]


def _started(words: Sequence[str], key: str, show: Callable[[str], None] | None) -> OwnServer:
    """Raises `StartError` with what the server said last, where nobody was shown it."""
    last: deque[str] = deque(maxlen=NUM_LAST_LINES)
    try:
        return OwnServer(words, show or last.append, {"TINFER_API_KEY": key})
    except StartError as error:
        if not last:
            raise
        raise StartError(f"{error.message}: {' | '.join(last)}") from error


def _shut(thread: LoopThread, server: OwnServer, owner: int) -> None:
    # A fork of the process has a copy of the object, and the server is not its own.
    if os.getpid() == owner:
        thread.close()
        server.stop()
