/** The WebSocket of one session. */

const PATH = "/v1/realtime/video";
const CONFIG_PATH = "/v1/page/config";
const PING_MS = 10_000;

/** @typedef {"lost" | "away" | "unauthorized" | "refused"} CloseReason  lost: after it was open */

/**
 * @typedef {object} Listeners
 * @property {(message: object) => void} onMessage  every message but those that announce a chunk
 * @property {(metadata: object, bytes: ArrayBuffer) => void} onChunk
 * @property {(reason: CloseReason) => void} onClosed  without a call of close()
 */

export class Connection {
  #socket;
  #opened = false;
  #pinged = 0;
  #events = 0;
  #metadata = null;
  #timer;

  /** Connect, and send `start` as the first message. */
  constructor(/** @type {object} */ start, /** @type {Listeners} */ listeners) {
    const url = new URL(PATH, location.href);
    url.protocol = url.protocol.replace("http", "ws");
    this.#socket = new WebSocket(url, ["rfengine"]);
    this.#socket.binaryType = "arraybuffer";
    this.#socket.onopen = () => {
      this.#opened = true;
      this.send(start);
      this.#pinged = performance.now();
    };
    this.#socket.onmessage = ({ data }) => this.#take(data, listeners);
    this.#socket.onclose = async () => {
      clearInterval(this.#timer);
      listeners.onClosed(this.#opened ? "lost" : await refusal());
    };
    this.#timer = setInterval(() => this.#ping(), PING_MS / 4);
  }

  #take(/** @type {string | ArrayBuffer} */ data, /** @type {Listeners} */ listeners) {
    this.#ping(); // timers of a page in the background run late, messages do not
    if (typeof data !== "string") {
      const metadata = this.#metadata;
      this.#metadata = null;
      if (metadata) listeners.onChunk(metadata, data);
      return;
    }
    const message = JSON.parse(data);
    if (message.type === "video.chunk_metadata") this.#metadata = message;
    else listeners.onMessage(message);
  }

  #ping() {
    const now = performance.now();
    if (now - this.#pinged < PING_MS) return;
    this.#pinged = now;
    this.send({ type: "session.ping" });
  }

  /** An id for a request, new in this session. */
  newEventId() {
    this.#events += 1;
    return `page-${this.#events}`;
  }

  /** Send a message; one that comes after the end goes nowhere. */
  send(/** @type {object} */ message) {
    if (this.#socket.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(message));
  }

  /** Leave; nothing is reported any more. */
  close() {
    clearInterval(this.#timer);
    this.#socket.onmessage = this.#socket.onclose = null;
    this.#socket.close();
  }
}

/** @returns {Promise<CloseReason>} why a WebSocket did not open: a browser says it of ordinary requests alone */
async function refusal() {
  try {
    const answer = await fetch(CONFIG_PATH);
    return answer.status === 401 ? "unauthorized" : "refused";
  } catch {
    return "away";
  }
}
