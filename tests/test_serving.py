import errno
import os

import pytest

from api import serving


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("2001:db8::1", "http://[2001:db8::1]:80"),
        ("sitter.example", "http://sitter.example:80"),
    ],
)
def test_a_server_is_found_where_it_listens(host: str, url: str) -> None:
    assert serving.url(host, 80) == url


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EADDRINUSE, "is not free"),
        (errno.EADDRNOTAVAIL, "not an address of this machine"),
        (errno.EACCES, "may not listen on port 80"),
        (errno.ENOBUFS, os.strerror(errno.ENOBUFS)),
    ],
)
def test_the_reason_is_told_with_a_way_out(number: int, says: str) -> None:
    reason = serving._why_not(OSError(number, os.strerror(number)), "127.0.0.1", 80)
    assert says in reason
    assert "HOST" in reason or "PORT" in reason


def test_proxies_of_ipv4_are_known_on_a_socket_for_both_kinds() -> None:
    assert serving._proxies("127.0.0.1, 172.16.0.0/12,fd00::/8") == [
        "127.0.0.1/32",
        "172.16.0.0/12",
        "fd00::/8",
        "::ffff:127.0.0.1/128",
        "::ffff:172.16.0.0/108",
    ]
    assert serving._proxies("") == []
