"""Every error that tinfer raises on purpose, and how a client sees each.

TinferError
├── RequestError            the request is at fault
│   ├── InvalidRequest          400
│   │   └── PromptTooLong       400
│   ├── ModelNotFound           404
│   ├── RequestNotFound         404, nothing is kept of that request
│   ├── ResponseNotFound        404, none is stored
│   ├── Unauthorized            401, no API key that this server has
│   ├── Forbidden               403, not from there
│   └── RequestTooSlow          408, the body did not come in time
├── ServerError             the request is fine, tinfer could not serve it
│   ├── TryLater                with Retry-After
│   │   ├── Overloaded          429
│   │   └── NoWorker            503, no worker lives
│   ├── DeadlinePassed          504, the answer took longer than it was given
│   ├── WorkerLost              500, the worker died with the request on it
│   ├── ParserFailed            500, what reads tool calls or reasoning broke on the answer
│   └── EngineFailed            500, the engine refused or broke on the request
└── StartError              `tinfer serve` cannot start; one line, exit code 2
    └── WorkerCannotStart
"""

from __future__ import annotations


class TinferError(Exception):
    """Base of all errors below; `message` is one line for a person."""

    http_status = 500
    error_type = "InternalServerError"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RequestError(TinferError):
    """The client has to change the request; `param` names the field at fault when one is."""

    http_status = 400
    error_type = "BadRequestError"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(RequestError):
    """A field is missing, has the wrong type, is out of range or is not supported."""


class PromptTooLong(InvalidRequest):
    """The prompt (plus the tokens asked for) does not fit the model."""


class ModelNotFound(RequestError):
    """No model of that name is served."""

    http_status = 404
    error_type = "NotFoundError"


class RequestNotFound(RequestError):
    """No request of that id is running, or was lately."""

    http_status = 404
    error_type = "NotFoundError"


class ResponseNotFound(RequestError):
    """A response of the past is asked for; none is stored."""

    http_status = 404
    error_type = "NotFoundError"


class Unauthorized(RequestError):
    """The request shows no API key, or none that this server has."""

    http_status = 401
    error_type = "AuthenticationError"


class Forbidden(RequestError):
    """Not from there: what it asks for is not for everyone who can reach the server."""

    http_status = 403
    error_type = "PermissionDeniedError"


class RequestTooSlow(RequestError):
    """The rest of the request did not come in time."""

    http_status = 408
    error_type = "RequestTimeoutError"


class ServerError(TinferError):
    """The request is valid, but it cannot be answered now."""


class TryLater(ServerError):
    """The request can be answered at another time; `retry_after_s` is when to try again."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Overloaded(TryLater):
    """A bound is reached."""

    http_status = 429
    error_type = "TooManyRequestsError"


class NoWorker(TryLater):
    """No worker that could serve the request is alive, or the server is stopping."""

    http_status = 503
    error_type = "ServiceUnavailableError"


class DeadlinePassed(ServerError):
    """The answer was not complete when the time for it was up; asking again would take as long."""

    http_status = 504
    error_type = "GatewayTimeoutError"


class WorkerLost(ServerError):
    """The worker that held the request died before it finished."""


class ParserFailed(ServerError):
    """What finds tool calls and reasoning in an answer broke on it."""


class EngineFailed(ServerError):
    """The engine refused the request or failed while it computed it."""


class StartError(TinferError):
    """`tinfer serve` cannot start; the CLI prints `message` and exits with code 2."""


class WorkerCannotStart(StartError):
    """A worker reported why it cannot serve, or died before it was ready."""
