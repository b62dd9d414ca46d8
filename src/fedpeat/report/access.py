"""Who may look at a run: those with the token, who ask for this host by its own name."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Final

from fedpeat.core.errors import ConfigError

__all__ = ["Access", "is_loopback", "make_access"]

_SHORTEST_TOKEN: Final = 16
_LONGEST_TOKEN: Final = 256
_TOKEN_SIGNS: Final = frozenset(
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
)
"""Signs that stand for themselves in an address, a header and a cookie."""


@dataclass(frozen=True)
class Access:
    """What a request must bring.

    Attributes:
        token: What it must know; None if everybody on this machine may look.
        host_names: Names in the header ``Host`` that are this server's, in lower case. Addresses
            are always allowed. Another name may be one that a hostile page has pointed at this
            machine, to read through the browser what only the browser can reach (DNS rebinding).
        cookie_name: Cookie that the token is kept in.
    """

    token: str | None
    host_names: frozenset[str]
    cookie_name: str = "fedpeat"

    def allows_host(self, header: str) -> bool:
        """Return whether a header ``Host`` names this server."""
        name = _host_name(header)
        return name in self.host_names or _address(name) is not None

    def allows(self, authorization: str, cookies: str, offered: str) -> bool:
        """Return whether one of three places brings the token.

        Args:
            authorization: Header ``Authorization``.
            cookies: Header ``Cookie``.
            offered: Value of ``?token=``.
        """
        if self.token is None:
            return True
        scheme, _, bearer = authorization.partition(" ")
        given = (
            bearer.strip() if scheme.lower() == "bearer" else "",
            _cookie(cookies, self.cookie_name),
            offered,
        )
        found = [_is_same(one, self.token) for one in given]  # all, so that the time tells nothing
        return any(found)

    def cookie(self) -> str:
        """Return the header ``Set-Cookie`` that keeps the token in the browser, out of scripts."""
        return f"{self.cookie_name}={self.token}; Path=/; HttpOnly; SameSite=Strict"


def make_access(host_names: Sequence[str], token: str | None, *, needs_token: bool) -> Access:
    """Return the access rules of a server.

    Args:
        host_names: Names that clients may ask for, beside ``localhost`` and this machine's own.
        token: The token, if there is one.
        needs_token: Whether one is made up where there is none.

    Raises:
        ConfigError: If the token is too short to be safe, or has signs that need quoting.
    """
    if token is None and needs_token:
        token = secrets.token_urlsafe(32)
    if token is not None and not (
        _SHORTEST_TOKEN <= len(token) <= _LONGEST_TOKEN and set(token) <= _TOKEN_SIGNS
    ):
        raise ConfigError(
            f"the token must be {_SHORTEST_TOKEN} to {_LONGEST_TOKEN} letters, digits or - . _ ~, "
            f"got {len(token)} signs"
        )
    names = {"localhost", socket.gethostname(), *host_names}
    return Access(token, frozenset(name.lower() for name in names if name))


def is_loopback(address: str) -> bool:
    """Return whether only this machine can reach what listens on an address."""
    found = _address(address)
    return found is not None and found.is_loopback


def _host_name(header: str) -> str:
    """Return the name in a header ``Host``, without its port, in lower case."""
    header = header.strip().lower()
    if header.startswith("["):  # [::1]:8321
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _cookie(header: str, name: str) -> str:
    try:
        morsel = SimpleCookie(header).get(name)
    except CookieError:
        return ""
    return morsel.value if morsel else ""


def _is_same(given: str, token: str) -> bool:
    """Compare in a time that does not depend on where, or in what length, two texts differ."""
    digests = [hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in (given, token)]
    return hmac.compare_digest(*digests)
