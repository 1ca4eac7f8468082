"""Users' own models in a database and a folder, as a training would have left them."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from api.domain.models import next_number
from api.domain.policy import STATEMENT
from api.store.database import Database
from api.store.models import WEIGHTS, ModelFolder, sha256
from api.store.tables import Consent, Model, ModelVersion, User, new_id, now
from tests import rows


async def add_model(
    database: Database,
    folder: ModelFolder,
    user_id: str,
    name: str,
    weights: bytes = b"weights",
    *,
    base: str = "models/demo",
    published: bool = True,
    **consent: Any,
) -> tuple[Model, ModelVersion]:
    """Adds a version to the model of that name, which is made with a consent if it is not there."""
    version_id = new_id()
    folder.keep(version_id, {WEIGHTS: weights, "sample-1.png": b"png"})
    async with database.transaction() as session:
        if await session.get(User, user_id) is None:
            session.add(rows.user(user_id))
            await session.flush()
        model = await _model(session, user_id, name, consent)
        version = ModelVersion(
            id=version_id,
            model_id=model.id,
            number=next_number(model),
            kind="lora",
            source={"base": base},
            base_hash="b" * 64,
            sha256=sha256(weights),
            files={WEIGHTS: sha256(weights), "sample-1.png": sha256(b"png")},
            bytes=len(weights) + 3,
            parameters={"steps": 1, "rank": 1, "step": 1, "seconds": 1.0},
            scores={"likeness": None, "obedience": None, "class_kept": None, "variety": 1.0},
        )
        session.add(version)
        if published:
            model.published_id, model.published_at = version_id, now()
    return model, version


async def _model(session: AsyncSession, user_id: str, name: str, consent: dict[str, Any]) -> Model:
    found = await session.scalar(select(Model).where(Model.user_id == user_id, Model.name == name))
    if found is not None:
        return found
    model = Model(user_id=user_id, name=name, token="sks person", class_noun="person")
    session.add(model)
    await session.flush()
    session.add(Consent(model_id=model.id, granted_by=user_id, statement=STATEMENT, evidence="e" * 64, **consent))
    return model
