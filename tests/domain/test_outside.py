import asyncio
import datetime
import ipaddress
import socket
import ssl
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from api.domain import outside
from api.domain.outside import Resolve, check_url, is_public, post
from api.errors import InvalidRequest
from tests.peers import Peer, peer, status

pytestmark = pytest.mark.anyio

TRUST = httpx2.create_ssl_context()
PUBLIC = ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"]
PRIVATE = [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "198.18.0.1", "192.0.2.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:a9fe:a9fe", "::ffff:0:7f00:1", "64:ff9b::7f00:1",
    "64:ff9b:1::7f00:1", "2002:7f00:1::", "2002:c0a8:101::", "2001:0:7f00:1::", "fc00::1", "fd00:ec2::254",
    "fe80::1", "fec0::1", "ff02::1", "2001:db8::1", "3fff::1", "5f00::1", "100::1",
]  # fmt: skip
# How a host may spell an address of this machine; {} is the port of a server that listens there.
SPELLINGS = [
    "http://127.0.0.1:{}/", "http://localhost:{}/", "http://LOCALHOST:{}/", "http://localhost.:{}/",
    "http://a.localhost:{}/", "http://127.1:{}/", "http://127.0.1:{}/", "http://2130706433:{}/",
    "http://0x7f000001:{}/", "http://0x7f.0.0.1:{}/", "http://0x7f.1:{}/", "http://017700000001:{}/",
    "http://0177.0.0.1:{}/", "http://127.0.0.1.:{}/", "http://127.000.000.001:{}/", "http://0:{}/",
    "http://0.0.0.0:{}/", "http://127.255.255.254:{}/", "http://[::1]:{}/", "http://[::]:{}/",
    "http://[0:0:0:0:0:0:0:1]:{}/", "http://[::ffff:127.0.0.1]:{}/", "http://[::ffff:7f00:1]:{}/",
    "http://[0:0:0:0:0:ffff:7f00:1]:{}/", "http://[::127.0.0.1]:{}/", "http://[64:ff9b::127.0.0.1]:{}/",
    "http://[2002:7f00:1::]:{}/", "http://[fe80::1%25lo]:{}/", "http://127\u30020\u30020\u30021:{}/",
    "http://\uff11\uff12\uff17.0.0.1:{}/", "http://\u24dbocalhost:{}/", "http://%6c%6f%63alhost:{}/",
    "http://user@127.0.0.1:{}/", "http://example.com@127.0.0.1:{}/", "http://127.0.0.1:{}\\@example.com/",
    "http://127.0.0.1:{}#@example.com/", "http://example.com:80@127.0.0.1:{}/", "https://127.0.0.1:{}/",
]  # fmt: skip


@pytest.fixture
def loopback() -> Iterator[Peer]:
    with peer() as ours:
        yield ours


def names(*answers: list[str]) -> tuple[Resolve, list[str]]:
    """A resolver that gives these answers, one after the other, and the names it was asked for."""
    asked: list[str] = []
    left = list(answers)

    async def resolve(name: str, port: int) -> list[str]:
        asked.append(name)
        return left.pop(0) if len(left) > 1 else left[0]

    return resolve, asked


async def send(
    url: str, allow_private: bool = False, resolve: Resolve = outside.resolve, trust: ssl.SSLContext = TRUST
) -> int:
    return (await post(url, b"{}", {"X-Kind": "test"}, trust, allow_private, resolve)).status


async def test_public_addresses_are_told_from_others() -> None:
    assert [text for text in PUBLIC if not is_public(ipaddress.ip_address(text))] == []
    assert [text for text in PRIVATE if is_public(ipaddress.ip_address(text))] == []


async def test_no_spelling_of_this_machine_is_dialled(loopback: Peer) -> None:
    assert len(SPELLINGS) > 28
    for spelling in SPELLINGS:
        with pytest.raises((InvalidRequest, OSError, UnicodeError)):
            await send(spelling.format(loopback.port))
    assert loopback.hits == []
    assert await send(SPELLINGS[0].format(loopback.port), allow_private=True) == 204
    assert len(loopback.hits) == 1


@pytest.mark.parametrize("address", PRIVATE)
async def test_a_name_that_leads_home_is_not_dialled(loopback: Peer, address: str) -> None:
    for answer in ([address], ["8.8.8.8", address], [address, "8.8.8.8"]):
        resolve, asked = names(answer)
        with pytest.raises(InvalidRequest) as caught:
            await send(f"http://hook.example:{loopback.port}/", resolve=resolve)
        assert caught.value.code == "address_not_public"
        assert asked == ["hook.example"]
    assert loopback.hits == []


async def test_a_name_is_resolved_once_and_what_it_meant_is_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    system = socket.getaddrinfo

    def system_lookup(host: str, *args: object, **kwargs: object) -> object:
        assert host == "127.0.0.2", f"{host} was looked up again"
        return system(host, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", system_lookup)
    resolve, asked = names(["127.0.0.2"], ["127.0.0.1"])
    with peer(host="127.0.0.2") as first, peer() as second:
        url = f"http://Rebind.example:{first.port}/a/b?c=d#e"
        assert await send(url, allow_private=True, resolve=resolve) == 204
        assert asked == ["rebind.example"]
        assert [(hit.method, hit.path, hit.body) for hit in first.hits] == [("POST", "/a/b?c=d", b"{}")]
        assert first.hits[0].headers["host"] == f"rebind.example:{first.port}"
        assert first.hits[0].headers["x-kind"] == "test"
        assert second.hits == []


async def test_an_address_that_does_not_answer_leaves_the_next(loopback: Peer) -> None:
    resolve, _ = names(["127.0.0.9", "127.0.0.1"])
    assert await send(f"http://hook.example:{loopback.port}/", allow_private=True, resolve=resolve) == 204
    resolve, _ = names([])
    with pytest.raises(OSError, match="no address"):
        await send(f"http://hook.example:{loopback.port}/", resolve=resolve)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_a_redirect_is_an_answer_like_any_other(loopback: Peer, code: int) -> None:
    with peer(status(code, Location=loopback.url())) as elsewhere:
        assert await send(elsewhere.url(), allow_private=True) == code
        assert len(elsewhere.hits) == 1
    assert loopback.hits == []


async def test_proxies_of_the_environment_are_not_used(loopback: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    with peer() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert await send(loopback.url(), allow_private=True) == 204
        assert (len(loopback.hits), len(proxy.hits)) == (1, 0)


def _trickle(handler: BaseHTTPRequestHandler) -> None:
    for _ in range(100):
        handler.wfile.write(b"H")
        handler.wfile.flush()
        time.sleep(0.1)


def _flood(handler: BaseHTTPRequestHandler) -> None:
    status(200, X="y" * 1000)(handler)
    for _ in range(10_000):
        handler.wfile.write(b"x" * 1_000_000)


def _headers_without_end(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(1_000_000):
        handler.wfile.write(b"X-%d: %s\r\n" % (number, b"y" * 1000))


def _nonsense(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.9\r\n\r\n")


async def test_a_receiver_cannot_hold_us_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "SECONDS", 0.5)
    with peer(_trickle) as slow:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            await send(slow.url(), allow_private=True)
        assert time.monotonic() - began < 5
    monkeypatch.undo()
    with peer(_flood) as large:
        assert await send(large.url(), allow_private=True) == 200
    for reply in (_headers_without_end, _nonsense):
        with peer(reply) as strange, pytest.raises(httpx2.HTTPError):
            await send(strange.url(), allow_private=True)


async def test_a_name_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(name: str, port: int) -> list[str]:
        await asyncio.sleep(60)
        return []

    monkeypatch.setattr(outside, "SECONDS", 0.2)
    with pytest.raises(TimeoutError):
        await send("http://hook.example/", resolve=never)


@pytest.mark.parametrize(
    "url",
    ["", "hook", "/hook", "//example.com/", "ftp://example.com/", "file:///etc/passwd", "http://", "http:///a",
     "https://user:secret@example.com/", "http://example.com:22/", "http://example.com:0/", "http://example.com:65536/",
     "http://example.com:-1/", "http://exa\x00mple.com/", "http://exa\nmple.com/", "http://[::1",
     "http://" + "a." * 130,
     "http://10.0.0.1/", "http://[::1]/", "http://localhost/", "http://a.localhost./"],
)  # fmt: skip
async def test_what_can_be_no_webhook_is_refused_at_once(url: str) -> None:
    with pytest.raises(InvalidRequest):
        check_url(url, allow_private=False)


@pytest.mark.parametrize(
    "url",
    ["https://example.com", "http://example.com:8080/a?b=c", "https://b\u00fccher.example/", "https://example.com:443/",
     "http://8.8.8.8/", "https://[2606:4700::1111]:8443/", "http://a_b.example/"],
)  # fmt: skip
async def test_what_can_be_one_is_let_through(url: str) -> None:
    check_url(url, allow_private=False)


async def test_private_ones_can_be_allowed() -> None:
    for url in ("http://localhost:8080/", "http://10.0.0.1/", "http://[::1]:9000/"):
        check_url(url, allow_private=True)
    with pytest.raises(InvalidRequest):
        check_url("http://localhost:22/", allow_private=True)


@pytest.fixture
def certified(tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's context with a certificate for hook.example, and a client's that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hook.example")])
    moment = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment - datetime.timedelta(hours=1))
        .not_valid_after(moment + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("hook.example")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "hook.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    return server, ssl.create_default_context(cafile=str(path))


async def test_the_certificate_must_be_the_names(certified: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server, trust = certified
    asked: list[str | None] = []
    server.sni_callback = lambda _, name, __: asked.append(name)
    resolve, _ = names(["127.0.0.1"])
    with peer(tls=server) as secure:
        url = f"https://{{}}:{secure.port}/"
        for name in ("hook.example", "hook.example."):
            assert await send(url.format(name), True, resolve, trust) == 204
        for name, context in (("other.example", trust), ("127.0.0.1", trust), ("hook.example", TRUST)):
            with pytest.raises(httpx2.ConnectError):
                await send(url.format(name), True, resolve, context)
        assert len(secure.hits) == 2
        assert asked[:3] == ["hook.example", "hook.example", "other.example"]
