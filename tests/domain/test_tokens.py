import base64
import hashlib
import hmac
import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest

from api.domain.tokens import (
    LONGEST_TOKEN,
    csrf_matches,
    csrf_token,
    hash_key,
    make_key,
    make_token,
    read_token,
)
from api.errors import NotAuthenticated
from api.store.vault import Vault

OLD, NEW = "o" * 40, "n" * 40
VAULT = Vault([NEW])


def claims(**changed: Any) -> dict[str, Any]:
    """The claims of a good token, some of them `changed`, and those that are None left out."""
    moment = datetime.now(UTC)
    good = {
        "iss": "sitter",
        "aud": "api",
        "sub": "ada",
        "ver": 0,
        "jti": "0" * 32,
        "iat": moment,
        "exp": moment + timedelta(minutes=15),
    }
    return {name: value for name, value in {**good, **changed}.items() if value is not None}


def signed(key: bytes = VAULT.signing_key, /, headers: Any = None, **changed: Any) -> str:
    return jwt.encode(claims(**changed), key, "HS256", headers)


def spelled(header: dict[str, Any], payload: dict[str, Any], key: bytes, digest: Any = hashlib.sha256) -> str:
    """A token put together by hand: libraries refuse to make the worst ones."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, payload)]
    signature = hmac.new(key, b".".join(parts), digest).digest() if key else b""
    return b".".join([*parts, base64.urlsafe_b64encode(signature).rstrip(b"=")]).decode()


PLAIN = {name: int(value.timestamp()) if isinstance(value, datetime) else value for name, value in claims().items()}
AGO = datetime.now(UTC) - timedelta(minutes=1)


def test_a_token_says_who_and_for_how_long() -> None:
    text, token = make_token(VAULT, "api", "ada", 3)
    assert read_token(VAULT, "api", text) == token
    assert (token.user_id, token.version) == ("ada", 3)
    assert timedelta(minutes=14) < token.expires_at - datetime.now(UTC) <= timedelta(minutes=15)


def test_the_hand_made_good_token_is_good() -> None:
    assert read_token(VAULT, "api", signed()).user_id == "ada"
    assert read_token(VAULT, "api", spelled({"alg": "HS256", "typ": "JWT"}, PLAIN, VAULT.signing_key)).user_id == "ada"


def test_clocks_may_differ_by_half_a_minute() -> None:
    ago = datetime.now(UTC) - timedelta(seconds=20)
    assert read_token(VAULT, "api", signed(exp=ago, iat=ago - timedelta(minutes=15))).user_id == "ada"
    ahead = datetime.now(UTC) + timedelta(seconds=20)
    assert read_token(VAULT, "api", signed(iat=ahead)).user_id == "ada"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("a.b.c", id="no token"),
        pytest.param("." * 3000, id="dots"),
        pytest.param(signed() + "A", id="changed signature"),
        pytest.param(signed(Vault([OLD]).signing_key), id="foreign key"),
        pytest.param(signed(NEW.encode()), id="the server's key itself"),
        pytest.param(signed(exp=AGO), id="expired"),
        pytest.param(signed(iat=datetime.now(UTC) + timedelta(days=1)), id="from the future"),
        pytest.param(signed(aud="session"), id="another audience"),
        pytest.param(signed(aud=["api", "session"]), id="every audience"),
        pytest.param(signed(iss="somebody"), id="another issuer"),
        *(pytest.param(signed(**dict.fromkeys([name])), id=f"no {name}") for name in claims()),
        pytest.param(signed(headers={"crit": ["b64"], "b64": True}), id="crit"),
        pytest.param(spelled({"alg": "HS256", "crit": ["exp"]}, PLAIN, VAULT.signing_key), id="unknown crit"),
        pytest.param(signed(headers={"kid": "../../dev/null"}), id="kid"),
        pytest.param(signed(headers={"jwk": {"kty": "oct", "k": "AA"}}), id="jwk"),
        pytest.param(spelled({"alg": "none", "typ": "JWT"}, PLAIN, b""), id="none"),
        pytest.param(spelled({"alg": "nOnE"}, PLAIN, b""), id="nOnE"),
        pytest.param(spelled({"typ": "JWT"}, PLAIN, VAULT.signing_key), id="no algorithm"),
        pytest.param(spelled({"alg": "HS512"}, PLAIN, VAULT.signing_key, hashlib.sha512), id="HS512"),
        pytest.param(spelled({"alg": "RS256"}, PLAIN, VAULT.signing_key), id="RS256"),
        pytest.param(spelled({"alg": "HS256"}, {**PLAIN, "sub": 7}, VAULT.signing_key), id="sub is a number"),
        pytest.param(signed(sub="a" * LONGEST_TOKEN), id="too long"),
    ],
)
def test_every_other_token_is_refused(text: str) -> None:
    with pytest.raises(NotAuthenticated):
        read_token(VAULT, "api", text)


def test_what_an_older_key_signed_stays_good_until_that_is_taken_away() -> None:
    text, token = make_token(Vault([OLD]), "session", "ada", 0)
    assert read_token(Vault([NEW, OLD]), "session", text) == token
    with pytest.raises(NotAuthenticated):
        read_token(VAULT, "session", text)


def test_a_csrf_token_is_of_one_session() -> None:
    (_, one), (_, two) = (make_token(VAULT, "session", "ada", 0) for _ in range(2))
    assert csrf_matches(VAULT, one, csrf_token(VAULT, one))
    for wrong in (csrf_token(VAULT, two), None, "", "ä", one.id):
        assert not csrf_matches(VAULT, one, wrong)


def test_keys_are_long_and_their_hash_tells_nothing() -> None:
    key = make_key()
    assert re.fullmatch(r"sk_[\w-]{43}", key)
    assert make_key() != key
    assert hash_key(key) == hashlib.sha256(key.encode()).hexdigest()
