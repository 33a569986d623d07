"""typed_server.py with a router from another file: handlers that go wrong, for the tests."""

import asyncio
import os
from typing import Literal

from lessons import typed_server
from lessons.typed_server import Connection, Numbered, Router, app

typed_server.HANDLER_TIMEOUT = int(os.environ.get("HANDLER_TIMEOUT", "1"))
messages = Router()
__all__ = ["app"]


class Echo(Numbered):
    type: Literal["echo"]
    text: str


class Echoed(Numbered):
    type: Literal["echoed"] = "echoed"
    text: str


class Fail(Numbered):
    type: Literal["fail"]


class Sleep(Numbered):
    type: Literal["sleep"]


@messages.on(Echo)
async def echo(call: Echo, connection: Connection) -> Echoed:
    """Say it again."""
    return Echoed(id=call.id, text=call.text)


@messages.on(Fail)
async def fail(call: Fail, connection: Connection) -> Echoed:
    raise ValueError("a handler's mistake")


@messages.on(Sleep)
async def sleep(call: Sleep, connection: Connection) -> Echoed:
    await asyncio.Event().wait()
    return Echoed(id=call.id, text="never")


typed_server.messages.include(messages)
