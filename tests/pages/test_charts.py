import pytest

from api.routes.pages.charts import columns, round_up, share
from api.wire.admin import UsageRow


def row(user_id: str, images: int) -> UsageRow:
    return UsageRow(user_id=user_id, day=None, model_id=None, requests=1, images=images, steps=0, seconds=0, cost=0)


@pytest.mark.parametrize(
    ("value", "top"), [(0, 1), (0.2, 1), (7, 7), (10, 10), (11, 15), (22, 25), (100, 100), (101, 150), (9_999, 10_000)]
)
def test_the_top_of_a_chart_is_a_round_number(value: float, top: float) -> None:
    assert round_up(value) == top


def test_columns_are_percent_of_the_top() -> None:
    chart = columns([("a", 0), ("b", 5), ("c", 10), ("d", 2.5)])
    assert chart.top == 10
    assert [(one.x, one.height) for one in chart.columns] == [(0, 0), (1, 50), (2, 100), (3, 25)]
    assert chart.labels == ["a", "c", "d"]
    assert columns([("a", 3)]).labels == ["a"]


def test_the_largest_share_comes_first() -> None:
    shown = share([row("ada", 1), row("bo", 4), row("chi", 3)], "images", 2)
    assert [(one.user_id, percent) for one, percent in shown] == [("bo", 100), ("chi", 75)]
    assert share([row("ada", 0)], "images", 2)[0][1] == 0
    assert share([], "images", 2) == []
