"""Messages with types as they are usually written: dicts, and a chain of ifs.

It also has every fault of lessons/naive/pubsub_server.py. Run
`uvicorn lessons.naive.typed_server:app`.
"""

from fastapi import FastAPI, WebSocket, WebSocketDisconnect

app = FastAPI()
watchers: dict[str, list[WebSocket]] = {"news": [], "jobs": []}


@app.websocket("/ws")
async def endpoint(websocket: WebSocket) -> None:
    await websocket.accept()
    try:
        while True:
            message = await websocket.receive_json()
            if message["type"] == "watch":
                watchers[message["board"]].append(websocket)
                await websocket.send_json({"count": len(watchers[message["board"]])})
            elif message["type"] == "post":
                for watcher in watchers[message["board"]]:
                    await watcher.send_json(message)
    except WebSocketDisconnect:
        for board in watchers.values():
            if websocket in board:
                board.remove(websocket)
