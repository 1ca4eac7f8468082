"""How PostgreSQL is spoken to: what a connection begins with, and when it is given up."""

import asyncio
import os
import socket
from typing import Any

from psycopg import AsyncConnection

LOCK_SECONDS = 10.0  # how long one writer waits for another
ANSWER_SECONDS = 15.0  # how long the server may say nothing: longer than it may wait for a lock
IDLE_SECONDS = 30.0  # how long it bears a transaction that does nothing


class Connection(AsyncConnection[Any]):
    """A connection that is given up when the server says nothing for ANSWER_SECONDS.

    One that hangs, or a network that swallows everything, would otherwise be waited for without end: TCP tells the
    driver nothing.
    """

    async def wait(self, *args: Any, **options: Any) -> Any:
        """Returns what the driver's generator does. Every exchange with the server passes through here."""
        timer = asyncio.get_running_loop().call_later(ANSWER_SECONDS, self._hang_up)
        try:
            return await super().wait(*args, **options)
        finally:
            timer.cancel()

    def _hang_up(self) -> None:
        # The driver then reads the end of the stream, and says that the connection is lost.
        with socket.socket(fileno=os.dup(self.pgconn.socket)) as line:
            line.shutdown(socket.SHUT_RDWR)


def prepare(connection: Any, _: Any) -> None:
    """Tells the server, on a new connection, how long it may wait for what."""
    cursor = connection.cursor()
    # A process that stands still in the middle of a transaction must not hold up the others for good.
    cursor.execute(f"SET idle_in_transaction_session_timeout = {IDLE_SECONDS * 1000:.0f}")
    cursor.execute(f"SET lock_timeout = {LOCK_SECONDS * 1000:.0f}")
    cursor.close()
    connection.commit()
