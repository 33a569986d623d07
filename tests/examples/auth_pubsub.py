"""Ask for a token in front of pubsub_server.py, as the page of auth_server.py shows it."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Security, WebSocketException
from fastapi.exceptions import RequestValidationError

from lessons import auth_server, pubsub_server


async def session(
    claims: Annotated[dict[str, Any], Depends(auth_server.bearer)],
) -> AsyncIterator[None]:
    """Run the endpoint, which accepts the connection itself, until the token expires."""
    try:
        async with asyncio.timeout(int(claims["exp"]) - time.time()) as timer:
            yield
    finally:
        if timer.expired():
            raise WebSocketException(1008, "the token has expired")


app = FastAPI()
app.add_middleware(auth_server.refuse_if_cancelled)
app.exception_handler(WebSocketException)(auth_server.close)
app.exception_handler(RequestValidationError)(auth_server.unprocessable)
app.post("/token")(auth_server.log_in)
members = [Security(session, scopes=["produce", "consume"])]
app.include_router(pubsub_server.app.router, dependencies=members)
