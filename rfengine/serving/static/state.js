/** All that the page knows, in one plain object, and what the server's messages change in it. */

export const MOST_CHUNKS = 800; // that the timeline shows: about ten minutes of the tiny model

/**
 * @typedef {object} Chunk  One chunk that has arrived.
 * @property {number} number  counts the chunks of the session
 * @property {number} index  counts the chunks of the video; goes back with a move
 * @property {number} branch
 * @property {number} start  seconds in the player
 * @property {number} seconds  how long it lasts
 * @property {string} prompt
 * @property {boolean} changed  whether a new prompt shows here first
 */

/**
 * @typedef {object} Point  A moment to which the video can go back.
 * @property {number} id
 * @property {number} index  of the chunk that follows it
 * @property {number} branch
 * @property {string} prompt
 * @property {boolean} automatic
 */

/**
 * @typedef {object} Branch
 * @property {number} id
 * @property {number | null} parent
 * @property {number} fork  index of its first chunk
 * @property {number} tip  index after its last chunk
 * @property {string} prompt  its first one
 */

/**
 * @typedef {object} Receipt  What became of one prompt change.
 * @property {string} eventId
 * @property {number} sentAt  milliseconds of performance.now()
 * @property {string} sentBy  "pressed Enter", "pressed the button" or "went on"
 * @property {"sent" | "queued" | "applied" | "shown"} stage
 * @property {number | null} index  of the first chunk with the prompt
 * @property {number | null} start  of that chunk, in seconds in the player
 * @property {number | null} seconds  from sending to the first frame on the screen
 */

/**
 * @typedef {object} State
 * @property {"idle" | "starting" | "running" | "ended"} phase
 * @property {"live" | "paused" | "looking"} view
 * @property {object | null} config  of the session, as video.start has it
 * @property {string | null} downloadUrl
 * @property {string} prompt  the last one that was sent
 * @property {Chunk[]} chunks  the newest ones, in the order of arrival
 * @property {Map<number, Point>} points
 * @property {Map<number, Branch>} branches
 * @property {number} branch  the present one
 * @property {number | null} playing  number of the chunk on the screen
 * @property {number | null} looking  number of the chunk that is looked at
 * @property {number | null} resumeAt  seconds in the player where it goes on after a pause or a move
 * @property {string | null} moving  event id of a move that the server has not answered
 * @property {boolean} moved  whether the next chunk is the first one after a move
 * @property {Receipt | null} receipt
 * @property {number | null} kept  index of the chunk that follows the last moment somebody kept
 * @property {number | null} promptSeconds  that the last prompt took to show
 * @property {{text: string, again: boolean, calm: boolean} | null} notice  again: starting again is offered
 */

/** @returns {State} before the first video */
export function newState() {
  return {
    phase: "idle",
    view: "live",
    config: null,
    downloadUrl: null,
    prompt: "",
    chunks: [],
    points: new Map(),
    branches: new Map(),
    branch: 0,
    playing: null,
    looking: null,
    resumeAt: null,
    moving: null,
    moved: false,
    receipt: null,
    kept: null,
    promptSeconds: null,
    notice: null,
  };
}

/** Begin with nothing but the prompt. */
export function reset(/** @type {State} */ state, /** @type {string} */ prompt) {
  Object.assign(state, newState(), { phase: "starting", prompt });
  state.branches.set(0, { id: 0, parent: null, fork: 0, tip: 0, prompt });
}

/** @returns {Chunk} what video.chunk_metadata says, added to the state */
export function addChunk(/** @type {State} */ state, /** @type {object} */ metadata) {
  const chunk = {
    number: metadata.transport_chunk_index,
    index: metadata.generation_chunk_index,
    branch: metadata.branch_id,
    start: metadata.start_seconds,
    seconds: metadata.num_frames / state.config.fps,
    prompt: metadata.prompt,
    changed: metadata.started_event_ids.length > 0,
  };
  state.chunks.push(chunk);
  if (state.chunks.length > MOST_CHUNKS) state.chunks.shift();
  const branch = state.branches.get(chunk.branch);
  if (branch) {
    if (chunk.index === branch.fork) branch.prompt = chunk.prompt;
    branch.tip = Math.max(branch.tip, chunk.index + 1);
  }
  const receipt = state.receipt;
  if (receipt && metadata.started_event_ids.includes(receipt.eventId)) {
    Object.assign(receipt, { stage: "applied", index: chunk.index, start: chunk.start });
  }
  return chunk;
}

/** The server kept a point. */
export function addPoint(/** @type {State} */ state, /** @type {object} */ message) {
  state.points.set(message.snapshot_id, {
    id: message.snapshot_id,
    index: message.chunk_index,
    branch: message.branch_id,
    prompt: message.prompt,
    automatic: message.automatic,
  });
}

/** The next chunk is made from another point, on a branch that may be new. */
export function move(/** @type {State} */ state, /** @type {object} */ message) {
  state.branch = message.branch_id;
  state.moved = true;
  if (!state.branches.has(message.branch_id)) {
    state.branches.set(message.branch_id, {
      id: message.branch_id,
      parent: message.parent_branch_id,
      fork: message.chunk_index,
      tip: message.chunk_index,
      prompt: message.prompt,
    });
  }
}

/** @returns {Chunk | undefined} the chunk of that number */
export function chunkOf(/** @type {State} */ state, /** @type {number | null} */ number) {
  return number === null ? undefined : state.chunks.find((chunk) => chunk.number === number);
}

/** @returns {Chunk | undefined} the chunk to which a time in the player belongs */
export function chunkAt(/** @type {State} */ state, /** @type {number} */ seconds) {
  let low = 0;
  let high = state.chunks.length; // those before low begin at or before it, those from high on after it
  while (low < high) {
    const middle = (low + high) >> 1;
    if (state.chunks[middle].start <= seconds + 1e-3) low = middle + 1;
    else high = middle;
  }
  return state.chunks[low - 1];
}

/** @returns {Point | null} the last kept point at or before a chunk, on its branch or those it comes from */
export function nearestPoint(/** @type {State} */ state, /** @type {Chunk} */ chunk) {
  let branch = state.branches.get(chunk.branch);
  let limit = chunk.index;
  while (branch) {
    const line = branch.id;
    const before = [...state.points.values()].filter((point) => point.branch === line && point.index <= limit);
    if (before.length) return before.reduce((best, point) => (point.index >= best.index ? point : best));
    limit = Math.min(limit, branch.fork);
    branch = branch.parent === null ? undefined : state.branches.get(branch.parent);
  }
  return null;
}

/** @returns {Point | null} the point kept just before a chunk */
export function pointAt(/** @type {State} */ state, /** @type {Chunk} */ chunk) {
  let found = null;
  for (const point of state.points.values()) {
    if (point.branch !== chunk.branch || point.index !== chunk.index) continue;
    if (found === null || !point.automatic) found = point;
  }
  return found;
}
