"""asyncapi_server.py with a handler from another file, for the tests."""

from typing import Literal

from fastapi import WebSocket

from lessons.asyncapi_server import Call, Numbered, app, messages

__all__ = ["app"]


class Echo(Call):
    text: str


class Echoed(Numbered):
    type: Literal["echoed"] = "echoed"
    text: str


@messages.on("echo")
async def echo(call: Echo, websocket: WebSocket) -> Echoed:
    """Say it again."""
    return Echoed(id=call.id, text=call.text)
