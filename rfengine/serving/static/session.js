/** One session after the other: what people do, what the server answers, and the state in which both meet. */

import { Connection } from "./connection.js";
import { canPlay } from "./player.js";
import { addChunk, addPoint, chunkOf, move, nearestPoint, reset } from "./state.js";
import { closeWords, endWords, faultWords, NO_VIDEO_SUPPORT } from "./words.js";

/** @typedef {import("./state.js").State} State */
/** @typedef {import("./state.js").Chunk} Chunk */
/** @typedef {import("./player.js").Player} Player */

const START = { type: "session.start", pace: "realtime", lead_seconds: 1.0, slow_client: "pause", record: true };
const SEEDS = 2 ** 31;
const CALM_ENDS = new Set(["finished", "stopped"]); // nothing went wrong

const newSeed = () => Math.floor(Math.random() * SEEDS);

/**
 * @typedef {object} Listeners
 * @property {() => void} onChange  the state is another one
 * @property {() => void} onBegin  a session begins, with nothing from the one before
 * @property {(chunk: Chunk, metadata: object) => void} onChunk
 * @property {() => void} onPoints  the kept points or the branches are others
 */

export class Session {
  #state;
  #player;
  #listeners;
  #connection = null;
  #resuming = null;

  /** @param {State} state @param {Player} player @param {Listeners} listeners */
  constructor(state, player, listeners) {
    this.#state = state;
    this.#player = player;
    this.#listeners = listeners;
  }

  // What people do

  /** Begin a video. */
  start(/** @type {string} */ prompt) {
    this.#connection?.close();
    this.#player.close();
    reset(this.#state, prompt);
    this.#resuming = null;
    this.#connection = new Connection(
      { ...START, prompt, seed: newSeed() },
      {
        onMessage: (message) => this.#receive(message),
        onChunk: (metadata, bytes) => this.#receiveChunk(metadata, bytes),
        onClosed: (reason) => this.#lose(reason),
      },
    );
    this.#listeners.onBegin();
    this.#listeners.onChange();
  }

  /** Change the prompt. */
  change(/** @type {import("./prompt_form.js").Change} */ { prompt, mode, chunks, sentBy }) {
    if (this.#state.phase !== "running") return;
    const eventId = this.#connection.newEventId();
    const interaction = { event_id: eventId, event: { prompt }, mode };
    if (mode === "soft") interaction.transition_chunks = chunks;
    this.#connection.send({ type: "session.interaction", interaction });
    this.#expectPrompt(eventId, prompt, sentBy);
    this.#listeners.onChange();
  }

  #expectPrompt(/** @type {string} */ eventId, /** @type {string} */ prompt, /** @type {string} */ sentBy) {
    const sentAt = performance.now();
    const receipt = { eventId, sentAt, sentBy, stage: "sent", index: null, start: null, seconds: null };
    Object.assign(this.#state, { prompt, receipt, kept: null });
  }

  /** Stand still, or go on. */
  togglePlay() {
    if (this.#state.view === "live") this.pause();
    else this.play();
  }

  /** Stand still. */
  pause() {
    const state = this.#state;
    if (state.view === "live") {
      if (!this.#player.hasEnded) state.resumeAt ??= this.#player.time;
      if (state.phase === "running") this.#connection.send({ type: "session.pause" });
    }
    state.view = "paused";
    state.looking = null;
    this.#player.hold();
    this.#listeners.onChange();
  }

  /** Go on where it stood before the pause. */
  play() {
    const state = this.#state;
    if (state.phase === "running" && state.view !== "live") {
      this.#resume();
      this.#restartReceipt();
    }
    state.view = "live";
    state.looking = null;
    const from = state.resumeAt;
    if (!state.moved) state.resumeAt = null;
    this.#player.play(from);
    this.#listeners.onChange();
  }

  /** A prompt that was sent in a pause is waited for from now on. */
  #restartReceipt() {
    const { receipt } = this.#state;
    if (receipt && receipt.stage !== "shown") Object.assign(receipt, { sentAt: performance.now(), sentBy: "went on" });
  }

  #resume() {
    this.#resuming = this.#connection.newEventId();
    this.#connection.send({ type: "session.resume", event_id: this.#resuming });
  }

  /** Look at a chunk that was shown, while nothing is made. */
  look(/** @type {number} */ number) {
    const state = this.#state;
    const chunk = chunkOf(state, number);
    if (!chunk || state.moving) return;
    if (state.view === "live") this.pause();
    state.view = "looking";
    state.looking = number;
    this.#player.hold(chunk.start + 0.5 / state.config.fps);
    this.#listeners.onChange();
  }

  /** Go on from the last kept point before the chunk that is looked at. */
  goOnFromHere() {
    const chunk = chunkOf(this.#state, this.#state.looking);
    const point = chunk && nearestPoint(this.#state, chunk);
    if (point) this.goTo(point.id);
  }

  /** Go on from a kept point. */
  goTo(/** @type {number} */ snapshotId) {
    this.#move({ type: "session.seek", snapshot_id: snapshotId });
  }

  /**
   * Begin a branch at the last kept point before the chunk that is looked at. Without another prompt it has
   * another seed: with the same one it would be the same video again.
   */
  branchFromHere(/** @type {string} */ prompt, /** @type {string} */ mode) {
    const chunk = chunkOf(this.#state, this.#state.looking);
    const point = chunk && nearestPoint(this.#state, chunk);
    if (!point) return;
    const other = prompt && prompt !== point.prompt;
    const change = other ? { prompt, mode } : { seed: newSeed() };
    const eventId = this.#move({ type: "session.branch", snapshot_id: point.id, ...change });
    if (eventId && other) this.#expectPrompt(eventId, prompt, "pressed the button");
    this.#listeners.onChange();
  }

  #move(/** @type {object} */ message) {
    const state = this.#state;
    if (state.phase !== "running" || state.moving) return null;
    state.moving = this.#connection.newEventId();
    this.#connection.send({ ...message, event_id: state.moving });
    this.#listeners.onChange();
    return state.moving;
  }

  /** Keep the present moment. */
  keep() {
    if (this.#state.phase === "running") this.#connection.send({ type: "session.snapshot" });
  }

  /** End the video. */
  stop() {
    if (this.#state.phase === "starting") this.#finish(endWords("stopped"), true);
    else if (this.#state.phase === "running") this.#connection.send({ type: "session.stop" });
  }

  /** End it since this browser cannot go on. */
  fail(/** @type {string} */ text) {
    if (this.#state.phase === "ended" || this.#state.phase === "idle") return;
    this.#connection.send({ type: "session.stop" });
    this.#finish(text);
  }

  // What the server answers

  #receive(/** @type {object} */ message) {
    const state = this.#state;
    const { receipt } = state;
    switch (message.type) {
      case "video.start":
        this.#begin(message);
        return;
      case "session.interaction.queued":
        if (receipt?.eventId === message.event_id && receipt.stage === "sent") receipt.stage = "queued";
        break;
      case "session.interaction.applied":
        if (receipt?.eventId === message.event_id) {
          Object.assign(receipt, { stage: "applied", index: message.chunk_index });
        }
        break;
      case "session.snapshot.kept":
        addPoint(state, message);
        if (!message.automatic) this.#noteKept(message.chunk_index);
        this.#listeners.onPoints();
        break;
      case "session.snapshot.dropped":
        state.points.delete(message.snapshot_id);
        this.#listeners.onPoints();
        break;
      case "session.moved":
        this.#arrive(message);
        break;
      case "session.done":
        this.#finish(endWords(message.reason), CALM_ENDS.has(message.reason));
        return;
      case "error":
        this.#receiveError(message);
        break;
    }
    this.#listeners.onChange();
  }

  #noteKept(/** @type {number} */ index) {
    this.#state.kept = index;
    if (this.#state.receipt?.stage === "shown") this.#state.receipt = null;
  }

  #begin(/** @type {object} */ message) {
    Object.assign(this.#state, { config: message.config, downloadUrl: message.download_url, phase: "running" });
    if (canPlay(message.mime)) this.#player.open(message.mime);
    else this.fail(NO_VIDEO_SUPPORT);
    this.#listeners.onChange();
  }

  #receiveChunk(/** @type {object} */ metadata, /** @type {ArrayBuffer} */ bytes) {
    const state = this.#state;
    if (state.phase !== "running") return;
    const chunk = addChunk(state, metadata);
    this.#player.append(bytes);
    if (state.moved) {
      state.moved = false;
      state.resumeAt = chunk.start;
      if (state.view === "live") this.play();
    }
    this.#listeners.onChunk(chunk, metadata);
    this.#listeners.onChange();
  }

  #arrive(/** @type {object} */ message) {
    const state = this.#state;
    move(state, message);
    if (state.moving !== message.event_id) return;
    state.moving = null;
    if (state.view !== "live") this.#resume();
    state.view = "live";
    state.looking = null;
    state.prompt = message.prompt;
    this.#listeners.onPoints();
  }

  #receiveError(/** @type {object} */ message) {
    const state = this.#state;
    const text = faultWords(message.code, message.message);
    if (message.fatal) {
      this.#finish(text);
      return;
    }
    if (message.code === "illegal_transition") return; // asked twice for what is so already
    if (message.event_id === state.moving) state.moving = null;
    if (message.event_id === state.receipt?.eventId) state.receipt = null;
    if (message.event_id === this.#resuming) {
      state.view = "paused";
      this.#player.hold();
    }
    state.notice = { text, again: false, calm: false };
  }

  #lose(/** @type {import("./connection.js").CloseReason} */ reason) {
    if (this.#state.phase === "starting" || this.#state.phase === "running") this.#finish(closeWords(reason));
  }

  #finish(/** @type {string} */ text, calm = false) {
    const state = this.#state;
    this.#connection.close();
    this.#player.complete();
    state.phase = state.chunks.length ? "ended" : "idle";
    state.moving = state.receipt = null;
    state.notice = { text, again: true, calm };
    this.#listeners.onPoints();
    this.#listeners.onChange();
  }
}
