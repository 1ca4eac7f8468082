"""Over which bases a user may have a model trained or checked."""

import pytest

from api.domain.models import base_named
from api.errors import InvalidRequest
from tests import builders

USERS = {
    "default": builders.source("shared"),
    "ada": builders.source("shared", lora="ada"),
    "chi": builders.source("chis"),
    "dana": builders.source("pair"),
    "erin": builders.source("pair"),
}


def test_a_whole_model_of_one_user_is_no_base_for_others() -> None:
    settings = builders.settings(USERS)
    assert base_named(settings, None, "bo") == builders.source("shared")
    assert base_named(settings, "shared", "bo") == builders.source("shared")
    assert base_named(settings, "pair", "bo") == builders.source("pair")
    assert base_named(settings, "chis", "chi") == builders.source("chis")
    with pytest.raises(InvalidRequest) as refused:
        base_named(settings, "chis", "bo")
    assert "chis" not in refused.value.hint


def test_the_operator_may_name_any_base() -> None:
    settings = builders.settings(USERS)
    assert base_named(settings, "chis") == builders.source("chis")
    assert base_named(settings, "elsewhere") == builders.source("elsewhere")
