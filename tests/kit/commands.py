"""The commands that start the servers."""

import sys

PRODUCER, CONSUMER = "/ws/producer", "/ws/consumer"


def uvicorn_command(app: str) -> list[str]:
    """The command line for an app such as `server:app`, as the README gives it; the port follows."""
    return [sys.executable, "-m", "uvicorn", app, "--timeout-graceful-shutdown", "1", "--port"]


def with_options(command: list[str], *options: str) -> list[str]:
    """A command of uvicorn_command() with more options."""
    return [*command[:-1], *options, command[-1]]


# name -> the command that starts the server, to which a port is appended.
SERVERS = {
    "server.py": uvicorn_command("server:app"),
    "multiproc_server.py": [sys.executable, "multiproc_server.py", "--workers", "2", "--port"],
    "rooms_server.py": uvicorn_command("lessons.rooms_server:app"),
    "ack_server.py": uvicorn_command("lessons.ack_server:app"),
    "redis_server.py": uvicorn_command("lessons.redis_server:app"),
    "gateway_server.py": uvicorn_command("tests.gateway_app:app"),  # with ack_server.py behind it
}
ACKING = ["ack_server.py", "redis_server.py"]
MAX_PREFETCH = 1000
NAIVE = uvicorn_command("steps.step0_naive:app")
