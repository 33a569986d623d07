"""A consumer with a bug: it crashes on each payload, as lessons/ack_server.md shows it."""

from websockets.sync.client import connect

with connect("ws://127.0.0.1:8000/ws/consumer", proxy=None) as websocket:
    print(websocket.recv(), flush=True)
    raise ValueError("a bug in the code that handles the payload")
