"""Find free ports for servers."""

import fcntl
import os
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

# The system gives higher ports to connections (ip_local_port_range). A node of a Redis Cluster also uses the
# port that is 10,000 higher.
FIRST_PORT, LAST_PORT = 12_000, 21_999
LAST_GIVEN = Path(tempfile.gettempdir()) / f"websocket-tests-port-{os.getuid()}"


def free_port() -> int:
    """Return a port that is free, and stays free until a server uses it.

    The system's choice (port 0) may go to another test, or to a connection, before the server has it.
    The test would then talk to a stranger.
    """
    with LAST_GIVEN.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # for all processes of the tests
        file.seek(0)
        port = int(file.read() or FIRST_PORT)
        while True:
            port = port + 1 if port < LAST_PORT else FIRST_PORT
            with suppress(OSError), socket.socket() as sock:
                sock.bind(("127.0.0.1", port))
                break
        file.truncate(0)
        file.write(str(port))
    return port
