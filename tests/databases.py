"""Databases for tests: a PostgreSQL server of our own, and fresh databases on it or in SQLite files."""

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import psutil
import psycopg
from psycopg import sql

PATIENCE_SECONDS = 60.0
OPTIONS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "32MB",
    "timezone": "Asia/Kathmandu",  # an hour of its own, so that a time without a zone shows
    "fsync": "off",
    "full_page_writes": "off",
}
# The server ends when it is told how (a signal's name on stdin) or when we are gone, however we went.
WATCHED = """
folder=$1; shift
exec 3<&0
"$@" 3<&- & server=$!
{ read -r how || { how=QUIT; : >"$folder/orphan"; }; kill -s "$how" $server; } <&3 &
watch=$!
wait $server; code=$?
kill $watch 2>/dev/null
if [ -e "$folder/orphan" ]; then rm -rf "$folder"; fi
exit $code
"""


def programs() -> Path | None:
    """Returns the folder of the newest PostgreSQL's programs, or None when there is none."""
    newest = sorted(
        (path for path in Path("/usr/lib/postgresql").glob("*/bin") if (path / "postgres").exists()),
        key=lambda path: float(path.parent.name),
    )
    if newest:
        return newest[-1]
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else None


class PostgreSQL:
    """A server on a free loopback port, with a folder and a password of its own. As a context manager it runs.

    Args:
        bin: see `programs`.
    """

    def __init__(self, bin: Path) -> None:
        self._bin = bin
        self._password = secrets.token_hex(16)
        # PostgreSQL refuses to run as root.
        self._owner = _unprivileged_user() if os.geteuid() == 0 else None
        self._process: subprocess.Popen[str] | None = None
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port: int = listener.getsockname()[1]

    def url(self, name: str) -> str:
        return f"postgresql://sitter:{self._password}@127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        """Starts the server, or starts it again, and waits until it answers."""
        options = [f"--{name}={value}" for name, value in {**OPTIONS, "port": str(self.port)}.items()]
        command = [str(self._bin / "postgres"), "-D", str(self._folder / "data"), *options]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", WATCHED, "sh", str(self._folder), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                cwd=self._folder,
                start_new_session=True,  # Ctrl-C is for pytest, which then ends the server
                **self._identity(),
            )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self._answers():
            alive = self._process.poll() is None and time.monotonic() < deadline
            assert alive, f"PostgreSQL does not start: {(self._folder / 'log').read_text()}"
            time.sleep(0.05)

    def stop(self, how: Literal["INT", "QUIT"] = "INT") -> None:
        """Stops the server: INT ends its clients' connections first, QUIT is as if the power failed."""
        process, self._process = self._process, None
        if process is not None:
            process.communicate(f"{how}\n", timeout=PATIENCE_SECONDS)

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Stops every process of the server for the block, without a word to its clients."""
        assert self._process is not None
        processes = psutil.Process(self._process.pid).children(recursive=True)
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                process.resume()

    @contextmanager
    def database(self, template: str = "template0") -> Iterator[str]:
        """Makes a database for the block and yields its name."""
        name = f"test_{secrets.token_hex(8)}"
        create = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy")
        self.execute(create.format(sql.Identifier(name), sql.Identifier(template)))
        try:
            yield name
        finally:
            self.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    def execute(self, statement: sql.Composed) -> None:
        """Runs `statement` as the server's owner."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement)

    def _identity(self) -> dict[str, Any]:
        if self._owner is None:
            return {}
        user, group = self._owner
        return {"user": user, "group": group, "extra_groups": []}

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url("postgres"), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="sitter-postgresql-"))
        try:
            password = self._folder / "password"
            password.write_text(self._password)
            if self._owner is not None:
                for path in (self._folder, password):
                    os.chown(path, *self._owner)
            initdb = [str(self._bin / "initdb"), "-D", str(self._folder / "data"), "-U", "sitter", "--no-sync"]
            made = subprocess.run(
                [*initdb, "-E", "UTF8", "--locale=C", "-A", "scram-sha-256", f"--pwfile={password}"],
                capture_output=True,
                text=True,
                check=False,
                cwd=self._folder,
                **self._identity(),
            )
            assert made.returncode == 0, made.stderr
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


def _unprivileged_user() -> tuple[int, int]:
    known = {user.pw_name: (user.pw_uid, user.pw_gid) for user in pwd.getpwall()}
    for name in ("postgres", "nobody"):
        if name in known:
            return known[name]
    raise RuntimeError("PostgreSQL refuses to run as root, and there is neither a user postgres nor nobody")
