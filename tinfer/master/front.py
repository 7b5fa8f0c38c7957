"""What a server shows to its clients: an address, TLS, keys, and which web pages may ask.

All of it is settled, and the address taken, before anything heavy starts.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import msgspec
from msgspec import Struct

from tinfer import __version__, unix_socket
from tinfer.api.cors import Cors
from tinfer.api.keys import ApiKeys
from tinfer.api.options import ApiOptions
from tinfer.api.sampling import load_sampling_defaults
from tinfer.config import ServeConfig
from tinfer.master.keys import take_keys
from tinfer.master.listener import bind, bind_unix
from tinfer.master.tls import server_context


class Front(Struct, frozen=True):
    """The listening socket, and who gets what through it."""

    listener: socket.socket
    tls: ssl.SSLContext | None
    keys: ApiKeys
    cors: Cors

    @property
    def port(self) -> int:
        """0 where it is no TCP port."""
        name = self.listener.getsockname()
        return 0 if isinstance(name, str) else int(name[1])

    @property
    def url(self) -> str:
        """Where clients find it; `unix:PATH` for a Unix socket."""
        name = self.listener.getsockname()
        if isinstance(name, str):
            return f"unix:{name}"
        host, port = name[:2]
        scheme = "http" if self.tls is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


@contextlib.contextmanager
def open_front(
    config: ServeConfig, environment: MutableMapping[str, str]
) -> Iterator[tuple[ServeConfig, Front]]:
    """The options without the keys and with whole paths, and the front that they say.

    The socket is closed at the end, and its file removed where it has one. Raises `StartError`.
    """
    keys = take_keys(config, environment)
    cors = Cors(
        origins=config.allowed_origins,
        methods=config.allowed_methods,
        headers=config.allowed_headers,
        credentials=config.allow_credentials,
    )
    cors.check()
    tls = server_context(config)
    uds = None if config.uds is None else os.path.abspath(config.uds)
    rest = msgspec.structs.replace(config, api_key=(), uds=uds)
    with _listening(rest) as listener:
        yield rest, Front(listener, tls, keys, cors)


def api_options(config: ServeConfig, front: Front, model_dir: Path) -> ApiOptions:
    """What the HTTP layer is told. Raises `StartError` for a generation config that makes no
    sense."""
    return ApiOptions(
        version=__version__,
        strict_params=config.strict_params,
        max_logprobs=config.max_logprobs,
        request_timeout_s=config.request_timeout,
        api_keys=front.keys,
        cors=front.cors,
        sampling_defaults=load_sampling_defaults(model_dir),
        trust_request_chat_template=config.trust_request_chat_template,
        default_chat_template_kwargs=config.default_chat_template_kwargs,
        exclude_tools_when_tool_choice_none=config.exclude_tools_when_tool_choice_none,
    )


@contextlib.contextmanager
def _listening(config: ServeConfig) -> Iterator[socket.socket]:
    if config.uds is None:
        with bind(config.host, config.port) as listener:
            yield listener
        return
    with bind_unix(config.uds) as listener:
        path = listener.getsockname()
        inode = unix_socket.inode_of(path)
        try:
            yield listener
        finally:
            unix_socket.remove_own(path, inode)
