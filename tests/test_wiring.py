import asyncio
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
def test_a_log_that_cannot_be_written_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        wiring.configure_logging("info")
        structlog.get_logger().info("drawn")
        with pytest.raises(OSError, match="No space"):
            full.close()


@pytest.mark.anyio
async def test_a_chore_that_breaks_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiring, "AGAIN_SECONDS", 0)
    tries, again = 0, asyncio.Event()

    async def chore() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise RuntimeError("broken")
        again.set()
        await asyncio.Event().wait()

    keeping = asyncio.create_task(wiring._keep_up(chore))
    async with asyncio.timeout(60):
        await again.wait()
    keeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeping
    assert tries == 2


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
