"""What a server's own OpenAPI document says of an answer, and whether the answer is like that."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import msgspec
from jsonschema import Draft202012Validator


class Document:
    """A served document, by operation; answers may have no field that it does not name."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.whole = document
        self.schemas: dict[str, Any] = document["components"]["schemas"]
        self.operations: dict[tuple[str, str], dict[str, Any]] = {
            (method.upper(), path): operation
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
        }
        self._open = document["components"]
        self._closed = _closed(self._open)
        self._validators: dict[tuple[bytes, bool], Any] = {}

    def body_schema(self, method: str, path: str) -> dict[str, Any]:
        """The schema of an operation's body, with references."""
        content = self.operations[method, path]["requestBody"]["content"]
        schema: dict[str, Any] = content["application/json"]["schema"]
        return schema

    def takes(self, method: str, path: str, body: object) -> bool:
        """Whether the document allows this body."""
        validator = self._validator(self.body_schema(method, path), self._open)
        return bool(validator.is_valid(body))

    def check(
        self,
        operation: tuple[str, str] | None,
        status: int,
        headers: Mapping[str, str],
        body: bytes,
    ) -> None:
        """Fail unless the answer is one that is described; None: to no operation, so an error."""
        answers = (
            {"default": next(iter(self.operations.values()))["responses"]["default"]}
            if operation is None
            else self.operations[operation]["responses"]
        )
        assert str(status) in answers or status >= 400, (operation, status, body)
        answer = answers.get(str(status), answers["default"])
        if "content" not in answer:
            assert body == b"", (operation, status, body)
            return
        kind = headers["Content-Type"].partition(";")[0]
        assert kind in answer["content"], (operation, status, kind)
        described = answer["content"][kind]
        if kind == "application/json":
            said = msgspec.json.decode(body)
            self._validate(described["schema"], said)
            if status >= 400:
                assert said["error"]["code"] == status
            if status in (429, 503):
                assert int(headers["Retry-After"]) >= 1
        elif kind == "text/event-stream":
            self._check_stream(described["schema"]["properties"], body)

    def _check_stream(self, parts: dict[str, Any], body: bytes) -> None:
        """Chunks up to the end mark, or events under their names."""
        *events, last, end = body.split(b"\n\n")
        assert end == b""
        if "event" in parts:
            for event in (*events, last):
                name, data = event.split(b"\n")
                said = msgspec.json.decode(data.removeprefix(b"data: "))
                assert name == b"event: " + said["type"].encode()
                assert said["type"] in parts["event"]["enum"]
                self._validate(parts["data"]["contentSchema"], said)
            return
        ended, content = parts["data"]["anyOf"]
        assert last == b"data: " + ended["const"].encode()
        for event in events:
            said = msgspec.json.decode(event.removeprefix(b"data: "))
            self._validate(content["contentSchema"], said)

    def _validate(self, schema: dict[str, Any], said: object) -> None:
        self._validator(schema, self._closed).validate(said)

    def _validator(self, schema: dict[str, Any], components: dict[str, Any]) -> Any:
        """Kept: the first use of one looks through all the components."""
        key = (msgspec.json.encode(schema), components is self._closed)
        if key not in self._validators:
            self._validators[key] = Draft202012Validator({**schema, "components": components})
        return self._validators[key]


def _closed(components: dict[str, Any]) -> dict[str, Any]:
    """The same schemas with no room for fields that they do not name."""
    closed = copy.deepcopy(components)
    for schema in closed["schemas"].values():
        if "properties" in schema:
            schema["additionalProperties"] = False
    return closed
