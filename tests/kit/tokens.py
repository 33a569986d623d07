"""Log in to auth_server.py, and make tokens for it."""

import json
import math
import time
from contextlib import closing
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlencode

import jwt
from websockets.typing import Subprotocol

from tests.kit.servers import Server
from tests.kit.waiting import TIMEOUT

KEY = "the tests' own secret key, with more than 32 bytes"


def token(scope: Any = "produce consume", lasts: float = 3600, key: str = KEY, **claims: Any) -> str:
    """Return a token like those of the server, with these claims. A claim that is None is left out."""
    claims = {"sub": "alice", "exp": math.ceil(time.time() + lasts), "scope": scope, **claims}
    present = {name: value for name, value in claims.items() if value is not None}
    return jwt.api_jws.encode(json.dumps(present).encode(), key, "HS256")  # jwt.encode() would refuse some


def header(text: str) -> dict[str, Any]:
    return {"additional_headers": {"Authorization": f"Bearer {text}"}}


def pair(*texts: str) -> dict[str, Any]:
    return {"subprotocols": [Subprotocol(text) for text in ("bearer", *texts)]}


def request(
    server: Server, path: str, form: dict[str, str] | None = None, source: str = "127.0.0.1", bearer: str = ""
) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Return status, headers and JSON of an answer. Every `source` in 127.0.0.0/8 is this machine."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"} if form else {}
    if bearer:
        headers["Authorization"] = f"bearer {bearer}"
    connection = HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT, source_address=(source, 0))
    with closing(connection):
        connection.request("POST" if form else "GET", path, urlencode(form or {}), headers)
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return response.status, found, json.loads(response.read())


def log_in(
    server: Server, name: str, password: str, source: str = "127.0.0.1", **more: str
) -> tuple[int, dict[str, str], dict[str, Any]]:
    return request(server, "/token", {"username": name, "password": password, **more}, source)
