// A client for typed_server.py, whose messages' types were made from the server's documentation.
// Run `node tests/typescript/client.mts` (22.18 or later): it watches a board, posts a note, and gets it.

import type { Message, Note, Post, Watch, Watchers } from "./messages.mts";

type Call = Watch | Post;
type Unnumbered<C> = C extends Call ? Omit<C, "id"> : never; // of each call, not of what they have in common

const TIMEOUT = 5000; // milliseconds that a reply may take
const socket = new WebSocket(process.argv[2] ?? "ws://127.0.0.1:8000/ws");
const waiting = new Map<number, (reply: Watchers | Error) => void>(); // for a reply, by its id
let calls = 0;

function call(call: Unnumbered<Call>): Promise<Watchers> {
  const id = ++calls;
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => settle(new Error("no reply")), TIMEOUT);
    function settle(reply: Watchers | Error): void {
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
    case "watchers":
      return waiting.get(message.id)?.(message);
    case "error":
      console.error(message.reason, message.details);
      if (message.id !== null) waiting.get(message.id)?.(new Error(message.reason));
      return;
    default:
      message satisfies never; // a type that is not here is an error when this is compiled
  }
}

function show(note: Note): void {
  console.log(`${note.board}: ${note.text}`);
}

socket.onmessage = ({ data }) => receive(JSON.parse(data));
socket.onerror = () => console.error("no connection");
socket.onclose = () => waiting.forEach((settle) => settle(new Error("closed")));
socket.onopen = async () => {
  console.log("watchers:", (await call({ type: "watch", board: "news" })).count);
  await call({ type: "post", board: "news", text: "hello from TypeScript" });
  socket.close();
};
