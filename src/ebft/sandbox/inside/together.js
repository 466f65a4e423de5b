// Candidate and tests in one JavaScript engine: the code first, only then the tests and the nonce, which it answers with.
"use strict";
const fs = require("node:fs");
const vm = require("node:vm");
const READ = 3;
const WRITE = 4;

function exactly(size) {
  const data = Buffer.alloc(size);
  let have = 0;
  while (have < size) {
    const got = fs.readSync(READ, data, have, size - have, null);
    if (got === 0) process.exit(1);
    have += got;
  }
  return data;
}

function receive() {
  return exactly(Number(exactly(8).readBigUInt64BE())).toString("utf8");
}

function send(text) {
  const data = Buffer.from(text, "utf8");
  const head = Buffer.alloc(8);
  head.writeBigUInt64BE(BigInt(data.length));
  fs.writeSync(WRITE, Buffer.concat([head, data]));
}

function run(code, filename) {
  try {
    vm.runInThisContext(code, { filename });
  } catch (error) {
    send("F" + String((error && error.name && `${error.name}: ${error.message}`) || error));
    process.exit(1);
  }
}

Object.assign(globalThis, { require, module, exports });
run(receive(), "candidate.js");
send("R");
const tests = receive();
receive(); // the entry point, which is Python's
const nonce = receive();
run(tests, "tests.js");
// Not at `exit`, which the candidate can bring about; this comes when nothing is left to do, promises included.
process.on("beforeExit", () => {
  send("P" + nonce);
  process.exit(0);
});
