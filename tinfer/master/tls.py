"""TLS for the server's clients, from the options that uvicorn and vLLM have for it."""

from __future__ import annotations

import ssl

from tinfer.config import ServeConfig
from tinfer.errors import StartError

# From the accepted connection to the end of its handshake; a client needs two round trips.
HANDSHAKE_TIMEOUT_S = 10.0
# How long the end of a connection waits for the other side's own.
SHUTDOWN_TIMEOUT_S = 5.0


def server_context(config: ServeConfig) -> ssl.SSLContext | None:
    """What connections are wrapped in; None for plain HTTP. Raises `StartError`."""
    if config.ssl_certfile is None:
        for flag, given in (
            ("--ssl-keyfile", config.ssl_keyfile),
            ("--ssl-ca-certs", config.ssl_ca_certs),
            ("--ssl-cert-reqs", config.ssl_cert_reqs),
        ):
            if given:
                raise StartError(f"{flag} needs --ssl-certfile")
        return None
    if config.ssl_cert_reqs and config.ssl_ca_certs is None:
        raise StartError("--ssl-cert-reqs needs --ssl-ca-certs, which say whom to trust")
    # TLS 1.2 and newer, with the cipher suites of this Python.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.VerifyMode(config.ssl_cert_reqs)
    certfile, keyfile = config.ssl_certfile, config.ssl_keyfile
    _readable("--ssl-certfile", certfile)
    _readable("--ssl-keyfile", keyfile)
    _readable("--ssl-ca-certs", config.ssl_ca_certs)
    try:
        context.load_cert_chain(certfile, keyfile, _no_password)
    except ssl.SSLError as error:
        key = f" and --ssl-keyfile {keyfile}" if keyfile else ""
        raise StartError(f"--ssl-certfile {certfile}{key}: {_reason(error)}") from error
    if config.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except ssl.SSLError as error:
            raise StartError(f"--ssl-ca-certs {config.ssl_ca_certs}: {_reason(error)}") from error
    return context


def _no_password() -> str:
    """Else OpenSSL would ask at the terminal for it."""
    raise StartError("--ssl-keyfile: the private key is encrypted; a server cannot ask for it")


def _readable(flag: str, path: str | None) -> None:
    """OpenSSL's own message names neither the file nor the option."""
    if path is None:
        return
    try:
        with open(path, "rb"):
            return
    except OSError as error:
        raise StartError(f"{flag}: cannot read {path}: {error.strerror}") from error


def _reason(error: ssl.SSLError) -> str:
    words = (error.reason or "not PEM").replace("_", " ").lower()
    return f"no certificate that can be used ({words})"
