/** The timeline: a picture for each chunk, in groups under the prompt that made them. */

import { makeTabStop, moveWithArrows } from "./roving.js";
import { pointAt } from "./state.js";
import { branchName, clock } from "./words.js";

/** @typedef {import("./state.js").State} State */
/** @typedef {import("./state.js").Chunk} Chunk */

export class Timeline {
  #strip;
  #onLook;
  #cells = new Map();
  #last = null;
  #following = true;
  #marked = { playing: null, looking: null };

  /** onLook(number): somebody wants to look at that chunk. */
  constructor(/** @type {HTMLElement} */ strip, /** @type {(number: number) => void} */ onLook) {
    this.#strip = strip;
    this.#onLook = onLook;
    moveWithArrows(strip);
    strip.addEventListener("scroll", () => {
      this.#following = strip.scrollWidth - strip.scrollLeft - strip.clientWidth < strip.clientHeight;
    });
  }

  /** Show none. */
  clear() {
    this.#strip.replaceChildren();
    this.#cells.clear();
    this.#last = null;
    this.#following = true;
    this.#marked = { playing: null, looking: null };
  }

  /** Add the newest chunk. */
  add(/** @type {State} */ state, /** @type {Chunk} */ chunk) {
    const last = this.#last;
    if (!last || last.branch !== chunk.branch || last.prompt !== chunk.prompt || chunk.changed) {
      this.#strip.append(newRun(chunk, last !== null && last.branch !== chunk.branch));
    }
    this.#last = chunk;
    const cell = newCell(chunk);
    cell.addEventListener("click", () => this.#onLook(chunk.number));
    this.#strip.lastElementChild.querySelector(".cells").append(cell);
    this.#cells.set(chunk.number, cell);
    if (this.#cells.size === 1) makeTabStop(this.#strip, cell);
    this.#removeUntil(state.chunks[0].number);
    this.#describe(state, chunk);
    this.#follow();
  }

  #removeUntil(/** @type {number} */ first) {
    for (const [number, cell] of this.#cells) {
      if (number >= first) return;
      const run = cell.closest(".run");
      const held = cell.tabIndex === 0;
      cell.remove();
      this.#cells.delete(number);
      if (!run.querySelector("button")) run.remove();
      if (held) makeTabStop(this.#strip, this.#strip.querySelector("button"));
    }
  }

  #follow() {
    const busy = this.#strip.contains(document.activeElement) || this.#strip.matches(":hover");
    if (this.#following && !busy) this.toEnd();
  }

  /** Scroll to the newest chunk, and to every newer one. */
  toEnd() {
    this.#following = true;
    this.#strip.scrollLeft = this.#strip.scrollWidth;
  }

  /** Show the picture of a chunk; none where it was dropped. */
  showPicture(/** @type {number} */ number, /** @type {string | null} */ url) {
    const cell = this.#cells.get(number);
    if (!cell) return;
    cell.classList.toggle("narrow", url === null && !cell.classList.contains("kept"));
    cell.querySelector("img")?.remove();
    if (url === null) return;
    const picture = new Image();
    picture.alt = "";
    picture.src = url;
    cell.prepend(picture);
  }

  /** Mark the kept points anew. */
  markPoints(/** @type {State} */ state) {
    for (const chunk of state.chunks) this.#describe(state, chunk);
  }

  #describe(/** @type {State} */ state, /** @type {Chunk} */ chunk) {
    const cell = this.#cells.get(chunk.number);
    const point = pointAt(state, chunk);
    const kind = point === null ? "" : point.automatic ? "automatic" : "chosen";
    if (!cell || (cell.dataset.point === kind && cell.title)) return;
    cell.dataset.point = kind;
    cell.classList.toggle("kept", point !== null);
    const parts = [`Chunk ${chunk.index}`, branchName(chunk.branch).toLowerCase(), clock(chunk.start)];
    if (chunk.changed) parts.push("new prompt");
    if (point) parts.push("kept point before it");
    cell.title = parts.join(", ");
    cell.setAttribute("aria-label", `${cell.title}: ${chunk.prompt}`);
  }

  /** Mark the chunk on the screen and the one that is looked at. */
  markPlaying(/** @type {State} */ state) {
    const looking = state.view === "looking" ? state.looking : null;
    for (const [kind, number, attribute] of [
      ["playing", state.playing, "aria-current"],
      ["looking", looking, "aria-pressed"],
    ]) {
      if (this.#marked[kind] === number) continue;
      this.#cells.get(this.#marked[kind])?.removeAttribute(attribute);
      this.#cells.get(number)?.setAttribute(attribute, "true");
      this.#marked[kind] = number;
    }
    const cell = this.#cells.get(looking ?? state.playing);
    if (cell && !this.#strip.contains(document.activeElement)) makeTabStop(this.#strip, cell);
  }
}

/** A group of chunks under their prompt. */
function newRun(/** @type {Chunk} */ chunk, /** @type {boolean} */ moved) {
  const run = document.createElement("div");
  run.className = "run";
  run.dataset.branch = String(chunk.branch);
  const label = document.createElement("p");
  label.className = "run-label";
  label.title = chunk.prompt;
  const words = document.createElement("span");
  if (moved) {
    const branch = document.createElement("b");
    branch.textContent = `${branchName(chunk.branch)} `;
    words.append(branch);
  }
  words.append(chunk.prompt);
  label.append(words);
  const cells = document.createElement("div");
  cells.className = "cells";
  run.append(label, cells);
  return run;
}

function newCell(/** @type {Chunk} */ chunk) {
  const cell = document.createElement("button");
  cell.type = "button";
  cell.tabIndex = -1;
  cell.className = chunk.changed ? "cell changed" : "cell";
  cell.dataset.number = String(chunk.number);
  const index = document.createElement("span");
  index.className = "cell-index";
  index.textContent = chunk.changed ? `${chunk.index} new` : String(chunk.index);
  cell.append(index);
  return cell;
}
