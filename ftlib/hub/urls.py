"""Downloads of images by URL, from the public internet only.

A URL of a dataset may lead into the network of the machine that stages it. So the host's addresses are checked, the
connection goes to a checked address (another look-up could give another), and all of it is done again after each
redirect. Proxies of the environment are not used, since they would look up the host themselves. Requests carry no
token, cookie or password.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

MAX_REDIRECTS = 5
SECONDS = 120
"""For one image, with all redirects."""

_WAIT = 20
_CHUNK = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
_UNQUOTED = "%/?:@!$&'()*+,;=~-._[]"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_DOCUMENTATION = ipaddress.ip_network("3fff::/20")

Resolver = Callable[[str, int], Sequence[str]]
"""(host, port) → its addresses."""


class DownloadError(Exception):
    """A URL that is not downloaded; the message has no query string."""


def without_query(url: str) -> str:
    """Return a URL without password, query string and fragment, for messages and records."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        host = f"[{host}]" if ":" in host else host
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "(not a URL)"
    return urlunsplit((parts.scheme, f"{host}{port}", parts.path, "", ""))


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also behind forms of IPv6 that contain one of IPv4."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if found not in _GLOBAL_UNICAST or found in _DOCUMENTATION:  # is_global misses some, by Python's version
            return False
    return found.is_global and not found.is_multicast


def addresses_of(host: str, port: int) -> list[str]:
    """Return the addresses of a host."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def download(
    url: str,
    max_bytes: int,
    resolve: Resolver = addresses_of,
    is_allowed: Callable[[str], bool] = is_public,
    context: ssl.SSLContext | None = None,
) -> bytes:
    """Download an https URL.

    Args:
        max_bytes: of the content.
        resolve, is_allowed, context: look-up, check of an address, and certificates; others only in tests.

    Raises:
        DownloadError: another scheme, a host of a private network, too large, too slow, or not found.
    """
    deadline = time.monotonic() + SECONDS
    trusted = context or ssl.create_default_context()
    for _ in range(MAX_REDIRECTS + 1):
        shown = without_query(url)
        try:
            found = _request(url, max_bytes, resolve, is_allowed, trusted, deadline)
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        except DownloadError as error:
            raise DownloadError(f"{shown}: {error}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            kind = type(error).__name__  # the text of an error may contain the URL
            reason = f"cannot be downloaded ({kind})" if time.monotonic() < deadline else _too_late()
            raise DownloadError(f"{shown}: {reason}") from None
    raise DownloadError(f"{shown}: more than {MAX_REDIRECTS} redirects")


def _request(
    url: str,
    max_bytes: int,
    resolve: Resolver,
    is_allowed: Callable[[str], bool],
    context: ssl.SSLContext,
    deadline: float,
) -> bytes | str:
    """Return the content, or where it is redirected to."""
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise DownloadError("only https URLs are downloaded")
    if parts.username is not None or parts.password is not None:
        raise DownloadError("URLs with a user name or password are not downloaded")
    host, port = parts.hostname, parts.port or 443
    addresses = list(resolve(host, port))
    if not addresses or not all(map(is_allowed, addresses)):
        raise DownloadError(f"{host} is not a host of the public internet")
    connection = http.client.HTTPSConnection(host, port, timeout=_WAIT, context=context)
    with (
        _connect(addresses, port, deadline) as plain,
        context.wrap_socket(plain, server_hostname=host) as connection.sock,
        _shut_down_at(deadline, connection.sock),
    ):
        try:
            path = quote(urlunsplit(("", "", parts.path or "/", parts.query, "")), safe=_UNQUOTED)
            headers = {"User-Agent": "ftlib", "Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            if response.status in _REDIRECTS and (target := response.getheader("Location")):
                return target
            if response.status != http.client.OK:
                raise DownloadError(f"answer {response.status}")
            return _content(response, max_bytes, deadline)
        finally:
            connection.close()


def _connect(addresses: Sequence[str], port: int, deadline: float) -> socket.socket:
    """Connect to the first address that answers. The timeout is also that of the whole TLS handshake."""
    for number, address in enumerate(addresses, 1):
        try:
            return socket.create_connection((address, port), timeout=max(0.1, min(_WAIT, deadline - time.monotonic())))
        except OSError:
            if number == len(addresses) or time.monotonic() > deadline:
                raise
    raise AssertionError("no address")


@contextlib.contextmanager
def _shut_down_at(deadline: float, connected: socket.socket) -> Iterator[None]:
    """Context in which a connection ends at a time. The timeout of a socket starts anew with each byte it gets."""

    def shut_down() -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(connected, socket.SHUT_RDWR)  # SSLSocket's own goes on without encryption

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), shut_down)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _too_late() -> str:
    return f"not complete after {SECONDS} s"


def _content(response: http.client.HTTPResponse, max_bytes: int, deadline: float) -> bytes:
    if (response.length or 0) > max_bytes:
        raise DownloadError(f"larger than {max_bytes:,} bytes")
    expected, content = response.length, bytearray()
    while chunk := response.read1(_CHUNK):
        content += chunk
        if len(content) > max_bytes:
            raise DownloadError(f"larger than {max_bytes:,} bytes")
        if time.monotonic() > deadline:
            break
    if time.monotonic() > deadline:
        raise DownloadError(_too_late())
    if expected is not None and len(content) < expected:
        raise DownloadError("the connection ended early")
    return bytes(content)
