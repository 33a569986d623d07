"""The same broadcast on the package fastapi-websocket-pubsub, to compare with.

Run `python bench/fastapi_websocket_pubsub_server.py 8000`. Each copy is a call, which its subscriber answers.
"""

import sys

import uvicorn
from fastapi import FastAPI
from fastapi_websocket_pubsub import PubSubEndpoint

app = FastAPI()
PubSubEndpoint().register_route(app, "/ws")

if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
