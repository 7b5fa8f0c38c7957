"""A real server and who it lets in: keys that nothing shows, TLS, a socket that goes with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.certificates import Authority
from tests.e2e.serving import ServeProcess, run_to_end, serving, wait_gone
from tests.process.load import fake_flags
from tinfer.client import Client, Unauthorized

KEYS = ("sk-of-the-flag", "sk-of-the-file", "sk-of-the-environment")


@pytest.fixture
def socket_path() -> Iterator[str]:
    """Short enough for a socket; the leak check sees what is left there."""
    yield f"{os.environ['TMPDIR']}/s.sock"


def answer(url: str, key: str | None = None, tls: ssl.SSLContext | None = None) -> int:
    """How many tokens an answer of the server has."""
    with Client(url, key, ssl_context=tls, max_retries=0) as client:
        done = client.completions([5] * 20, max_tokens=4, ignore_eos=True)
        assert done.usage is not None and done.usage.completion_tokens is not None
        return done.usage.completion_tokens


def shown(process: psutil.Process) -> str:
    """Its command line and its environment."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join([*process.cmdline(), *process.environ().values()])
    return ""


def test_keys_are_wanted_and_nowhere_to_be_seen(tmp_path: Path) -> None:
    key_file = tmp_path / "keys"
    key_file.write_text(f"{KEYS[1]}\n")
    key_file.chmod(0o600)
    logs = tmp_path / "logs"
    logs.mkdir()
    written = {"event_log": tmp_path / "events", "request_log": tmp_path / "requests"}
    flags = fake_flags({}, prefill=1, decode=1, log_dir=logs, **written)
    keyed = (*flags, "--api-key", KEYS[0], "--api-key-file", str(key_file), "--verbose")
    environment = {"TINFER_API_KEY": KEYS[2], "VLLM_API_KEY": KEYS[2]}
    with serving(tmp_path, *keyed, environment=environment) as server:
        for key in KEYS[:2]:
            assert answer(server.url, key) == 4
        for wrong in (None, KEYS[2], KEYS[0][:-1]):
            with pytest.raises(Unauthorized):
                answer(server.url, wrong)
        seen = [server.output]
        for path in ("/debug/state", "/debug/ledger", "/version"):
            asked = urllib.request.Request(
                server.url + path, headers={"Authorization": f"Bearer {KEYS[0]}"}
            )
            with urllib.request.urlopen(asked) as response:
                seen.append(response.read().decode())
        # The master's own has the flag, which is why a file is better.
        _, *children = server.family()
        assert len(children) == 3
        seen += [shown(child) for child in children]
        seen += _texts(server.run_dir())
    seen += _texts(logs) + [path.read_text() for path in written.values()]
    assert "2, of which clients must show one" in server.output
    assert [key for key in KEYS for text in seen if key in text] == []


def _texts(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.read_bytes().decode(errors="replace") for path in files]


def test_a_plan_shows_no_key(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tinfer", "serve", *fake_flags({}, prefill=1, decode=0)]
    done = subprocess.run(
        [*command, "--port", "0", "--dry-run", "--json", "-", "--api-key", KEYS[0]],
        capture_output=True,
        text=True,
        env={**os.environ, "TINFER_API_KEY": KEYS[2]},
        check=True,
    )
    assert '"workers"' in done.stdout
    assert "sk-of" not in done.stdout + done.stderr


def test_https(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certfile, keyfile = authority.issue("server")
    flags = fake_flags({}, prefill=1, decode=1, log_dir=tmp_path)
    tls = ("--ssl-certfile", str(certfile), "--ssl-keyfile", str(keyfile))
    server = ServeProcess(tmp_path, *flags, *tls)
    try:
        server.wait_progress(" serves ")
        url = server.output.partition(" serves ")[2].split()[2]
        assert url.startswith("https://127.0.0.1:")
        assert answer(url, tls=authority.trusting()) == 4
        # The chat knows the authority by OpenSSL's own variable.
        asked = subprocess.run(
            [sys.executable, "-m", "tinfer", "chat", "--url", url, "--max-tokens", "3"],
            input=b"hi\n",
            capture_output=True,
            env={**os.environ, "SSL_CERT_FILE": str(authority.cert_path)},
            check=False,
        )
        assert (asked.returncode, asked.stdout != b"") == (0, True), asked.stderr
        family = server.family()
        assert server.interrupt() == 0, server.output
        assert wait_gone(family) == []
    finally:
        server.stop()


def test_a_certificate_that_cannot_be_used_ends_the_start(tmp_path: Path) -> None:
    flags = fake_flags({}, prefill=1, decode=0)
    code, line = run_to_end(tmp_path, *flags, "--ssl-certfile", str(tmp_path / "none.pem"))
    assert code == 2
    assert line.startswith("tinfer: --ssl-certfile: cannot read ")


# --- a Unix socket --------------------------------------------------------------------------------


@contextlib.contextmanager
def on_socket(folder: Path, path: str) -> Iterator[ServeProcess]:
    flags = fake_flags({}, prefill=1, decode=1, log_dir=folder)
    server = ServeProcess(folder, *flags, "--uds", path)
    try:
        server.wait_progress(f" on unix:{path}\n")
        yield server
    finally:
        server.stop()


def test_a_unix_socket(tmp_path: Path, socket_path: str) -> None:
    with on_socket(tmp_path, socket_path) as server:
        assert answer(f"unix:{socket_path}") == 4
        family, run_dir = server.family(), server.run_dir()
        listening = [c for p in family for c in p.net_connections("tcp")]
        assert listening == []
        other = tmp_path / "other"
        other.mkdir()
        flags = fake_flags({}, prefill=1, decode=0)
        code, line = run_to_end(other, *flags, "--uds", socket_path)
        assert (code, line.endswith("a server listens there")) == (2, True)
        # Which has done it no harm.
        assert answer(f"unix:{socket_path}") == 4
        assert server.interrupt() == 0, server.output
        assert wait_gone(family) == []
        assert not run_dir.exists()
    assert not os.path.lexists(socket_path)


def test_the_socket_of_a_killed_server_goes(tmp_path: Path, socket_path: str) -> None:
    with on_socket(tmp_path, socket_path) as server:
        family = server.family()
        server.kill()
        # The import process is the last to go, and takes it along.
        assert wait_gone(family) == []
        assert not os.path.lexists(socket_path)


def test_the_socket_that_nobody_was_left_to_remove_is_replaced(
    tmp_path: Path, socket_path: str
) -> None:
    with on_socket(tmp_path, socket_path) as server:
        family, run_dir = server.family(), server.run_dir()
        server.process.send_signal(signal.SIGSTOP)  # it would start them again
        for process in family[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        server.kill()
        assert wait_gone(family) == []
        shutil.rmtree(run_dir)
        assert os.path.lexists(socket_path)
    with on_socket(tmp_path, socket_path):
        assert answer(f"unix:{socket_path}") == 4
