"""GET /openapi.json says what the server does: schemathesis makes requests of it, good and bad, and holds the answers to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from mutations import valid_body
from servers import in_thread
from serving import Server, started
from starlette.routing import Route

from serve.gate import Tokens
from serve.openapi import document
from serve.server import build_app
from serve.wires import openvla, rest

schemathesis = pytest.importorskip("schemathesis")
TOKEN = "user-token-0123456789abcdef"
KNOWN = {"Authorization": f"Bearer {TOKEN}"}  # in this spelling schemathesis knows what it is, and tries without
SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
OTHERS = {"/", "/page.js", "/page.css", "/healthz", "/health", "/config", "/vla-eval/health", "/vla-eval/config"}
"""A page for people, and what harnesses of others ask for by their own rules."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text(f"{TOKEN}\n")
    # A model that takes a while: a deadline of a millisecond is refused then, and never accepted and missed.
    with started("null:tabletop?ms=30", "--token-file", tokens, "--deadline", "20", token=TOKEN) as server:
        yield server
        assert not server.complaints(), server.log[-4000:]


@pytest.fixture(scope="module")
def schema(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.address}/openapi.json", headers=KNOWN)


PATHS = [(path, method) for path, methods in document()["paths"].items() for method in methods]


@pytest.mark.parametrize(("path", "method"), PATHS)
def test_answers_conform_to_the_document_and_none_is_the_servers_fault(schema: Any, server: Server, path: str, method: str):
    # That a body is of the right form does not make a picture of a string, nor a robot's camera of a name.
    without = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]
    statuses = Counter[int]()
    for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

        @settings(max_examples=30 if method == "post" else 8, database=None, suppress_health_check=SLOW)
        @given(case=schema[path][method.upper()].as_strategy(generation_mode=mode))
        def run(case: Any) -> None:
            answer = case.call(headers=KNOWN)
            statuses[answer.status_code] += 1
            assert answer.status_code < 500, answer.text
            case.validate_response(answer, excluded_checks=without)

        try:
            run()
        except Unsatisfiable:  # nothing there can be wrong
            assert mode is schemathesis.GenerationMode.NEGATIVE and path == "/livez"
    print(path, dict(statuses))
    assert server.get("/readyz")[0] == 200


@pytest.mark.parametrize("path", ["/v1/act", "/act"])
def test_a_good_request_is_answered_as_documented(schema: Any, server: Server, path: str):
    for n in range(3):
        case = schema[path]["POST"].Case(body=valid_body(path, n), media_type="application/json")
        answer = case.call_and_validate(headers=KNOWN)
        assert answer.status_code == 200


def test_every_route_of_http_is_documented_or_somebody_elses():
    with in_thread() as (_, service):
        routes = {route.path for route in build_app(service, Tokens()).routes if isinstance(route, Route)}
        known = {path for path, _ in PATHS}
        assert routes == known | OTHERS & routes and not known & OTHERS
        assert {route.path for route in rest.routes(service) + openvla.routes(service) if isinstance(route, Route)} <= known


def test_the_document_is_written_once_and_names_every_code():
    said = document()
    assert said["openapi"] == "3.1.0" and Path(rest.__file__).exists()
    codes = said["components"]["schemas"]["Refusal"]["properties"]["error"]["properties"]["code"]["enum"]
    assert {"busy", "unavailable", "late", "stale"} <= set(codes)
