/** The prompt box: starts a video, and changes its prompt while it runs. */

import { counted, exactTime } from "./words.js";

const MODES = {
  soft: "The picture goes on and turns into the new prompt.",
  recache: "As soft, but nothing of the old prompt is remembered.",
  hard: "A clean cut: the new prompt begins from nothing.",
};

/** @typedef {{prompt: string, mode: string, chunks: number, sentBy: string}} Change */

const byId = (/** @type {string} */ id) => document.getElementById(id);

export class PromptForm {
  #box = byId("prompt");
  #send = byId("send");
  #change = byId("change");
  #transition = byId("transition");
  #examples = byId("examples");
  #chunkSeconds = 0;
  #running = false;
  #byEnter = false;

  /** @param {{onStart(prompt: string): void, onChange(change: Change): void, onInput(): void}} listeners */
  constructor(listeners) {
    const form = byId("form");
    this.#box.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#byEnter = true;
      form.requestSubmit(this.#send.disabled ? null : this.#send);
      this.#byEnter = false;
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit(listeners);
    });
    form.addEventListener("input", () => {
      this.#describe();
      listeners.onInput();
    });
    this.#describe();
  }

  #submit(listeners) {
    const prompt = this.text;
    if (this.#send.disabled) return;
    if (!prompt) {
      this.#box.focus();
      return;
    }
    const sentBy = this.#byEnter ? "pressed Enter" : "pressed the button";
    if (this.#running) listeners.onChange({ prompt, mode: this.mode, chunks: this.chunks, sentBy });
    else listeners.onStart(prompt);
  }

  /** What is in the box. */
  get text() {
    return this.#box.value.trim();
  }

  set text(/** @type {string} */ text) {
    this.#box.value = text;
  }

  /** "soft", "recache" or "hard". */
  get mode() {
    return this.#change.querySelector("input[name=mode]:checked").value;
  }

  /** Chunks over which a soft change goes. */
  get chunks() {
    return this.mode === "soft" ? Number(this.#transition.value) : 1;
  }

  #describe() {
    byId("mode-text").textContent = MODES[this.mode];
    byId("transition-row").classList.toggle("absent", this.mode !== "soft");
    this.#transition.disabled = this.mode !== "soft";
    const chunks = Number(this.#transition.value);
    const time = this.#chunkSeconds ? `, ${exactTime(chunks * this.#chunkSeconds)}` : "";
    byId("transition-text").textContent = counted(chunks, "chunk") + time;
  }

  /** Offer examples to click. */
  showExamples(/** @type {string[]} */ examples) {
    this.#examples.hidden = examples.length === 0;
    byId("example-list").replaceChildren(
      ...examples.map((text) => {
        const item = document.createElement("li");
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = text;
        button.addEventListener("click", () => {
          this.text = text;
          this.#box.dispatchEvent(new Event("input", { bubbles: true }));
          this.#box.focus();
        });
        item.append(button);
        return item;
      }),
    );
  }

  /** Be the form of that phase. */
  setPhase(/** @type {"idle" | "starting" | "running" | "ended"} */ phase) {
    this.#running = phase === "running";
    this.#send.disabled = phase === "starting";
    this.#send.textContent = this.#running ? "Change" : "Start";
    this.#change.hidden = !this.#running;
    this.#examples.open = phase === "idle";
    byId("prompt-label").textContent = phase === "idle" ? "What would you like to see?" : "Prompt";
  }

  /** Seconds of one chunk, in which the length of a transition is told. */
  setChunkSeconds(/** @type {number} */ seconds) {
    this.#chunkSeconds = seconds;
    this.#describe();
  }
}
