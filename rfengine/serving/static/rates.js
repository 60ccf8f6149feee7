/** How fast frames are made, arrive and are shown, over the last seconds. */

const CHUNKS = 8; // of which the rates are the mean
const STALE_MS = 3000; // after which a rate is of the past
const FRAMES_MS = 2000;

export class Rates {
  #chunks = [];
  #frames = [];

  /** Forget what was measured. */
  clear() {
    this.#chunks = [];
    this.#frames = [];
  }

  /** A chunk has arrived. */
  addChunk(/** @type {object} */ metadata, /** @type {number} */ now) {
    const madeMs = metadata.denoise_ms + metadata.decode_ms;
    this.#chunks.push({ frames: metadata.num_frames, madeMs, now });
    if (this.#chunks.length > CHUNKS) this.#chunks.shift();
  }

  /** So many frames of the stream were on the screen until now. */
  addFrame(/** @type {number} */ count, /** @type {number} */ now) {
    if (Number.isNaN(count)) return;
    this.#frames.push({ count, now });
    while (this.#frames[0].now < now - FRAMES_MS) this.#frames.shift();
  }

  /** @returns {{made: number | null, arriving: number | null, shown: number | null}} frames a second */
  read(/** @type {number} */ now) {
    const fresh = this.#chunks.length > 0 && now - this.#chunks.at(-1).now < STALE_MS;
    return { made: this.#made(), arriving: fresh ? this.#arriving() : null, shown: this.#shown(now) };
  }

  #made() {
    const milliseconds = sum(this.#chunks, (chunk) => chunk.madeMs);
    return milliseconds > 0 ? (sum(this.#chunks, (chunk) => chunk.frames) * 1000) / milliseconds : null;
  }

  #arriving() {
    const [first, ...rest] = this.#chunks;
    const milliseconds = this.#chunks.at(-1).now - first.now;
    return milliseconds > 0 ? (sum(rest, (chunk) => chunk.frames) * 1000) / milliseconds : null;
  }

  #shown(/** @type {number} */ now) {
    const frames = this.#frames;
    if (frames.length < 2 || now - frames.at(-1).now > FRAMES_MS / 2) return null;
    const milliseconds = frames.at(-1).now - frames[0].now;
    const count = frames.at(-1).count - frames[0].count;
    return milliseconds > 0 && count >= 0 ? (count * 1000) / milliseconds : null;
  }
}

function sum(/** @type {object[]} */ items, /** @type {(item: object) => number} */ value) {
  return items.reduce((total, item) => total + value(item), 0);
}
