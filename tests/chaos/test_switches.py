"""Many models through a small cache: memory stays flat and under the budget."""

from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import pytest

from tests.chaos.stage import SCALE
from tests.e2e import tiny
from tests.e2e.server import Server

USERS = ("u1", "u2", "u3", "u4", "u5")
CHANNELS = (8, 180)  # about 25 MB in memory
BUDGET_GB = 0.06  # two of them
SWITCHES, SETTLED = (60, 15) if SCALE == 1 else (500, 100)
FLAT_BYTES = 25_000_000  # less than one model


def anonymous_bytes(pid: int) -> int:
    """What the process holds beyond the files it has mapped."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [kilobytes] = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(kilobytes) * 1024


@pytest.fixture
def churning(tmp_path: Path) -> Iterator[Server]:
    users = {user: str(tiny.build(tmp_path / user, seed, CHANNELS)) for seed, user in enumerate(USERS)}
    with Server(tmp_path, users, HOST_CACHE_GB=str(BUDGET_GB), DTYPE="float32") as server:
        yield server


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_model_switches_leave_memory_flat(churning: Server, capsys: pytest.CaptureFixture[str]) -> None:
    resident, used = [], []
    churning.drawn(user_id=USERS[-1])
    for user in islice(cycle(USERS), SWITCHES):
        assert churning.drawn(user_id=user)["cache"] == "miss", "every request switches"
        cache = churning.get("/cache")
        assert len(cache["models"]) == 2
        used.append(cache["used_bytes"]["cpu"])
        resident.append(anonymous_bytes(churning.pid))
    # The least of many: how much of what was freed the allocator keeps at one moment is a matter of chance.
    growth = min(resident[-SETTLED:]) - min(resident[SETTLED : 2 * SETTLED])
    with capsys.disabled():
        print(f"\n{SWITCHES} switches: {growth / 1e6:+.1f} MB after the first {SETTLED}; {max(used) / 1e6:.1f} MB used")
    assert 40e6 < max(used) <= BUDGET_GB * 1e9
    assert growth <= FLAT_BYTES
