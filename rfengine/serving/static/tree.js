/** The branches of the video as a tree: a line for each, which leaves its parent at a kept point. */

import { makeTabStop, moveWithArrows } from "./roving.js";
import { branchName, counted } from "./words.js";

/** @typedef {import("./state.js").State} State */
/** @typedef {import("./state.js").Branch} Branch */

const ROW = 46; // pixels, as the row's height in style.css
const LINE = 33; // of them, from the top of a row to its line
const EDGE = 10; // pixels beside the lines
const BEND = 10;
const MOST_BRANCHES = 60; // that are drawn: the newest, and those they come from
const SVG = "http://www.w3.org/2000/svg";

export class Tree {
  #panel;
  #onChoose;
  #list = document.createElement("ol");
  #lines = document.createElementNS(SVG, "svg");
  #rows = new Map();
  #paths = new Map();
  #points = new Map();
  #state = null;
  #present = null;

  /** onChoose(snapshotId): somebody wants to go on from that point. */
  constructor(/** @type {HTMLElement} */ panel, /** @type {(snapshotId: number) => void} */ onChoose) {
    this.#panel = panel;
    this.#onChoose = onChoose;
    this.#lines.setAttribute("aria-hidden", "true");
    panel.append(this.#lines, this.#list);
    moveWithArrows(panel);
    new ResizeObserver(() => this.#state && this.show(this.#state)).observe(panel);
  }

  /** Draw the branches and the kept points as they are now. */
  show(/** @type {State} */ state) {
    this.#state = state;
    const branches = drawn(state);
    const longest = Math.max(1, ...branches.map((branch) => branch.tip));
    const width = this.#list.clientWidth - 2 * EDGE;
    const x = (/** @type {number} */ index) => EDGE + (index / longest) * Math.max(0, width);
    const places = new Map(branches.map((branch, row) => [branch.id, row]));
    this.#lines.setAttribute("height", String(branches.length * ROW));
    keepOnly(this.#rows, places);
    keepOnly(this.#paths, places);
    keepOnly(this.#points, state.points);
    for (const [branch, row] of branches.map((branch, row) => [branch, row])) {
      this.#showRow(state, branch, row);
      this.#showPath(state, branch, places, x);
    }
    this.#showPoints(state, x);
    if (this.#present === state.branch) return;
    this.#present = state.branch;
    const row = this.#rows.get(state.branch);
    if (row) this.#panel.scrollTop = row.offsetTop + row.offsetHeight - this.#panel.clientHeight;
  }

  #showRow(/** @type {State} */ state, /** @type {Branch} */ branch, /** @type {number} */ place) {
    let row = this.#rows.get(branch.id);
    if (!row) {
      row = document.createElement("li");
      row.dataset.branch = String(branch.id);
      row.append(document.createElement("p"));
      for (const kind of ["name", "count", "prompt"]) {
        const part = document.createElement("span");
        part.className = `branch-${kind}`;
        row.firstElementChild.append(part, " ");
      }
      this.#rows.set(branch.id, row);
    }
    const [name, count, prompt] = row.firstElementChild.children;
    name.textContent = branchName(branch.id);
    count.textContent = counted(branch.tip - branch.fork, "chunk");
    prompt.textContent = branch.prompt;
    row.title = branch.prompt;
    if (branch.id === state.branch) row.setAttribute("aria-current", "true");
    else row.removeAttribute("aria-current");
    if (this.#list.children[place] !== row) this.#list.insertBefore(row, this.#list.children[place] ?? null);
  }

  #showPath(/** @type {State} */ state, /** @type {Branch} */ branch, places, x) {
    let path = this.#paths.get(branch.id);
    if (!path) {
      path = document.createElementNS(SVG, "path");
      this.#lines.append(path);
      this.#paths.set(branch.id, path);
    }
    const y = places.get(branch.id) * ROW + LINE;
    const from = x(branch.fork);
    const to = Math.max(from + 2, x(branch.tip));
    const above = places.get(branch.parent);
    const bend = Math.min(BEND, to - from);
    const start = above === undefined
      ? `M${from} ${y}`
      : `M${from} ${above * ROW + LINE}V${y - bend}Q${from} ${y} ${from + bend} ${y}`;
    path.setAttribute("d", `${start}H${to}`);
    path.classList.toggle("present", branch.id === state.branch);
  }

  #showPoints(/** @type {State} */ state, x) {
    for (const point of state.points.values()) {
      const row = this.#rows.get(point.branch);
      if (!row) {
        this.#points.get(point.id)?.remove();
        continue;
      }
      let button = this.#points.get(point.id);
      if (!button) {
        button = document.createElement("button");
        button.type = "button";
        button.tabIndex = -1;
        button.className = point.automatic ? "point" : "point chosen";
        button.dataset.snapshot = String(point.id);
        button.title = `Go on from the kept point before chunk ${point.index} of ${branchName(point.branch).toLowerCase()}`;
        button.setAttribute("aria-label", button.title);
        button.addEventListener("click", () => this.#onChoose(point.id));
        this.#points.set(point.id, button);
      }
      if (button.parentElement !== row) row.append(button);
      button.style.left = `${x(point.index)}px`;
      button.disabled = state.phase !== "running" || state.moving !== null;
    }
    const first = this.#panel.querySelector("button");
    if (first && !this.#panel.querySelector("button[tabindex='0']")) makeTabStop(this.#panel, first);
  }
}

/** The newest branches and all that they come from, parents before children. */
function drawn(/** @type {State} */ state) {
  const chosen = new Set();
  for (const id of [...[...state.branches.keys()].slice(-MOST_BRANCHES), state.branch]) {
    for (let at = id; at !== null && state.branches.has(at) && !chosen.has(at); at = state.branches.get(at).parent) {
      chosen.add(at);
    }
  }
  return [...state.branches.values()].filter((branch) => chosen.has(branch.id));
}

/** Remove the elements whose key is no longer there. */
function keepOnly(/** @type {Map<number, Element>} */ elements, /** @type {Map<number, unknown>} */ keys) {
  for (const [key, element] of elements) {
    if (keys.has(key)) continue;
    element.remove();
    elements.delete(key);
  }
}
