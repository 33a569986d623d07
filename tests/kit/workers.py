"""The worker processes of a server that uvicorn runs with --workers."""

import psutil
from websockets.asyncio.client import ClientConnection

from tests.kit.clients import port
from tests.kit.servers import Server


def serving(server: Server) -> int:
    """How many workers have started, those included that were killed since."""
    return server.log.count("Application startup complete")


def workers(server: Server) -> list[psutil.Process]:
    return [process for process in server.processes() if "spawn_main" in " ".join(process.cmdline())]


def worker(server: Server, websocket: ClientConnection) -> psutil.Process:
    """The one that has this connection."""
    [process] = [
        process
        for process in workers(server)
        if any(conn.raddr and conn.raddr.port == port(websocket) for conn in process.net_connections("tcp"))
    ]
    return process
