"""Speaking to addresses that callers name, and never to this machine or its network by their hand (SSRF).

A name is resolved once, every address it has must be public, and that address itself is dialled: what the name means a
moment later does not matter. Redirects are not followed and proxies of the environment are not used.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from ssl import SSLContext

import httpx2

from api.errors import InvalidRequest

Address = IPv4Address | IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]

SECONDS = 10.0  # for everything: the name, the connection, the answer
CONNECT_SECONDS = 4.0  # for each address
PORTS = {80, 443}  # below 1024
NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052
UNICAST = IPv6Network("2000::/3")  # all that is given out; the rest is for purposes of its own
DOCUMENTATION = IPv6Network("3fff::/20")  # RFC 9637, which Python 3.11 does not know
HINT = "A webhook needs http or https, a public host, and port 80, 443 or one above 1023."


class NotPublic(InvalidRequest):
    """The address is, or leads to, this machine or a private network."""

    code = "address_not_public"
    hint = HINT + " The operator can allow others by WEBHOOK_ALLOW_PRIVATE."


@dataclass(frozen=True)
class Answer:
    """What the other side said, without its body."""

    status: int
    headers: httpx2.Headers


def is_public(address: Address) -> bool:
    """Tells whether `address` is one of the internet's, and so is the IPv4 address it wraps, if it does."""
    if isinstance(address, IPv4Address):
        return address.is_global and not address.is_multicast and not address.is_reserved
    wrapped = address.ipv4_mapped or address.sixtofour
    if address in NAT64:
        wrapped = IPv4Address(int(address) & 0xFFFF_FFFF)
    if wrapped is not None:
        return is_public(wrapped)
    return address.is_global and address in UNICAST and address not in DOCUMENTATION


def check_url(url: str, allow_private: bool) -> httpx2.URL:
    """Returns the parsed URL. What its host means is seen when it is dialled.

    Raises:
        InvalidRequest: it is none that we would ever send to.
    """
    try:
        parsed = httpx2.URL(url)
        host = parsed.raw_host.decode("ascii")
    except (httpx2.InvalidURL, UnicodeError) as error:
        raise InvalidRequest(f"webhook_url: this is no URL: {error}", HINT) from error
    if parsed.scheme not in ("http", "https") or not host or len(host) > 253 or parsed.userinfo:
        raise InvalidRequest("webhook_url: this is no http or https URL with a host and without a password", HINT)
    if parsed.port is not None and parsed.port not in PORTS and not 1024 <= parsed.port <= 65535:
        raise InvalidRequest(f"webhook_url: port {parsed.port} is not for webhooks", HINT)
    if not allow_private:
        name = host.rstrip(".").lower()
        literal = _literal(name)
        if name.rpartition(".")[2] == "localhost" or (literal is not None and not is_public(literal)):
            raise NotPublic("webhook_url: this address is not public")
    return parsed


def _literal(host: str) -> Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


async def resolve(host: str, port: int) -> list[str]:
    """Returns the addresses of a name; the system's resolver reads every spelling of a number too. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


async def post(
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    ssl: SSLContext,
    allow_private: bool,
    resolve: Resolve = resolve,
) -> Answer:
    """Sends `body` to `url` and returns the answer, whatever its status; its body is not read.

    Args:
        url: where to; see `check_url`.
        body: what.
        headers: more of them.
        ssl: whose certificates to trust.
        allow_private: whether any address will do.
        resolve: name and port → addresses.

    Raises:
        InvalidRequest: we do not send there.
        OSError: there is no such name, nobody answers, or not in time.
        httpx2.HTTPError: nobody answers, or what they say is not HTTP.
    """
    parsed = check_url(url, allow_private)
    name = parsed.raw_host.decode("ascii")
    port = parsed.port or (443 if parsed.scheme == "https" else 80)
    async with asyncio.timeout(SECONDS):
        addresses = [name] if _literal(name) else await resolve(name, port)
        for address in addresses:
            literal = _literal(address)
            if not allow_private and (literal is None or not is_public(literal)):
                raise NotPublic("webhook_url: the host's address is not public")
        error: Exception = OSError("the name has no address")
        for address in addresses:
            try:
                return await _post_to(address, parsed, body, headers, ssl)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as refused:
                error = refused
        raise error


async def _post_to(address: str, url: httpx2.URL, body: bytes, headers: Mapping[str, str], ssl: SSLContext) -> Answer:
    name = url.raw_host.decode("ascii")
    # The certificate is asked for, and checked, by the name.
    extensions = {} if _literal(name) else {"sni_hostname": name.rstrip(".")}
    # A client for each: no connection, cookie or anything else of one receiver is ever met by another.
    timeout = httpx2.Timeout(SECONDS, connect=CONNECT_SECONDS)
    async with (
        httpx2.AsyncClient(verify=ssl, trust_env=False, follow_redirects=False, timeout=timeout) as client,
        client.stream(
            "POST",
            url.copy_with(host=address),
            content=body,
            headers={**headers, "Host": url.netloc.decode("ascii")},
            extensions=extensions,
        ) as response,
    ):
        return Answer(response.status_code, response.headers)
