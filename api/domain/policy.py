"""The rules that no door passes by. So far: nobody's model is trained or drawn with unless they agree."""

import hashlib
from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import ColumnElement, and_, exists, or_

from api.errors import Forbidden
from api.store.tables import Consent, Model, now

STATEMENTS = {
    1: "I am the person in these pictures, or they have told me that they agree: a model may be trained on them and "
    "draw them for me. I can take this back at any time; the model and the pictures are then deleted.",
}
STATEMENT = max(STATEMENTS)  # the version that is agreed to now


class ConsentMissing(Forbidden):
    """Whoever a model shows has not agreed to it, or not any more."""

    code = "consent_missing"
    hint = "Ask them, and train it anew with their consent."


def consented(consent_id: str | None = None) -> ColumnElement[bool]:
    """Returns whether a consent in force is there for a row of `models`; this very one, if it is named."""
    found = exists().where(Consent.model_id == Model.id, in_force())
    return found if consent_id is None else found.where(Consent.id == consent_id)


def in_force() -> ColumnElement[bool]:
    """Returns whether a row of `consents` was not taken back and has not ended by itself."""
    return and_(Consent.revoked_at.is_(None), or_(Consent.expires_at.is_(None), Consent.expires_at > now()))


def granted(model: Model, by: str, days: int | None, hashes: Sequence[str]) -> Consent:
    """Returns the record that whoever a model shows agrees to the statement of now.

    Args:
        model: what it is for.
        by: who said so, as the audit calls them.
        days: how long it holds; None until it is taken back.
        hashes: SHA-256 of each photo, or of the weights that were sent.
    """
    proof = evidence(STATEMENT, hashes)
    ends = now() + timedelta(days=days) if days else None
    return Consent(model_id=model.id, granted_by=by, statement=STATEMENT, evidence=proof, expires_at=ends)


def evidence(statement: int, hashes: Sequence[str]) -> str:
    """Returns the hash of what was agreed to: the statement's words, and the SHA-256 of each photo."""
    return hashlib.sha256("\n".join([STATEMENTS[statement], *hashes]).encode()).hexdigest()
