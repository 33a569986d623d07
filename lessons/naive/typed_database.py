"""A database session for each connection: the dependency of an HTTP route, used for a websocket.

Run `uvicorn lessons.naive.typed_database:app`.
"""

from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Annotated

from fastapi import Depends, FastAPI, WebSocket, WebSocketDisconnect
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

app = FastAPI()
# Without `pool_timeout`, a call waits for 30 seconds before it fails.
file = Path(gettempdir()) / "typed_database.sqlite"
engine = create_async_engine(f"sqlite+aiosqlite:///{file}", pool_timeout=1)
sessions = async_sessionmaker(engine)


async def get_session() -> AsyncIterator[AsyncSession]:
    async with sessions() as session:
        yield session


Session = Annotated[AsyncSession, Depends(get_session)]


@app.websocket("/ws")
async def endpoint(websocket: WebSocket, session: Session) -> None:
    await websocket.accept()
    with suppress(WebSocketDisconnect):
        while True:
            await websocket.receive_text()
            number = await session.scalar(text("SELECT 1 + 1"))
            await websocket.send_json(number)


@app.get("/number")
async def number(session: Session) -> int:
    return await session.scalar(text("SELECT 1 + 1")) or 0
