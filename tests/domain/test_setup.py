import pytest

from api.domain.setup import GOOD_FOR_SECONDS, SetupLink
from api.errors import NotAuthenticated


def test_a_link_is_good_once() -> None:
    link = SetupLink()
    with pytest.raises(NotAuthenticated):
        link.take("")
    secret = link.make()
    for wrong in ("", secret[:-1], "ä"):
        with pytest.raises(NotAuthenticated):
            link.take(wrong)
    link.take(secret)
    with pytest.raises(NotAuthenticated):
        link.take(secret)
    link.give_back(secret)
    link.take(secret)


def test_a_link_is_good_for_an_hour_and_a_new_one_ends_it() -> None:
    moment = 1000.0
    link = SetupLink(lambda: moment)
    first, second = link.make(), link.make()
    with pytest.raises(NotAuthenticated):
        link.take(first)
    moment += GOOD_FOR_SECONDS
    with pytest.raises(NotAuthenticated):
        link.take(second)
