import sys
from collections.abc import Iterator

import pytest
import structlog

from api import wiring


@pytest.fixture
def _logging_restored() -> Iterator[None]:
    yield
    structlog.reset_defaults()


@pytest.mark.usefixtures("_logging_restored")
@pytest.mark.parametrize("terminal", [True, False])
def test_tracebacks_hold_no_prompt(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    wiring.configure_logging("info")
    secret = "".join(["zebra", "finch"])  # in no line of source that a traceback shows
    try:
        _ = [][len(secret)]
    except IndexError as error:
        structlog.get_logger().error("unexpected_error", exc_info=error)
    log = capsys.readouterr().err
    assert "IndexError" in log
    assert "zebrafinch" not in log
