"""Authentication as tutorials show it: the token is in the URL. See lessons/auth_server.md."""

import os
import time
from typing import Annotated

import jwt
from fastapi import Depends, FastAPI, HTTPException, WebSocket
from fastapi.security import OAuth2PasswordRequestForm
from pwdlib import PasswordHash

SECRET_KEY = os.environ.get("SECRET_KEY", "change me: this key is in the repository")
app = FastAPI()
passwords = PasswordHash.recommended()
users = {"alice": passwords.hash("wonderland")}


@app.websocket("/ws/producer")
async def producer(websocket: WebSocket, token: str) -> None:
    try:
        jwt.decode(token, SECRET_KEY, algorithms=["HS256"])
    except jwt.InvalidTokenError:
        return await websocket.close(1008, "the token is not valid")
    await websocket.accept()
    while True:
        await websocket.send_text(await websocket.receive_text())


@app.post("/token")
async def login(form: Annotated[OAuth2PasswordRequestForm, Depends()]) -> dict[str, str]:
    if form.username not in users or not passwords.verify(form.password, users[form.username]):
        raise HTTPException(401, "wrong user name or password")
    claims = {"sub": form.username, "exp": int(time.time()) + 3600}
    return {"access_token": jwt.encode(claims, SECRET_KEY), "token_type": "bearer"}
