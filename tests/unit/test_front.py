"""What a server shows to its clients, settled before the start: keys, address, pages."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import Authority
from tinfer import unix_socket
from tinfer.config import ServeConfig, load
from tinfer.errors import StartError
from tinfer.master.front import api_options, open_front
from tinfer.master.keys import VARIABLES, take_keys

SECRET = "sk-not-to-be-seen"


# --- keys -----------------------------------------------------------------------------------------


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("sk-one\n\n  sk-two \r\nsk-three")
    path.chmod(0o600)
    return path


def admitted(keys: Any, *texts: str) -> list[bool]:
    return [keys.admit(f"Bearer {text}") for text in texts]


def test_keys_of_options_and_file_add_up(key_file: Path) -> None:
    config = load({"api_key": ("sk-flag", "sk-flag2"), "api_key_file": str(key_file)})
    keys = take_keys(config, {"TINFER_API_KEY": "sk-env"})
    names = ("sk-flag", "sk-flag2", "sk-one", "sk-two", "sk-three")
    assert admitted(keys, *names) == [True] * 5
    # As in vLLM: what was given for this start counts, not what the shell has.
    assert admitted(keys, "sk-env", "", " ") == [False] * 3


def test_keys_of_the_environment() -> None:
    environment = {"VLLM_API_KEY": "sk-vllm", "PATH": "x"}
    assert admitted(take_keys(ServeConfig(), environment), "sk-vllm") == [True]
    assert environment == {"PATH": "x"}
    both = {"TINFER_API_KEY": "sk-ours", "VLLM_API_KEY": "sk-vllm"}
    assert admitted(take_keys(ServeConfig(), both), "sk-ours", "sk-vllm") == [True, False]
    assert len(take_keys(ServeConfig(), {})) == 0


def test_a_child_inherits_no_key_whichever_counts() -> None:
    environment = dict.fromkeys(VARIABLES, SECRET)
    take_keys(load({"api_key": ("sk-flag",)}), environment)
    assert environment == {}


@pytest.mark.parametrize("name", VARIABLES)
def test_an_empty_variable_is_no_open_server(name: str) -> None:
    with pytest.raises(StartError, match=name):
        take_keys(ServeConfig(), {name: ""})


@pytest.mark.parametrize("key", ["", f"{SECRET} x", f"{SECRET}\n", f"{SECRET}é", f" {SECRET}"])
def test_what_no_header_would_carry_is_no_key(key: str) -> None:
    with pytest.raises(StartError, match="--api-key: ") as caught:
        take_keys(load({"api_key": ("sk-good", key)}), {})
    assert SECRET not in caught.value.message and "sk-good" not in caught.value.message


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o644, 0o666])
def test_a_file_that_is_open_to_others(key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    with pytest.raises(StartError, match="--api-key-file: .* is open to other users"):
        take_keys(load({"api_key_file": str(key_file)}), {})


@pytest.mark.parametrize("mode", [0o400, 0o640])
def test_a_file_that_is_not(key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    assert len(take_keys(load({"api_key_file": str(key_file)}), {})) == 3


def test_a_pipe_is_a_file_too() -> None:
    """As of `--api-key-file <(command)`."""
    read_end, write_end = os.pipe()
    os.write(write_end, b"sk-piped\n")
    os.close(write_end)
    try:
        keys = take_keys(load({"api_key_file": f"/dev/fd/{read_end}"}), {})
    finally:
        os.close(read_end)
    assert admitted(keys, "sk-piped") == [True]


def test_files_without_a_key(key_file: Path, tmp_path: Path) -> None:
    for text, why in (("", "no key"), (" \n\n", "no key"), (f"{SECRET} x\n", "printable")):
        key_file.write_text(text)
        with pytest.raises(StartError, match=why) as caught:
            take_keys(load({"api_key_file": str(key_file)}), {})
        assert SECRET not in caught.value.message
    key_file.write_bytes(b"\xff\xfe")
    for path in (key_file, tmp_path / "missing", tmp_path):
        with pytest.raises(StartError, match="--api-key-file: "):
            take_keys(load({"api_key_file": str(path)}), {})
    key_file.write_text("k\n" * (1 << 20))
    with pytest.raises(StartError, match="more than"):
        take_keys(load({"api_key_file": str(key_file)}), {})


# --- the socket -----------------------------------------------------------------------------------


@pytest.fixture
def path() -> Iterator[str]:
    """Short enough for a socket, in a folder where nobody else is."""
    folder = Path(os.environ["TMPDIR"]) / "front"
    folder.mkdir()
    yield str(folder / "s.sock")
    for left in folder.iterdir():
        left.unlink()
    folder.rmdir()


def dead_socket(path: str) -> tuple[int, int]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
    return unix_socket.inode_of(path)


def test_a_unix_socket_is_for_this_user_and_goes_with_the_server(path: str) -> None:
    old = os.umask(0)
    try:
        with open_front(load({"uds": path}), {}) as (config, front):
            found = os.lstat(path)
            assert stat.S_ISSOCK(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600
            assert (front.url, front.port, config.uds) == (f"unix:{path}", 0, path)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
    finally:
        os.umask(old)
    assert not os.path.lexists(path)


def test_a_path_is_made_whole(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(os.path.dirname(path))
    with open_front(load({"uds": "s.sock"}), {}) as (config, front):
        assert (config.uds, front.url) == (path, f"unix:{path}")


def test_a_dead_servers_socket_is_replaced(path: str) -> None:
    dead_socket(path)
    with open_front(load({"uds": path}), {}) as (_, front):
        front.listener.setblocking(True)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            front.listener.accept()[0].close()
    assert not os.path.lexists(path)


def test_a_live_servers_socket_stays(path: str) -> None:
    with open_front(load({"uds": path}), {}):
        live = unix_socket.inode_of(path)
        with pytest.raises(StartError, match="--uds .* a server listens there"):
            with open_front(load({"uds": path}), {}):
                pass
        unix_socket.remove_dead(path)
        assert unix_socket.inode_of(path) == live


def test_what_is_no_socket_stays(path: str) -> None:
    target = path + ".target"
    dead_socket(target)
    for make, why in (
        (lambda: os.symlink(target, path), "symbolic link"),
        (lambda: os.symlink(path + ".nothing", path), "symbolic link"),
        (lambda: Path(path).write_text("precious"), "no socket"),
        (lambda: os.mkfifo(path), "no socket"),
    ):
        make()
        with pytest.raises(StartError, match=f"--uds .*{why}"):
            with open_front(load({"uds": path}), {}):
                pass
        unix_socket.remove_dead(path)
        assert os.path.lexists(path) and os.path.lexists(target)
        os.unlink(path)


def test_another_users_socket_stays(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dead_socket(path)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(StartError, match="another user"):
        with open_front(load({"uds": path}), {}):
            pass
    assert os.path.lexists(path)


def test_a_file_that_has_taken_its_place_stays(path: str) -> None:
    """Somebody has removed the socket and put another there meanwhile."""
    with open_front(load({"uds": path}), {}):
        os.rename(path, path + ".old")
        dead_socket(path)
    assert os.path.lexists(path)


def test_places_where_no_socket_can_be(path: str, tmp_path: Path) -> None:
    for bad in (path + "x" * 108, path + "/s", str(tmp_path / "no" / "s"), "", "."):
        with pytest.raises(StartError, match="--uds"):
            with open_front(load({"uds": bad}), {}):
                pass


# --- all of it ------------------------------------------------------------------------------------


def test_urls(tmp_path: Path) -> None:
    certfile, keyfile = map(str, Authority(tmp_path).issue("server"))
    tls = {"ssl_certfile": certfile, "ssl_keyfile": keyfile}
    for options, start in (
        ({}, "http://127.0.0.1:"),
        ({"host": "::1"}, "http://[::1]:"),
        (tls, "https://127.0.0.1:"),
    ):
        with open_front(load({"port": 0, **options}), {}) as (_, front):
            assert front.url == f"{start}{front.port}"
            assert front.port == front.listener.getsockname()[1]


def test_options_go_on_without_the_keys() -> None:
    given = {"port": 0, "api_key": (SECRET,), "allowed_origins": ("https://a.org",)}
    with open_front(load(given), {}) as (config, front):
        assert config == load({**given, "api_key": ()})
        assert SECRET not in repr(config) + repr(front)
        assert len(front.keys) == 1 and front.cors.origins == ("https://a.org",)


def test_the_api_is_told_what_the_options_say(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"top_k": 7}')
    given: dict[str, Any] = {
        **{"strict_params": True, "request_timeout": 3.0, "engine_arg": {"max_logprobs": 5}},
        **{"trust_request_chat_template": True, "exclude_tools_when_tool_choice_none": True},
        "default_chat_template_kwargs": {"enable_thinking": False},
    }
    with open_front(load({"port": 0, **given}), {}) as (config, front):
        told = api_options(config, front, tmp_path)
        plain = api_options(load({}), front, tmp_path)
    for name in given.keys() - {"request_timeout", "engine_arg"}:
        assert getattr(told, name) == given[name] != getattr(plain, name)
    assert (told.request_timeout_s, told.max_logprobs, told.sampling_defaults.top_k) == (3.0, 5, 7)
    assert told.api_keys is front.keys and told.cors is front.cors


def test_bad_options_take_no_address() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for bad in ({"api_key": ("",)}, {"ssl_keyfile": "x"}, {"allowed_origins": ("a",)}):
        with pytest.raises(StartError):
            with open_front(load({"port": port, **bad}), {}):
                pass
    with socket.socket() as still_free:
        still_free.bind(("127.0.0.1", port))
