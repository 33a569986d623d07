"""typed_server.py with a router from another file: handlers that go wrong, for the tests."""

import asyncio
import os
from typing import Literal

from lessons import typed_server
from lessons.typed_server import Call, Client, Numbered, Router, app
from tests.examples import typed_ask

typed_server.HANDLER_TIMEOUT = int(os.environ.get("HANDLER_TIMEOUT", "1"))
typed_ask.ANSWER_TIMEOUT = float(os.environ.get("ANSWER_TIMEOUT", "1"))
messages = Router()
__all__ = ["app"]


class Echo(Call):
    text: str


class Echoed(Numbered):
    type: Literal["echoed"] = "echoed"
    text: str


@messages.on("echo")
async def echo(call: Echo, client: Client) -> Echoed:
    return Echoed(id=call.id, text=call.text)


@messages.on("fail")
async def fail(call: Call, client: Client) -> Echoed:
    raise ValueError("a handler's mistake")


@messages.on("sleep")
async def sleep(call: Call, client: Client) -> Echoed:
    await asyncio.Event().wait()
    return Echoed(id=call.id, text="never")


@messages.on("ask")
async def ask(call: Call, client: Client) -> Echoed:
    """Ask the client that waits for this very handler."""
    await typed_ask.ask(client, "does this work?")
    return Echoed(id=call.id, text="never")


typed_server.messages.include(messages)
