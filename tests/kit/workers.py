"""The worker processes of a server that uvicorn runs with --workers."""

import psutil
from websockets.asyncio.client import ClientConnection

from tests.kit.clients import port
from tests.kit.servers import Server


def serving(server: Server) -> int:
    """Return how many workers have started, including those that were killed since."""
    return server.log.count("Application startup complete")


def workers(server: Server) -> list[psutil.Process]:
    """Return the worker processes that run now."""
    return [process for process in server.processes() if "spawn_main" in " ".join(process.cmdline())]


def worker(server: Server, websocket: ClientConnection) -> psutil.Process:
    """Return the process that a client is connected to."""
    for process in server.processes():
        for connection in process.net_connections("tcp"):
            if connection.raddr and connection.raddr.port == port(websocket):
                return process
    raise AssertionError(f"no process holds the connection from port {port(websocket)}")
