import re
from collections.abc import Iterator

from api.errors import InvalidRequest, ModelUnavailable, SitterError


def tree(error: type[SitterError] = SitterError) -> Iterator[type[SitterError]]:
    yield error
    for child in error.__subclasses__():
        yield from tree(child)


def test_every_error_has_a_code_of_its_own_a_status_and_a_hint() -> None:
    errors = list(tree())
    codes = [error.code for error in errors]
    assert len(set(codes)) == len(errors) > 10
    for error in errors:
        assert re.fullmatch("[a-z_]+", error.code)
        assert 400 <= error.status < 600
        assert error.hint.endswith(".")
        assert error.__doc__


def test_an_error_carries_its_sentence_and_its_own_hint_or_the_class_s() -> None:
    assert (str(ModelUnavailable("gone")), ModelUnavailable("gone").hint) == ("gone", ModelUnavailable.hint)
    assert InvalidRequest("odd", "Do this.").hint == "Do this."
    assert InvalidRequest.hint != "Do this."
