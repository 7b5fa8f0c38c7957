"""Prompts as token ids: the tokenizer and chat template of a local model directory.

Everything here runs on a small pool of threads that the renderer owns, so that neither a long
prompt nor a slow template holds up the event loop. torch is never imported: `AutoTokenizer` would
import it, so `tokenizer.json` is loaded by the generic class that needs only `tokenizers`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from msgspec import Struct

from tinfer.api.messages import conversation
from tinfer.api.schemas import Message
from tinfer.errors import InvalidRequest, Overloaded, PromptTooLong, StartError

T = TypeVar("T")

MAX_PENDING = 1024
NUM_THREADS = 2
RESERVED_KWARGS = frozenset(
    {
        "chat_template",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer with a `tokenizers` backend."""

    backend_tokenizer: Any
    chat_template: Any

    def decode(self, token_ids: list[int]) -> str: ...
    def get_vocab(self) -> dict[str, int]: ...
    def get_chat_template(self, chat_template: str | None = None) -> str: ...
    def apply_chat_template(self, conversation: list[dict[str, Any]], **kwargs: Any) -> str: ...


class ChatOptions(Struct, frozen=True):
    """How to render one chat; `template` None is the model's own.

    With `any_length` the result may be longer than the model.
    """

    template: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    any_length: bool = False
    kwargs: dict[str, Any] = {}


class Prompt(Struct, frozen=True):
    """A rendered prompt; `text` is what was tokenised, None when ids came from the client."""

    token_ids: list[int]
    text: str | None = None


class Renderer:
    """Owns the tokenizer, the chat template and the threads they run on."""

    def __init__(
        self, tokenizer: Tokenizer, chat_template: str | None, max_model_len: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # A tokenizer.json may carry the padding and truncation of its training run.
        self._backend.no_padding()
        self._backend.no_truncation()
        self._chat_template = chat_template
        longest = max(map(len, tokenizer.get_vocab()), default=1)
        self._max_chars = None if max_model_len is None else max_model_len * longest
        self._executor = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="render")
        self._num_pending = 0

    @classmethod
    async def load(
        cls, model_dir: Path, chat_template: str | None = None, max_model_len: int | None = None
    ) -> Renderer:
        """Load from files only; `chat_template` is a path or the template itself.

        With `max_model_len`, a text that cannot fit whatever its tokens is refused unread.
        Raises `StartError` when there is no usable tokenizer or template.
        """
        return await asyncio.to_thread(cls._load, model_dir, chat_template, max_model_len)

    @classmethod
    def _load(
        cls, model_dir: Path, chat_template: str | None, max_model_len: int | None
    ) -> Renderer:
        template = None if chat_template is None else read_template(chat_template)
        return cls(_load_tokenizer(model_dir), template, max_model_len)

    def close(self) -> None:
        """Stop the threads once what runs on them returns; what waits for one is cancelled."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def encode(
        self, text: str, add_special_tokens: bool = True, any_length: bool = False
    ) -> Prompt:
        """Token ids of a text. Raises `InvalidRequest`, or `Overloaded` when too many wait.

        With `any_length` the text may be longer than the model.
        """
        return await self.run(lambda: self._encode(text, add_special_tokens, "prompt", any_length))

    async def decode(self, token_ids: list[int]) -> str:
        """The text of token ids, special tokens included."""
        return await self.run(lambda: self._tokenizer.decode(token_ids))

    async def token_strings(self, token_ids: list[int]) -> list[str]:
        """The strings under which the vocabulary has these ids, which `encode` has given."""
        return await self.run(lambda: [self._backend.id_to_token(i) for i in token_ids])

    async def render_chat(self, messages: list[Message], options: ChatOptions) -> Prompt:
        """The chat through the template, then tokenised without special tokens by default.

        Raises `InvalidRequest` with the template's own reason when it refuses the messages.
        """
        return await self.run(lambda: self._render_chat(messages, options))

    @property
    def tokenizer(self) -> Tokenizer:
        """For what reads answers by the same vocabulary; never truncates or pads."""
        return self._tokenizer

    async def run(self, work: Callable[[], T]) -> T:
        """`work` on one of the threads. Raises what it raises, and `Overloaded`."""
        if self._num_pending >= MAX_PENDING:
            raise Overloaded("too many prompts are waiting to be tokenised")
        self._num_pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        finally:
            self._num_pending -= 1

    def _encode(self, text: str, add_special_tokens: bool, param: str, any_length: bool) -> Prompt:
        limit = None if any_length else self._max_chars
        if limit is not None and len(text) > limit:
            raise PromptTooLong(
                f"the prompt has {len(text)} characters, more than the {limit} that "
                "could fit the model's length",
                param=param,
            )
        # The fast path of the library sets truncation on the shared object, which is not safe
        # between threads; the object itself encodes without side effects. `encode` would hold the
        # interpreter lock for as long as it takes, and with it every stream: 7 ms for 20,000 bytes.
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        return Prompt(token_ids=encoding.ids, text=text)

    def _render_chat(self, messages: list[Message], options: ChatOptions) -> Prompt:
        reserved = RESERVED_KWARGS & options.kwargs.keys()
        if reserved:
            raise InvalidRequest(
                f"{', '.join(sorted(reserved))} cannot be set", param="chat_template_kwargs"
            )
        template = self._template(options.template)
        chat = conversation(messages, template)
        kwargs = options.kwargs | {
            "add_generation_prompt": options.add_generation_prompt,
            "continue_final_message": options.continue_final_message,
        }
        try:
            text = self._tokenizer.apply_chat_template(
                chat, chat_template=template, tokenize=False, **kwargs
            )
        except Exception as error:  # noqa: BLE001 - a template is a program and may raise anything
            raise InvalidRequest(
                f"the chat template failed: {_reason(error)}", param="messages"
            ) from error
        return self._encode(text, options.add_special_tokens, "messages", options.any_length)

    def _template(self, asked: str | None) -> str:
        if asked is not None:
            return asked
        if self._chat_template is not None:
            return self._chat_template
        try:
            return self._tokenizer.get_chat_template()
        except ValueError as error:
            raise InvalidRequest(
                "the model has no chat template; start the server with --chat-template",
                param="messages",
            ) from error


def read_template(path_or_text: str) -> str:
    """A template from a file, or the argument itself when it looks like Jinja.

    Source of the rule: vLLM `--chat-template`.
    """
    if not any(char in path_or_text for char in "{}\n"):
        try:
            return Path(path_or_text).read_text(encoding="utf-8")
        except OSError as error:
            raise StartError(f"cannot read the chat template: {error}") from error
    return path_or_text


def _load_tokenizer(model_dir: Path) -> Tokenizer:
    if not (model_dir / "tokenizer.json").is_file():
        raise StartError(f"no tokenizer.json in {model_dir}")
    # One text at a time has nothing to share out, and a pool of threads would not survive a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    try:
        tokenizer: Tokenizer = TokenizersBackend.from_pretrained(
            str(model_dir), local_files_only=True
        )
    except Exception as error:  # noqa: BLE001 - the library raises whatever its parsers raise
        raise StartError(f"cannot load the tokenizer of {model_dir}: {error}") from error
    return tokenizer


def _reason(error: BaseException) -> str:
    """The template's own words when it raised some, at the root of a chain of wrappers."""
    import jinja2

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, jinja2.TemplateError):
            return str(seen)
        seen = seen.__cause__ or seen.__context__
    return str(error)
