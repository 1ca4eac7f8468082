"""The link that makes the first administrator: printed once where the server was started, good for an hour."""

import secrets
import time
from collections.abc import Callable

from api.domain.tokens import hash_key
from api.errors import NotAuthenticated

GOOD_FOR_SECONDS = 3600


class SetupLink:
    """The link's secret, hashed, in this process's memory alone.

    Args:
        clock: seconds, never set back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._hash: str | None = None
        self._until = 0.0

    def make(self) -> str:
        """Returns a new secret; one made before is good no more."""
        secret = secrets.token_urlsafe(32)
        self._hash, self._until = hash_key(secret), self._clock() + GOOD_FOR_SECONDS
        return secret

    def take(self, secret: str) -> None:
        """Uses the secret up.

        Raises:
            NotAuthenticated: it is wrong, used up or too old.
        """
        known = self._hash or ""
        if not secrets.compare_digest(known, hash_key(secret)) or self._clock() >= self._until:
            raise NotAuthenticated("this link is not good (any more)", "Start the server again: it prints a new one.")
        self._hash = None

    def give_back(self, secret: str) -> None:
        """Makes the secret good again: what it was taken for did not come about."""
        self._hash = hash_key(secret)
