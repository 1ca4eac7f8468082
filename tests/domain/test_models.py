"""Which of a user's own models draws a request."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from api.domain import models
from api.domain.policy import ConsentMissing
from api.domain.submit import Desk, Order
from api.errors import InvalidRequest, ModelUnavailable, NotFound
from api.schemas import AdapterChoice
from api.store.database import Database
from api.store.models import ModelFolder
from api.store.tables import Model, ModelVersion, Request, now
from tests import builders
from tests.own import add_model

pytestmark = pytest.mark.anyio


async def drawn_by(desk: Desk, user_id: str = "eve", **fields: Any) -> Request:
    return await desk.submit(Order(builders.request(user_id=user_id, **fields), user_id))


async def test_the_model_published_last_draws(desk: Desk, database: Database, folder: ModelFolder) -> None:
    assert (await drawn_by(desk)).versions is None
    await add_model(database, folder, "eve", "eve")
    _, second = await add_model(database, folder, "eve", "eve")
    await add_model(database, folder, "eve", "eve", published=False)
    await add_model(database, folder, "bo", "bo")
    job = await drawn_by(desk)
    assert (job.versions, job.model_id) == ([[second.id, 1.0]], "eve/eve@2")
    _, other = await add_model(database, folder, "eve", "other")
    assert (await drawn_by(desk)).versions == [[other.id, 1.0]]


async def test_a_request_names_a_model_by_its_name_or_id_and_a_version(
    desk: Desk, database: Database, folder: ModelFolder
) -> None:
    model, first = await add_model(database, folder, "eve", "eve")
    _, second = await add_model(database, folder, "eve", "eve")
    await add_model(database, folder, "eve", "other")
    assert (await drawn_by(desk, model="eve")).versions == [[second.id, 1.0]]
    assert (await drawn_by(desk, model=model.id)).versions == [[second.id, 1.0]]
    assert (await drawn_by(desk, model="eve", model_version=1)).versions == [[first.id, 1.0]]
    configured = await drawn_by(desk, model="default")
    assert (configured.versions, configured.model_id) == (None, "models/demo")


async def test_several_draw_together_by_their_weights(desk: Desk, database: Database, folder: ModelFolder) -> None:
    _, eve = await add_model(database, folder, "eve", "eve")
    _, style = await add_model(database, folder, "eve", "style")
    adapters = [AdapterChoice(model="eve"), AdapterChoice(model="style", weight=0.5)]
    job = await drawn_by(desk, adapters=adapters)
    assert (job.versions, job.model_id) == ([[eve.id, 1.0], [style.id, 0.5]], "eve/eve@1+eve/style@1")
    await add_model(database, folder, "eve", "far", base="models/other")
    with pytest.raises(InvalidRequest, match="different bases"):
        await drawn_by(desk, adapters=[*adapters, AdapterChoice(model="far")])


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"model": "nobody"}, NotFound),
        ({"model": "bo"}, NotFound),  # somebody else's
        ({"model": "eve", "model_version": 9}, NotFound),
        ({"model": "shy"}, InvalidRequest),  # nothing of it is published
        ({"adapters": [AdapterChoice(model="bo")]}, NotFound),
    ],
)
async def test_what_a_user_does_not_have_is_refused(
    desk: Desk, database: Database, folder: ModelFolder, fields: dict[str, Any], refusal: type[Exception]
) -> None:
    await add_model(database, folder, "eve", "eve")
    await add_model(database, folder, "eve", "shy", published=False)
    bo, _ = await add_model(database, folder, "bo", "bo")
    with pytest.raises(refusal):
        await drawn_by(desk, **fields)
    with pytest.raises(NotFound):
        await drawn_by(desk, model=bo.id)


async def test_a_model_without_a_version_is_told_from_none(desk: Desk, database: Database, folder: ModelFolder) -> None:
    model, version = await add_model(database, folder, "eve", "eve")
    async with database.transaction() as session:
        await session.delete(await session.get_one(ModelVersion, version.id))
        (await session.get_one(Model, model.id)).published_id = None
    with pytest.raises(InvalidRequest, match="no version of eve is published"):
        await drawn_by(desk, model="eve")
    with pytest.raises(NotFound, match="no version 1"):
        await drawn_by(desk, model="eve", model_version=1)
    assert (await drawn_by(desk)).versions is None


async def test_no_more_versions_are_read_than_a_request_may_mean(database: Database, folder: ModelFolder) -> None:
    for name in ("eve", "style"):
        for _ in range(3):
            await add_model(database, folder, "eve", name)

    async def read(**fields: Any) -> list[tuple[str, int | None]]:
        async with database.reading() as session:
            has = await models.known(session, [("eve", builders.request(user_id="eve", **fields))])
        return sorted((model.name, version.number if version else None) for model, version, _ in has["eve"])

    assert await read() == [("eve", 3), ("style", 3)]
    assert await read(model="style", model_version=1) == [("eve", 3), ("style", 1), ("style", 3)]


@pytest.mark.parametrize("ended", [{"revoked_at": now()}, {"expires_at": now() - timedelta(seconds=1)}])
async def test_nobody_is_drawn_without_consent(
    desk: Desk, database: Database, folder: ModelFolder, ended: dict[str, Any]
) -> None:
    _, version = await add_model(database, folder, "eve", "eve", **ended)
    assert (await drawn_by(desk)).versions is None
    with pytest.raises(ConsentMissing):
        await drawn_by(desk, model="eve")
    with pytest.raises(ConsentMissing):  # asked again when it is drawn
        await models.own_models(database, folder, "eve", [(version.id, 1.0)])


async def test_whose_a_model_is_is_asked_again_when_it_is_drawn(database: Database, folder: ModelFolder) -> None:
    model, version = await add_model(database, folder, "eve", "eve")
    ((own, weight),) = await models.own_models(database, folder, "eve", [(version.id, 0.5)])
    assert (own.model_id, own.owner, own.sha256, weight) == ("eve/eve@1", "eve", version.sha256, 0.5)
    with pytest.raises(ModelUnavailable):
        await models.own_models(database, folder, "bo", [(version.id, 1.0)])
    async with database.transaction() as session:
        await session.delete(await session.get_one(Model, model.id))
    with pytest.raises(ModelUnavailable):
        await models.own_models(database, folder, "eve", [(version.id, 1.0)])


async def test_the_same_key_is_the_same_request_whatever_was_published_meanwhile(
    make_desk: Callable[..., Desk], database: Database, folder: ModelFolder
) -> None:
    desk, order = make_desk(), Order(builders.request(user_id="eve"), "eve", idempotency_key="once")
    job = await desk.submit(order)
    await add_model(database, folder, "eve", "eve")
    assert (await desk.submit(order)).id == job.id
