// A client for asyncapi_server.py. The types of its messages are made from the server's document.
// Run `node tests/typescript/client.mts` (Node 22.18 or later): it posts a note, and reads the board.

import type { Message, Note, Notes, Post, Read } from "./messages.mts";

type Call = Read | Post;
type Unnumbered<C> = C extends Call ? Omit<C, "id"> : never; // of each call, not only what they have in common

const TIMEOUT = 5000; // milliseconds that a reply may take
const socket = new WebSocket(process.argv[2] ?? "ws://127.0.0.1:8000/ws");
const waiting = new Map<number, (reply: Notes | Error) => void>(); // the calls without a reply, by id
let calls = 0;

function call(call: Unnumbered<Call>): Promise<Notes> {
  const id = ++calls;
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => settle(new Error("no reply")), TIMEOUT);
    function settle(reply: Notes | Error): void {
      clearTimeout(timer);
      waiting.delete(id);
      reply instanceof Error ? reject(reply) : resolve(reply);
    }
    waiting.set(id, settle);
    socket.send(JSON.stringify({ ...call, id }));
  });
}

function receive(message: Exclude<Message, Call>): void {
  switch (message.type) {
    case "note":
      return show(message);
    case "notes":
      return waiting.get(message.id)?.(message);
    case "error":
      console.error(message.reason, message.details);
      if (message.id !== null) waiting.get(message.id)?.(new Error(message.reason));
      return;
    default:
      message satisfies never; // the compiler finds a type that has no case
  }
}

function show(note: Note): void {
  console.log(`${note.board}: ${note.text}`);
}

socket.onmessage = ({ data }) => receive(JSON.parse(data));
socket.onerror = () => console.error("no connection");
socket.onclose = () => waiting.forEach((settle) => settle(new Error("closed")));
socket.onopen = async () => {
  console.log("notes:", (await call({ type: "post", board: "news", text: "hello from TypeScript" })).count);
  await call({ type: "read", board: "news" });
  socket.close();
};
