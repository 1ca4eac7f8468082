"""The first administrator, by the link that the server prints when it starts and there is none."""

import secrets

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from api.domain import users
from api.routes.caller import AccountsDep
from api.routes.errors import error_responses
from api.wire.accounts import SetUp

router = APIRouter(tags=["Account"])

# The link's secret stands behind `#`, which browsers keep to themselves: no log and no Referer has it.
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Sitter: first administrator</title>
<meta name="viewport" content="width=device-width"><style nonce="{nonce}">
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 24rem; margin: 4rem auto; padding: 0 1rem }}
input, button {{ font: inherit; display: block; width: 100%; box-sizing: border-box; margin: 0 0 1rem; padding: .5rem }}
</style><h1>First administrator</h1><form>
<label>User id <input name="user_id" required maxlength="64" autocomplete="username"></label>
<label>Password <input name="password" type="password" required minlength="10" autocomplete="new-password"></label>
<button>Make the administrator</button></form><p role="status"></p><script nonce="{nonce}">
const form = document.forms[0], status = document.querySelector("[role=status]")
form.onsubmit = async event => {{
  event.preventDefault()
  const body = JSON.stringify({{token: location.hash.slice(1), ...Object.fromEntries(new FormData(form))}})
  const answer = await fetch("setup", {{method: "POST", headers: {{"Content-Type": "application/json"}}, body}})
  if (answer.ok) {{ form.remove(); status.textContent = "Done. Sign in with POST /auth/login; /docs says how." }}
  else {{ const error = await answer.json(); status.textContent = error.detail + ". " + error.hint }}
}}</script>"""


@router.get("/setup", include_in_schema=False)
async def setup_page() -> HTMLResponse:
    """The form behind the printed link."""
    nonce = secrets.token_urlsafe(16)
    policy = f"default-src 'none'; connect-src 'self'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'"
    headers = {"Content-Security-Policy": f"{policy}; frame-ancestors 'none'", "Cache-Control": "no-store"}
    return HTMLResponse(PAGE.format(nonce=nonce), headers=headers)


@router.post(
    "/setup",
    status_code=204,
    summary="Make the first administrator",
    responses=error_responses(400, 401, 409, 413, 422, 503),
)
async def set_up(sent: SetUp, accounts: AccountsDep) -> None:
    """Makes the first administrator with the link that the server printed at its start; the link is used up then."""
    await users.set_up(accounts, sent)
