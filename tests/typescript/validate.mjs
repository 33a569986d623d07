// Reads a list of AsyncAPI documents, and prints for each what the official parser finds: errors, warnings.
import { json } from "node:stream/consumers";
import { Parser } from "@asyncapi/parser";

const parser = new Parser();
const found = [];
for (const document of await json(process.stdin)) {
  const { diagnostics } = await parser.parse(document);
  const bad = diagnostics.filter(({ severity }) => severity < 2); // the rest is advice, such as to use 3.1
  found.push(bad.map(({ path, message }) => `${path.join(".")}: ${message}`));
}
console.log(JSON.stringify(found));
