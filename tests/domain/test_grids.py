from pathlib import Path

import pytest

from api.domain import grids
from api.domain.grids import FRESH_MS, Place
from api.errors import NotFound
from api.store.database import Database
from tests import rows
from tests.gallery import Gallery, caller

pytestmark = pytest.mark.anyio

ADA, BO, ROOT, OWNER = caller("ada"), caller("bo"), caller("root", is_admin=True), caller(None)


@pytest.fixture
async def gallery(database: Database, tmp_path: Path) -> Gallery:
    gallery = Gallery(database, tmp_path / "output")
    await gallery.write([rows.user("ada"), rows.user("bo"), rows.user("root", type="admin")])
    return gallery


async def drawn(gallery: Gallery, grid_id: str, column: int, row: int, user_id: str = "ada") -> str:
    key = grids.key_of(grid_id, Place("seed", "who", column, row))
    return (await gallery.hang(user_id, request={"idempotency_key": key})).request_id


async def test_a_grid_is_found_by_its_owner(gallery: Gallery) -> None:
    grid_id, other = grids.new_grid(), grids.new_grid()
    jobs = {(column, row): await drawn(gallery, grid_id, column, row) for column in (0, 1, 2) for row in (0, 1)}
    await drawn(gallery, other, 7, 7)
    await gallery.hang("ada")
    for who in (ADA, ROOT, OWNER):
        grid = await grids.find(gallery.database, who, grid_id)
        assert {at: seen.job.id for at, seen in grid.cells.items()} == jobs
        assert all(len(seen.images) == 1 for seen in grid.cells.values())
        assert (grid.x, grid.y, list(grid.columns), list(grid.rows)) == ("seed", "who", [0, 1, 2], [0, 1])
    with pytest.raises(NotFound):
        await grids.find(gallery.database, BO, grid_id)


@pytest.mark.parametrize("grid_id", ["", "x", "g" * 28, "0" * 28, "f" * 28, "%" * 28, "01a201bd891fb3e106bce17ee647"])
async def test_a_grid_that_is_not_there_is_not_found(gallery: Gallery, grid_id: str) -> None:
    with pytest.raises(NotFound):
        await grids.find(gallery.database, OWNER, grid_id)


@pytest.mark.parametrize(
    "rest", ["", "a", "a:b:c:d", "seed:who:1:", "seed:who:100:1", "seed:who:1:1:1", "se-ed:who:1:1"]
)
async def test_keys_that_somebody_thought_of_are_no_cells(gallery: Gallery, rest: str) -> None:
    grid_id = grids.new_grid()
    await gallery.hang("ada", request={"idempotency_key": f"grid:{grid_id}:{rest}"})
    with pytest.raises(NotFound):
        await grids.find(gallery.database, ADA, grid_id)


@pytest.mark.parametrize("far", [[(99, 99)], [(0, 36)], [(12, 0), (0, 12)]])
async def test_a_grid_has_no_more_cells_than_a_form_may_ask_for(gallery: Gallery, far: list[tuple[int, int]]) -> None:
    grid_id = grids.new_grid()
    for column, row in far:  # by keys that somebody thought of
        await drawn(gallery, grid_id, column, row)
    with pytest.raises(NotFound):
        await grids.find(gallery.database, ADA, grid_id)


def test_a_key_is_good_for_a_while_and_for_what_it_was_said_with() -> None:
    fresh, said = grids.new_grid(), {"x": "seed"}
    grid_id = grids.new_grid(fresh, said)
    assert (len(grid_id), grid_id[:12]) == (28, fresh[:12])
    assert grids.new_grid(fresh, dict(said)) == grid_id != grids.new_grid(fresh, {"x": "who"})
    old = f"{int(fresh[:12], 16) - FRESH_MS - 1000:012x}{fresh[12:]}"
    for not_good in (old, "f" * 28):
        assert grids.new_grid(not_good, said)[:12] not in (not_good[:12], "f" * 12)
