/** Small pictures of the chunks, as blobs in memory. */

const MOST = 300;
const MOST_SIDE = 160; // pixels

export class Thumbnails {
  #video;
  #canvas = document.createElement("canvas");
  #urls = new Map();
  #pending = new Set();
  #generation = 0;
  #onDropped;

  /** onDropped(number): the picture of that chunk gave its place to newer ones. */
  constructor(/** @type {HTMLVideoElement} */ video, /** @type {(number: number) => void} */ onDropped) {
    this.#video = video;
    this.#onDropped = onDropped;
  }

  /** Keep what is on the screen as the picture of a chunk, and hand over its address. */
  take(/** @type {number} */ number, /** @type {(url: string) => void} */ onTaken) {
    const { videoWidth, videoHeight } = this.#video;
    if (!videoWidth || this.#urls.has(number) || this.#pending.has(number)) return;
    const scale = Math.min(1, MOST_SIDE / Math.max(videoWidth, videoHeight));
    this.#canvas.width = Math.round(videoWidth * scale);
    this.#canvas.height = Math.round(videoHeight * scale);
    this.#canvas.getContext("2d").drawImage(this.#video, 0, 0, this.#canvas.width, this.#canvas.height);
    const generation = this.#generation;
    this.#pending.add(number);
    this.#canvas.toBlob((blob) => {
      if (generation !== this.#generation) return;
      this.#pending.delete(number);
      if (!blob) return;
      const url = URL.createObjectURL(blob);
      this.#urls.set(number, url);
      this.#dropOldest();
      onTaken(url);
    }, "image/webp", 0.85);
  }

  #dropOldest() {
    if (this.#urls.size <= MOST) return;
    const number = Math.min(...this.#urls.keys());
    URL.revokeObjectURL(this.#urls.get(number));
    this.#urls.delete(number);
    this.#onDropped(number);
  }

  /** Drop all of them. */
  clear() {
    this.#generation += 1;
    this.#pending.clear();
    for (const url of this.#urls.values()) URL.revokeObjectURL(url);
    this.#urls.clear();
  }
}
