from collections.abc import Callable

import pytest

from api.engine.knee import AGE, TRIES, Knee

SHAPE = (4, 16, 16)


class Model:
    """Something that can go away."""


def learned(
    seconds_a_row: Callable[[int], float], demand: int = 100, forwards: int = 60, task: int = 1
) -> tuple[Knee, Model, int]:
    """What a knee says after forwards of as many rows as it allows and as there are, in tasks of `task` rows."""
    knee, model = Knee(16), Model()
    for _ in range(forwards):
        rows = max(task, min(demand, knee.rows(model, SHAPE, task)) // task * task)
        knee.note(model, SHAPE, rows, rows * seconds_a_row(rows))
    return knee, model, knee.rows(model, SHAPE, task)


COSTS: dict[str, tuple[Callable[[int], float], int]] = {
    "nothing is shared": (lambda rows: 1.0, 2),
    "a call costs the same whatever its rows": (lambda rows: 1 / rows, 16),
    "up to eight rows": (lambda rows: max(1 / rows, 1 / 8), 8),
    "larger ones are slower": (lambda rows: 1.0 if rows <= 4 else 1.2, 2),
    "hardly anything": (lambda rows: 1.04 - rows * 0.002, 2),
}


@pytest.mark.parametrize(("seconds_a_row", "rows"), COSTS.values(), ids=COSTS)
def test_the_fewest_rows_at_which_a_row_is_cheap(seconds_a_row: Callable[[int], float], rows: int) -> None:
    assert learned(seconds_a_row)[2] == rows


def test_sizes_that_never_come_are_not_ruled_out() -> None:
    knee, model, rows = learned(lambda rows: 1.0, demand=4)
    assert rows == 16
    for _ in range(TRIES):
        knee.note(model, SHAPE, 16, 16 * 0.5)
    assert knee.rows(model, SHAPE) == 8


@pytest.mark.parametrize("task", [2, 4, 6, 8, 32])
def test_tasks_of_many_rows_find_it_as_well(task: int) -> None:
    assert learned(lambda rows: 1 / rows, task=task)[2] == max(16, task)
    assert learned(lambda rows: 1.0, task=task)[2] == {6: 8}.get(task, task)


def test_one_slow_forward_rules_nothing_out() -> None:
    slow = iter([5.0])
    assert learned(lambda rows: next(slow, 1.0) / rows)[2] == 16


def test_each_model_and_shape_has_its_own() -> None:
    knee, model, rows = learned(lambda rows: 1.0)
    assert rows == 2
    assert knee.rows(model, (4, 32, 32)) == knee.rows(Model(), SHAPE) == 16


def test_after_a_while_all_is_measured_anew() -> None:
    knee, model, _ = learned(lambda rows: 1.0, forwards=AGE + 1)
    assert knee.rows(model, SHAPE) == 16


def test_a_model_that_is_gone_is_forgotten() -> None:
    knee, model, _ = learned(lambda rows: 1.0)
    del model
    assert not knee._costs
