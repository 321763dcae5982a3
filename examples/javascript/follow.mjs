// Follow an agent from Node: exact copies of both its streams, and of all events. See docs/streams.md.
//
//     npm install
//     node follow.mjs ENDPOINT AGENT DIRECTORY
//
// DIRECTORY/<id>.stdout and <id>.stderr grow to exact copies, which are shown too; DIRECTORY/events gets a line for each.
// Kill it at any moment and start it again: the files themselves say how far it came, so nothing is missing or doubled.
// It is follow_without_library.py in another language, and the one goes on where the other was killed.
import { randomUUID } from "node:crypto";
import fs from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import * as zmq from "zeromq";

const ENDED = ["completed", "failed", "terminated"];
const ANSWER_MS = 2_000; // without an answer for so long: ask again
const PATIENCE_MS = 5_000; // without any answer for so long: say so, and go on asking
const SILENCE_MS = 35_000; // without any hint, not even a heartbeat (they come every 10 s): listen anew

class Refused extends Error {}

/** REQ for requests, SUB for hints; each is thrown away and made anew when in doubt. */
class Link {
  constructor(endpoint) {
    this.endpoint = endpoint;
    this.req = null;
    this.sub = null;
  }

  /** Send the same bytes, with the same request_id, until there is an answer: what is asked twice is done once. */
  async ask(type, fields = {}) {
    const raw = JSON.stringify({ type, request_id: randomUUID(), ...fields });
    let patience = Date.now() + PATIENCE_MS;
    for (;;) {
      try {
        const reply = JSON.parse((await this.attempt(raw)).toString());
        if (reply.success) return reply;
        if (reply.error_code !== "unavailable") // else a part of the server is being started again
          throw new Refused(`${reply.error} (${reply.error_code})`);
      } catch (error) {
        if (error instanceof Refused) throw error;
        this.req?.close();
        this.req = null;
        if (Date.now() > patience) {
          patience = Infinity;
          console.error(`[no answer from ${this.endpoint} (${error.message}); asking again and again]`);
        }
        await sleep(100);
      }
    }
  }

  async attempt(raw) {
    if (!this.req) {
      // relaxed and correlate: a reply that comes late is not taken for the next one
      this.req = new zmq.Request({ linger: 0, sendTimeout: ANSWER_MS, receiveTimeout: ANSWER_MS, relaxed: true, correlate: true,
                                   ipv6: this.endpoint.includes("[") });
      this.req.connect(this.endpoint);
    }
    await this.req.send(raw);
    const [reply] = await this.req.receive();
    return reply;
  }

  /** Return the next hint; an empty one where listening had to begin anew, so that some may be missing. */
  async hint(topics) {
    for (;;) {
      try {
        if (this.sub) return JSON.parse((await this.sub.receive())[1].toString());
        const { metadata } = await this.ask("health_check_request");
        if (!metadata.pub_endpoint) throw new Refused("this server publishes nothing; follow it over its Unix socket");
        this.sub = new zmq.Subscriber({ linger: 0, receiveTimeout: SILENCE_MS, ipv6: metadata.pub_endpoint.includes("[") });
        this.sub.subscribe(...topics);
        this.sub.connect(metadata.pub_endpoint);
        return {};
      } catch (error) {
        if (error instanceof Refused) throw error;
        this.sub?.close();
        this.sub = null;
        await sleep(100);
      }
    }
  }

  close() {
    this.req?.close();
    this.sub?.close();
  }
}

/** One stream of one agent: how far the copy reaches, and whether there may be more to read. */
class Stream {
  behind = true;
  done = false;

  constructor(agent, name, directory) {
    this.agent = agent;
    this.name = name;
    this.file = fs.openSync(`${directory}/${agent}.${name}`, fs.constants.O_RDWR | fs.constants.O_CREAT, 0o600);
    this.offset = fs.fstatSync(this.file).size; // what is kept is the position: the two cannot differ
  }

  heard(hint) {
    if (hint.topic === `${this.agent}.${this.name}`) {
      if (hint.offset > this.offset) this.behind = true; // a gap: read
      else if (hint.next_offset >= this.offset) this.keep(hint); // it fits, or its end does; what is older is known
    } else if (hint.topic === `status.${this.agent}`) { // a heartbeat says where the streams stand
      const end = hint.data.output?.[this.name]?.end_offset ?? 0;
      if (ENDED.includes(hint.status) || end > this.offset) this.behind = true;
    } else if (!hint.topic) this.behind = true;
  }

  async read(link) {
    const payload = { offset: this.offset, max_bytes: 1 << 20 };
    const { data: chunk } = await link.ask("control_command", { agent_id: this.agent, command_type: `read_${this.name}`, payload });
    if (chunk.dropped) console.error(`[${chunk.dropped} bytes of ${this.name} are gone]`); // the copy gets a hole there
    this.keep(chunk);
    this.behind = chunk.bytes > 0; // until there is nothing more
  }

  keep(chunk) {
    // decode first, then cut: offsets count bytes, and the length of a string in JavaScript is something else
    const data = Buffer.from(chunk.data ?? "", chunk.encoding === "base64" ? "base64" : "utf8");
    const fresh = data.subarray(Math.max(this.offset - chunk.offset, 0));
    this.offset = Math.max(this.offset, chunk.offset);
    this.offset += fs.writeSync(this.file, fresh, 0, fresh.length, this.offset);
    this.done = chunk.eof && this.offset === chunk.next_offset;
    process[this.name].write(fresh);
  }
}

/** All events of the server: which was the last one kept, and whether there may be more to ask for. */
class Events {
  behind = true;

  constructor(directory) {
    this.file = fs.openSync(`${directory}/events`, "a+", 0o600);
    const kept = fs.readFileSync(this.file);
    const end = kept.lastIndexOf("\n") + 1; // a line that a kill cut short is asked for again
    fs.ftruncateSync(this.file, end);
    const last = kept.subarray(0, end).toString().split("\n").at(-2);
    this.last = last ? JSON.parse(last).sequence : 0;
  }

  heard(hint) { // one that fits could be taken as it is; asking is simpler
    if (!hint.topic || (hint.update_type && hint.sequence > this.last)) this.behind = true;
  }

  async read(link) {
    const page = await link.ask("events_request", { since: this.last });
    if (page.first_kept > this.last + 1) console.error(`[events ${this.last + 1} to ${page.first_kept - 1} are gone]`);
    fs.writeSync(this.file, page.events.map((event) => `${JSON.stringify(event)}\n`).join(""));
    this.last = page.next;
    this.behind = page.more;
  }
}

/** Hear what is new, and read where that shows a gap, until the agent has ended. */
async function follow(link, name, directory) {
  fs.mkdirSync(directory, { recursive: true });
  const get = (agent_id) => link.ask("control_command", { agent_id, command_type: "get_status" });
  const { agent_id: agent } = await get(name); // another agent may have this name one day
  const streams = ["stdout", "stderr"].map((stream) => new Stream(agent, stream, directory));
  const events = new Events(directory);
  const everything = [...streams, events];
  while (!streams.every((stream) => stream.done) || !ENDED.includes((await get(agent)).status)) {
    const hint = await link.hint([`${agent}.stdout`, `${agent}.stderr`, `status.${agent}`, "status.", "server"]);
    for (const each of everything) each.heard(hint);
    while (everything.some((each) => each.behind))
      for (const each of everything) if (each.behind) await each.read(link);
  }
  await events.read(link); // the end is among them
}

const [endpoint, agent, directory] = process.argv.slice(2);
if (!directory) {
  console.error("usage: follow.mjs ENDPOINT AGENT DIRECTORY");
  process.exit(1);
}
const link = new Link(endpoint);
try {
  await follow(link, agent, directory);
} catch (error) {
  if (!(error instanceof Refused)) throw error;
  console.error(error.message);
  process.exitCode = 1;
} finally {
  link.close();
}
