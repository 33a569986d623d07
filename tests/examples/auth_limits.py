"""auth_server.py with the limits of limits_server.py, as the page of limits_server.py shows it."""

from typing import Annotated, Any

from fastapi import Depends, FastAPI, WebSocketException
from fastapi.exceptions import RequestValidationError

from lessons import auth_server, limits_server


async def user(claims: Annotated[dict[str, Any], Depends(auth_server.bearer)]) -> str:
    """Return the user's name, to count connections by user instead of by address."""
    return str(claims["sub"])


app = FastAPI()
app.add_middleware(auth_server.refuse_if_cancelled)
app.exception_handler(WebSocketException)(auth_server.close)
app.exception_handler(RequestValidationError)(auth_server.unprocessable)
app.get("/")(auth_server.index)
app.post("/token", dependencies=[Depends(limits_server.limit_logins)])(auth_server.log_in)
app.include_router(auth_server.app.router, dependencies=[Depends(limits_server.limit_connections)])
app.dependency_overrides[limits_server.client_of] = user
