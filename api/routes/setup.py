"""The first administrator, by the link that the server prints when it starts and there is none."""

from fastapi import APIRouter

from api.domain import users
from api.routes.caller import AccountsDep
from api.routes.errors import error_responses
from api.wire.accounts import SetUp

router = APIRouter(tags=["Account"])


@router.post(
    "/setup",
    status_code=204,
    summary="Make the first administrator",
    responses=error_responses(400, 401, 409, 413, 422, 503),
)
async def set_up(sent: SetUp, accounts: AccountsDep) -> None:
    """Makes the first administrator with the link that the server printed at its start; the link is used up then."""
    await users.set_up(accounts, sent)
