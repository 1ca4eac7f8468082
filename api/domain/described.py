"""Models and versions as the wire shows them."""

from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from api.config import DEFAULT_USER, Settings
from api.domain.policy import consented
from api.store import tables
from api.store.models import SAMPLE
from api.store.tables import Consent, ModelVersion
from api.wire.models import ConsentRecord, Model, Version


async def described(session: AsyncSession, models: Sequence[tables.Model]) -> list[Model]:
    """Returns models as the wire shows them, in their order."""
    ids = [model.id for model in models]
    counted = select(ModelVersion.model_id, func.count()).where(ModelVersion.model_id.in_(ids))
    counts = {row[0]: row[1] for row in await session.execute(counted.group_by(ModelVersion.model_id))}
    published = select(tables.Model.id, ModelVersion.number).where(tables.Model.id.in_(ids))
    joined = published.join(ModelVersion, ModelVersion.id == tables.Model.published_id)
    numbers = {row[0]: row[1] for row in await session.execute(joined)}
    newest = select(Consent).where(Consent.model_id.in_(ids)).order_by(Consent.id)
    consents = {consent.model_id: consent for consent in await session.scalars(newest)}
    allowed = set(await session.scalars(select(tables.Model.id).where(tables.Model.id.in_(ids), consented())))
    return [
        _model(model, counts.get(model.id, 0), numbers.get(model.id), consents.get(model.id), model.id in allowed)
        for model in models
    ]


def _model(model: tables.Model, versions: int, published: int | None, consent: Consent | None, allowed: bool) -> Model:
    status = "ready" if published else "unpublished" if versions else "untrained"
    name = f"{model.user_id}/{model.name}"
    return Model(
        id=model.id,
        user_id=model.user_id,
        name=model.name,
        token=model.token,
        class_noun=model.class_noun,
        model_id=f"{name}@{published}" if published else name,
        status=status if allowed else "revoked",
        version=published,
        versions=versions,
        consent=consent and ConsentRecord.model_validate(consent, from_attributes=True),
        created_at=model.created_at,
    )


def configured(settings: Settings, user: str) -> Model:
    """Returns a model that the operator configured."""
    source = settings.user_models[user]
    return Model(
        id=f"configured:{user}",
        user_id=user,
        name=DEFAULT_USER,
        token=None,
        class_noun=None,
        model_id=source.model_id,
        status="configured",
        version=None,
        versions=0,
        consent=None,
        created_at=None,
    )


def version_of(model: tables.Model, version: ModelVersion) -> Version:
    """Returns a version as the wire shows it."""
    here = f"/models/{model.id}/versions/{version.number}"
    samples = sorted(name for name in version.files if name.startswith(SAMPLE))
    return Version(
        version=version.number,
        published=version.id == model.published_id,
        kind=version.kind,
        base=version.source["base"],
        base_hash=version.base_hash,
        sha256=version.sha256,
        files=version.files,
        bytes=version.bytes,
        parameters=version.parameters,
        scores=version.scores,
        refusal=version.refusal,
        samples=[f"{here}/files/{name}" for name in samples],
        job_id=version.request_id,
        created_at=version.created_at,
    )
