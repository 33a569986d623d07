"""Mount server.py in an app of your own, as README.md shows it."""

from fastapi import FastAPI

import server

app = FastAPI(lifespan=server.lifespan)
app.mount("/queue", server.app)
