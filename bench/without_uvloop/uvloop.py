"""Found before the real one, so that uvicorn runs as it does with the project's requirements alone."""

raise ImportError("the servers run on asyncio's own loop, but for the one that is measured on uvloop")
