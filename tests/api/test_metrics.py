"""`GET /metrics`: who may ask, and in which format the answer comes."""

from __future__ import annotations

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from tests.api.conftest import Server
from tinfer.api.keys import ApiKeys

# Source: what Prometheus 2.55 and 3.5 send.
OLD = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
NEW = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


async def scrape(server: Server, accept: str | None = None, query: str = "") -> tuple[str, str]:
    headers = {} if accept is None else {"Accept": accept}
    async with server.session.get(f"{server.url}/metrics{query}", headers=headers) as response:
        assert response.status == 200
        return response.headers["Content-Type"], await response.text()


@pytest.mark.parametrize("accept", [None, "", "*/*", "text/plain", "application/json", "x;=,;"])
async def test_the_format_of_prometheus_by_default(server: Server, accept: str | None) -> None:
    server.service.count.labels("there").inc(3)
    kind, text = await scrape(server, accept)
    assert kind == "text/plain; version=0.0.4; charset=utf-8"
    found = {family.name: family for family in text_string_to_metric_families(text)}
    assert found["canned"].samples[0].value == 3
    assert found["canned_state"].samples[0].value == 2


@pytest.mark.parametrize("accept", [OLD, NEW])
async def test_openmetrics_where_it_is_asked_for(server: Server, accept: str) -> None:
    server.service.count.labels("there").inc(3)
    kind, text = await scrape(server, accept)
    assert kind.startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    found = {family.name: family for family in openmetrics_families(text)}  # type: ignore[no-untyped-call]
    assert found["canned"].samples[0].value == 3
    assert found["canned_state"].samples[0].value == 2


async def test_one_series_of_all(server: Server) -> None:
    _, text = await scrape(server, query="?name[]=canned_state&name[]=no_such")
    assert [family.name for family in text_string_to_metric_families(text)] == ["canned_state"]
    _, text = await scrape(server, OLD, query="?name[]=no_such")
    assert text == "# EOF\n"


@pytest.mark.parametrize("options", [{"api_keys": ApiKeys(["sk-one"])}], indirect=True)
async def test_it_needs_no_key(server: Server) -> None:
    _, text = await scrape(server)
    assert "canned_state" in text


async def test_it_cannot_be_posted_to(server: Server) -> None:
    async with server.session.post(server.url + "/metrics") as response:
        assert (response.status, response.headers["Allow"]) == (405, "GET")
