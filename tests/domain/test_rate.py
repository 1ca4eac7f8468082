import pytest

from api.domain import rate
from api.domain.rate import Bodies, Limiter, Streams
from api.errors import LimitReached

pytestmark = pytest.mark.anyio


async def test_one_too_many_is_told_when_there_is_room_again() -> None:
    limiter = Limiter()
    for _ in range(3):
        await limiter.hit("ada", 3)
    with pytest.raises(LimitReached, match=r"3 requests a minute.*requests_per_minute") as caught:
        await limiter.hit("ada", 3)
    assert 1 <= (caught.value.retry_after_seconds or 0) <= 120
    left = await limiter.left("ada", 3)
    assert (left.limit, left.used, left.left) == (3, 3, 0)


async def test_users_do_not_share_and_0_is_no_limit() -> None:
    limiter = Limiter()
    await limiter.hit("ada", 1)
    await limiter.hit("bo", 1)
    for _ in range(100):
        await limiter.hit("ada", 0)
    assert (await limiter.left("ada", 0)).left is None


@pytest.mark.parametrize(
    ("kind", "most", "told"), [(Streams, "STREAMS", "2 event streams"), (Bodies, "BODIES", "2 up")]
)
async def test_they_are_counted_by_user_while_they_are_open(
    kind: type[Streams | Bodies], most: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate, most, 2)
    streams = kind()
    with streams.one("ada"), streams.one("bo"):
        with streams.one("ada"), pytest.raises(LimitReached, match=told), streams.one("ada"):
            pass
        with pytest.raises(ZeroDivisionError), streams.one("ada"):
            raise ZeroDivisionError
        with streams.one("ada"):
            pass
    assert not streams._open
