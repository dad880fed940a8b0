"""Which requests the server and the app answer: those that call this computer by its name, and none of foreign pages.

A web page can make a browser send requests to this computer, which their `Origin` shows. Where a foreign name resolves
to this computer (DNS rebinding), their `Host` shows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit


LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")


def check_host(headers: Mapping[str, str], hosts: Iterable[str] | None) -> str | None:
    """What is wrong with the `Host` of a request, if anything is.

    Args:
        headers: of the request, with names in lower case or matched in any case.
        hosts: allowed names, in lower case and without ports; `None` for any.
    """
    host = headers.get("host", "")
    if hosts is None or re.sub(r":\d+$", "", host).lower() in hosts:
        return None
    return f"`Host` is {host[:200]!r}; allowed are {', '.join(hosts)}, each also with a port."


def check_origin(headers: Mapping[str, str]) -> str | None:
    """What is wrong with the `Origin` of a request to a page's own server, if anything is."""
    origin = headers.get("origin")
    own = {headers.get("host"), headers.get("x-forwarded-host")}  # a foreign page cannot set either
    if origin is None or urlsplit(origin).netloc in own - {None}:
        return None
    return f"`Origin` is {origin[:200]!r}; other web pages than this one may not use it."


class OwnPageOnly:
    """ASGI middleware that answers other requests with status 403 and an error in JSON.

    Args:
        hosts: see [`check_host`].
    """

    def __init__(self, app, hosts: Iterable[str] | None):
        self._app, self._hosts = app, hosts

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            if wrong := check_host(headers, self._hosts) or check_origin(headers):
                body = json.dumps({"error": {"message": wrong}}).encode()
                kind = [(b"content-type", b"application/json")]
                await send({"type": "http.response.start", "status": 403, "headers": kind})
                await send({"type": "http.response.body", "body": body})
                return
        await self._app(scope, receive, send)


__all__ = ["LOOPBACK_HOSTS", "OwnPageOnly", "check_host", "check_origin"]
