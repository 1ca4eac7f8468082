"""What the OpenAPI document promises, tried with inputs made from it: alone, and one after another as its links say."""

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from api.domain import keys
from api.domain.accounts import ALL_SCOPES
from api.store.database import Database
from tests import people
from tests.e2e.server import Server

SCALE = int(os.environ.get("FUZZ_SCALE", "1"))  # of all that is tried; `make fuzz` has more
DOCUMENTED_FAILURES = {503, 507}
CONFORMANCE = ["status_code_conformance", "content_type_conformance", "response_schema_conformance"]
CHEAP = {"width": 256, "height": 256, "num_inference_steps": 1, "num_images": 1}
FREE: dict[str, Any] = {"LIMIT_QUEUED": "0", "LIMIT_REQUESTS_PER_MINUTE": "0", "LIMIT_IMAGES_PER_DAY": "0"}
HOOK = "https://receiver.invalid/hook"
PASSWORD = "correct horse battery"
schemathesis.serializer.alias("application/offset+octet-stream", "application/octet-stream")


def given_examples(examples: int) -> settings:
    """How often something is tried: the same every time, up to as often as here, and other things beyond that."""
    return settings(
        max_examples=examples * SCALE,
        derandomize=SCALE == 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def cheap(body: Any) -> Any:
    """The body with what is allowed made cheap to draw and sent to nobody, and what is not left as it is."""
    if not isinstance(body, dict):
        return body
    capped: dict[str, Any] = {
        name: least
        for name, least in CHEAP.items()
        if type(body.get(name, least)) is int and least <= body.get(name, least) <= 1024
    }
    if str(body.get("webhook_url", "")).startswith("http"):
        capped["webhook_url"] = HOOK
    return {**body, **capped}


def check(case: Any, answer: Any, checks: list[str], **more: Any) -> None:
    assert answer.status_code < 500 or answer.status_code in DOCUMENTED_FAILURES, answer.text
    case.validate_response(answer, checks=CHECKS.get_by_names([*CONFORMANCE, *checks]), **more)


@pytest.fixture(scope="module")
def api(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.client.base_url}/openapi.json")


@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [
        ("/health", "GET", GenerationMode.POSITIVE),
        ("/cache", "GET", GenerationMode.POSITIVE),
        ("/cache", "DELETE", GenerationMode.POSITIVE),
        *product(["/generate", "/generate/image"], ["POST"], GenerationMode),
    ],
)
def test_no_input_breaks_the_server(api: Any, path: str, method: str, mode: GenerationMode) -> None:
    cases = api[path][method].as_strategy(generation_mode=mode)
    statuses = set()

    @given_examples(40 if method == "POST" else 4)  # nothing is sent with the others but headers of no meaning
    @given(case=cases)
    def try_it(case: Any) -> None:
        case.body = cheap(case.body)
        answer = case.call()
        statuses.add(answer.status_code)
        check(case, answer, [])

    try_it()
    assert (200 if mode is GenerationMode.POSITIVE else 422) in statuses


@dataclass
class Knocker:
    """Somebody with a key of a server with AUTH=required, and what they were answered."""

    user_id: str
    key_id: str
    key: str
    server: Server
    answered: Counter[tuple[str, int]] = field(default_factory=Counter)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def tame(self, case: Any) -> None:
        """Makes the case cheap, and keeps it from locking its own author out."""
        case.body = cheap(case.body)
        if case.path_parameters.get("user_id") == self.user_id and case.method.upper() != "GET":
            case.path_parameters["user_id"] = "somebody-else"
        if case.path_parameters.get("key_id") == self.key_id:
            case.path_parameters["key_id"] = "0" * 28

    def look(self, case: Any, answer: Any, checks: list[str], **more: Any) -> None:
        """Notes what was answered, and checks it."""
        self.answered[case.operation.label, answer.status_code] += 1
        check(case, answer, checks, headers=self.headers, **more)

    def is_let_in(self) -> bool:
        return bool(self.server.client.get("/me", headers=self.headers).json().get("user_id") == self.user_id)


@pytest.fixture(scope="module")
def closed(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Knocker]]:
    """A server that asks who one is, and by their id a user and an administrator."""
    folder = tmp_path_factory.mktemp("closed")
    with Server(folder, {"default": str(models / "one")}, AUTH="required", **FREE) as server:

        async def move_in() -> list[Knocker]:
            database = Database(f"sqlite:///{folder / 'data/sitter.db'}")
            knockers = []
            for user_id, kind in (("ada", "user"), ("root", "admin")):
                await people.add_user(database, user_id, PASSWORD, type=kind)
                async with database.transaction() as session:
                    made = await keys.add_key(session, "test", user_id, "of the test", ALL_SCOPES, None)
                knockers.append(Knocker(user_id, made.id, made.key, server))
            await database.close()
            return knockers

        yield {knocker.user_id: knocker for knocker in asyncio.run(move_in())}
        assert "unexpected_error" not in server.log, server.log


@pytest.fixture(params=["ada", "root"])
def knocker(closed: dict[str, Knocker], request: pytest.FixtureRequest) -> Knocker:
    return closed[request.param]


@pytest.fixture
def closed_api(knocker: Knocker) -> Any:
    return schemathesis.openapi.from_url(f"{knocker.server.client.base_url}/openapi.json")


def test_nothing_that_a_user_or_an_administrator_sends_breaks_the_server(closed_api: Any, knocker: Knocker) -> None:
    operations = [found.ok() for found in closed_api.get_all_operations()]
    wrong: list[Exception] = []
    for operation, mode in product(operations, GenerationMode):

        @given_examples(3)
        @given(case=operation.as_strategy(generation_mode=mode))
        def try_it(case: Any) -> None:
            knocker.tame(case)
            knocker.look(case, case.call(headers=knocker.headers), ["ignored_auth"])

        try:
            try_it()
        except Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE, operation.label  # there is nothing to send that would be wrong
        except Exception as error:
            wrong.append(error)
    if wrong:
        raise ExceptionGroup("what was answered is not what is promised", wrong)
    assert {label for label, _ in knocker.answered} == {operation.label for operation in operations}
    assert knocker.is_let_in()


def test_nothing_that_follows_from_an_answer_breaks_the_server(closed_api: Any, knocker: Knocker) -> None:
    class Following(closed_api.as_state_machine()):  # type: ignore[misc]
        def before_call(self, case: Any) -> None:
            knocker.tame(case)

        def get_call_kwargs(self, case: Any) -> dict[str, Any]:
            return {"headers": knocker.headers}

        def validate_response(self, response: Any, case: Any, *_: Any, **__: Any) -> None:
            knocker.look(case, response, ["use_after_free"], recorder=self.recorder)

    knocker.answered.clear()
    # Few at a time: what may follow depends on what the server has by then, which hypothesis notices where it tries
    # the beginning of an earlier example again, as it does with many.
    for _ in range(SCALE):
        Following.run(settings=settings(given_examples(10), max_examples=10, stateful_step_count=20))
    found = {label for label, status in knocker.answered if "{" in label and status < 300}
    assert {"GET /jobs/{job_id}", "GET /images/{image_id}"} <= found, knocker.answered
    assert knocker.is_let_in()
