/** The page: puts its parts together, and shows the state. */

import { fitVideo, Player } from "./player.js";
import { PromptForm } from "./prompt_form.js";
import { Rates } from "./rates.js";
import { Session } from "./session.js";
import { chunkAt, chunkOf, nearestPoint, newState } from "./state.js";
import { Thumbnails } from "./thumbnails.js";
import { Timeline } from "./timeline.js";
import { Tree } from "./tree.js";
import { branchName, clock, counted, exactTime, frameRate, NOT_DECODED, shortTime } from "./words.js";

const TICK_MS = 250;
const WAITING_TICKS = 3; // before it is called waiting

const byId = (/** @type {string} */ id) => document.getElementById(id);

const state = newState();
const video = byId("video");
const rates = new Rates();
const player = new Player(video, { onFrame: showFrame, onFailure: () => session.fail(NOT_DECODED) });
const session = new Session(state, player, {
  onChange: schedule,
  onBegin: begin,
  onChunk: showChunk,
  onPoints: showPoints,
});
const timeline = new Timeline(byId("timeline"), look);
const tree = new Tree(byId("tree"), (id) => session.goTo(id));
const thumbnails = new Thumbnails(video, (number) => timeline.showPicture(number, null));
const form = new PromptForm({
  onStart: (prompt) => session.start(prompt),
  onChange: (change) => session.change(change),
  onInput: schedule,
});
let scheduled = false;
let waitingTicks = 0;
let shownPhase = "idle";
let shownView = "live";

// What happens

function begin() {
  thumbnails.clear();
  timeline.clear();
  rates.clear();
}

function showChunk(chunk, metadata) {
  rates.addChunk(metadata, performance.now());
  timeline.add(state, chunk);
  tree.show(state);
}

function showPoints() {
  timeline.markPoints(state);
  tree.show(state);
}

function showFrame(/** @type {number} */ time, /** @type {number} */ count, /** @type {number} */ now) {
  rates.addFrame(count, now);
  const chunk = chunkAt(state, time);
  if (!chunk) return;
  thumbnails.take(chunk.number, (url) => timeline.showPicture(chunk.number, url));
  const { receipt } = state;
  if (receipt?.stage === "applied" && receipt.start !== null && time >= receipt.start - 1e-3) {
    receipt.stage = "shown";
    receipt.seconds = state.promptSeconds = (now - receipt.sentAt) / 1000;
    schedule();
  }
  if (chunk.number !== state.playing) {
    state.playing = chunk.number;
    schedule();
  }
}

function look(/** @type {number} */ number) {
  if (state.view === "looking" && state.looking === number) byId("go-on").focus();
  else session.look(number);
}

function tick() {
  const now = performance.now();
  player.tick(now);
  waitingTicks = player.isWaiting ? waitingTicks + 1 : 0;
  showStatus();
  showRates(now);
}

// What is shown

function schedule() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    show();
  });
}

function show() {
  const { phase, view } = state;
  document.body.dataset.phase = phase;
  document.body.dataset.view = view;
  if (phase !== shownPhase) showPhase();
  if (view === "live" && shownView !== "live") timeline.toEnd();
  shownView = view;
  byId("play-text").textContent = view === "live" ? "Pause" : "Play";
  byId("keep").disabled = byId("stop").disabled = phase !== "running";
  byId("stage-text").textContent = state.playing === null && phase !== "idle" ? "The first frames are being made" : "";
  showStatus();
  showNotice();
  showLook();
  showReceipt();
  showDownloads();
  timeline.markPlaying(state);
}

function showPhase() {
  shownPhase = state.phase;
  form.setPhase(state.phase);
  if (!state.config) return;
  const { width, height, fps, chunk_frames: frames, seed } = state.config;
  document.documentElement.style.setProperty("--aspect", String(width / height));
  form.setChunkSeconds(frames / fps);
  byId("seed").textContent = String(seed);
  byId("timeline-text").textContent = `Each chunk is ${exactTime(frames / fps)}. Choose one to look back.`;
  showModel(state.config);
  fit();
  tree.show(state);
}

function showModel({ model, width, height, fps }) {
  byId("model").textContent = `${model}, ${width} × ${height}, ${fps} frames/s`;
}

function fit() {
  if (state.config) fitVideo(video, byId("stage"), state.config.width, state.config.height);
}

function statusWords() {
  if (state.phase === "idle") return ["Ready", "ready"];
  if (state.phase === "starting") return ["Starting", "waiting"];
  if (state.view === "looking") return ["Looking back", "paused"];
  if (state.phase === "ended") return ["Ended", "ready"];
  if (state.view === "paused") return ["Paused", "paused"];
  if (state.moving || state.moved) return ["Going there", "waiting"];
  if (isSlow()) return ["Live, slower than real time", "live"]; // it stops for every chunk: no news each time
  return waitingTicks >= WAITING_TICKS ? ["Waiting for frames", "waiting"] : ["Live", "live"];
}

/** Whether the model makes fewer frames than the video shows. */
function isSlow() {
  const { made } = rates.read(performance.now());
  return state.config !== null && made !== null && made < state.config.fps;
}

function showStatus() {
  const [words, kind] = statusWords();
  if (byId("status-text").textContent !== words) byId("status-text").textContent = words;
  byId("status").dataset.kind = kind;
}

function showNotice() {
  const { notice } = state;
  byId("notice").hidden = notice === null;
  if (notice === null) return;
  if (byId("notice-text").textContent !== notice.text) byId("notice-text").textContent = notice.text;
  byId("notice").classList.toggle("calm", notice.calm);
  byId("notice-action").hidden = !notice.again;
  byId("notice-action").textContent = state.phase === "idle" ? "Try again" : "Start again with the same prompt";
}

function showLook() {
  const chunk = state.view === "looking" ? chunkOf(state, state.looking) : undefined;
  const point = chunk ? nearestPoint(state, chunk) : null;
  const hidden = chunk === undefined;
  if (hidden && byId("look").contains(document.activeElement)) byId("play").focus();
  byId("look").hidden = hidden;
  if (hidden) return;
  const able = point !== null && state.phase === "running" && state.moving === null;
  byId("go-on").disabled = byId("branch").disabled = !able;
  byId("back").textContent = state.phase === "running" ? "Back to live" : "Back";
  byId("look-text").textContent = lookWords(chunk, point);
  const other = point && form.text && form.text !== point.prompt;
  byId("branch-text").textContent = !able ? "" : other
    ? "The branch starts with the prompt in the box."
    : "A branch takes another course, and the prompt in the box if it is another.";
}

function lookWords(chunk, point) {
  const place = `Chunk ${chunk.index} of ${branchName(chunk.branch).toLowerCase()}, at ${clock(chunk.start)}.`;
  const gone = player.has(chunk.start + 1e-3) ? "" : " It is too long ago to be shown again.";
  if (state.phase !== "running") return place + gone;
  if (point === null) return `${place}${gone} No moment was kept before it.`;
  const distance = point.branch === chunk.branch ? chunk.index - point.index : null;
  if (distance === 0) return `${place}${gone} It can go on from exactly here.`;
  const from = distance === null ? `before chunk ${point.index} of ${branchName(point.branch).toLowerCase()}` : `${counted(distance, "chunk")} earlier`;
  return `${place}${gone} The nearest kept point is ${from}.`;
}

function receiptWords() {
  const { receipt } = state;
  if (receipt === null) return state.kept === null ? "" : `Kept: the moment before chunk ${state.kept}.`;
  switch (receipt.stage) {
    case "sent":
      return "Sent.";
    case "queued":
      return state.view === "live"
        ? "Accepted: it comes with one of the next chunks."
        : "Accepted: it comes when the video goes on.";
    case "applied":
      return `Made from chunk ${receipt.index} on; it is shown in a moment.`;
    default:
      return `Shown from chunk ${receipt.index}, ${shortTime(receipt.seconds)} after you ${receipt.sentBy}.`;
  }
}

function showReceipt() {
  const words = receiptWords();
  if (byId("receipt").textContent !== words) byId("receipt").textContent = words;
}

function showDownloads() {
  const url = state.chunks.length ? state.downloadUrl : null;
  for (const [id, address] of [["download", url], ["download-branch", url && `${url}?branch=${state.branch}`]]) {
    if (address) byId(id).href = address;
    else byId(id).removeAttribute("href");
    byId(id).setAttribute("aria-disabled", String(!address));
  }
}

function showRates(/** @type {number} */ now) {
  const { made, arriving, shown } = rates.read(now);
  const running = state.phase === "running";
  byId("rate-made").textContent = frameRate(made);
  byId("rate-arriving").textContent = frameRate(running ? arriving : null);
  byId("rate-shown").textContent = frameRate(shown);
  byId("rate-ahead").textContent = player.live && state.playing !== null ? shortTime(player.ahead) : "–";
  byId("rate-prompt").textContent = state.promptSeconds === null ? "–" : shortTime(state.promptSeconds);
  byId("position").textContent = state.playing === null ? "" : clock(player.time);
}

// What people do

function shortcut(/** @type {KeyboardEvent} */ event) {
  if (event.key === "Escape" && state.view === "looking") session.play();
  if (event.target.closest("input, textarea, button, a, summary") || event.ctrlKey || event.metaKey || event.altKey) return;
  const action = { " ": () => session.togglePlay(), k: () => session.keep() }[event.key];
  if (!action || state.phase === "idle") return;
  event.preventDefault();
  action();
}

async function loadConfig() {
  try {
    const answer = await fetch("/v1/page/config");
    if (!answer.ok) return;
    const config = await answer.json();
    form.showExamples(config.examples ?? []);
    form.setChunkSeconds(config.chunk_frames / config.fps);
    showModel(config);
  } catch {
    // without it there are no examples; a start that fails says why
  }
}

byId("play").addEventListener("click", () => session.togglePlay());
byId("keep").addEventListener("click", () => session.keep());
byId("stop").addEventListener("click", () => session.stop());
byId("back").addEventListener("click", () => session.play());
byId("go-on").addEventListener("click", () => session.goOnFromHere());
byId("branch").addEventListener("click", () => session.branchFromHere(form.text, form.mode));
byId("full-screen").hidden = !document.fullscreenEnabled;
byId("full-screen").addEventListener("click", () => byId("stage").requestFullscreen());
byId("notice-close").addEventListener("click", () => {
  state.notice = null;
  schedule();
});
byId("notice-action").addEventListener("click", () => session.start(state.prompt));
video.addEventListener("ended", () => session.pause());
document.addEventListener("keydown", shortcut);
document.addEventListener("visibilitychange", () => player.tick(performance.now()));
new ResizeObserver(fit).observe(byId("stage"));
setInterval(tick, TICK_MS);
loadConfig();
