/** The sentences of the page: numbers, errors and ends in plain words. */

const FAULTS = {
  too_many_sessions: "The server is busy: as many videos run as it allows. Try again in a moment.",
  no_memory: "The server has no memory left for another video just now. Try again in a moment.",
  out_of_memory: "The server ran out of memory in the middle of the video. Start again.",
  draining: "The server is being stopped. Start again in a minute.",
  engine_lost: "The server had a fault and is starting anew. Start again in a minute.",
  no_replica: "No part of the server is ready just now. Try again in a moment.",
  chunk_failed: "Something failed while the video was made. Start again.",
  delivery_failed: "Something failed while the video was sent. Start again.",
  slow_client: "This computer did not take the video fast enough, so the server ended it. Start again.",
  superseded: "The video went to another point before this prompt was shown. Send it again if you still want it.",
  snapshot_budget: "There is no room to keep another moment. The earlier ones stay; a new video has room again.",
  unknown_snapshot: "This kept point is no longer there. Choose another one.",
  too_many_branches: "This video has as many branches as there can be. Start another video for more.",
  too_many_commands: "That was too much at once. Wait a moment and try again.",
  too_many_connections: "Too many videos are open from this computer. Close one of them and try again.",
  recording_quota: "The server has no room left to record another video. Try again later.",
  recording_ended: "The server has no room left to record, so a download ends here. The video itself goes on.",
  unauthorized: "The server needs its access key. Load this page again and enter the key.",
};

const ENDS = {
  finished: "The video is complete.",
  stopped: "You ended the video.",
  draining: "The server is being stopped, so the video has ended.",
  idle: "The video was paused for so long that the server ended it.",
  expired: "The video has run for as long as the server allows.",
  slow_client: FAULTS.slow_client,
  failed: "Something failed on the server, so the video has ended.",
};

const CLOSES = {
  lost: "The connection was lost, so this video has ended. What was shown can still be looked at below.",
  away: "The server cannot be reached. See that it is running and that you are connected, then try again.",
  unauthorized: FAULTS.unauthorized,
  refused: "The server is there but did not open a video. Try again in a moment.",
};

export const NO_VIDEO_SUPPORT = "This browser cannot play the video (H.264). A current Chrome, Edge, Safari or Firefox can.";
export const NOT_DECODED = "This browser could not decode the video, so it was ended. Start again.";

/** What an error of the server means for a person; its own sentence where the code is not known here. */
export function faultWords(/** @type {string} */ code, /** @type {string} */ message) {
  return FAULTS[code] ?? sentence(message);
}

/** Why a session ended. */
export function endWords(/** @type {string} */ reason) {
  return ENDS[reason] ?? "The video has ended.";
}

/** Why a connection is gone. */
export function closeWords(/** @type {import("./connection.js").CloseReason} */ reason) {
  return CLOSES[reason];
}

/** With a capital letter first and a full stop last. */
function sentence(/** @type {string} */ text) {
  const trimmed = text.trim() || "something failed; try again";
  const first = trimmed[0].toUpperCase() + trimmed.slice(1);
  return /[.!?]$/.test(first) ? first : `${first}.`;
}

/** "1 chunk", "12 chunks". */
export function counted(/** @type {number} */ number, /** @type {string} */ noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

/** "0.4 s". */
export function shortTime(/** @type {number} */ seconds) {
  return `${seconds.toFixed(1)} s`;
}

/** "0.75 s". */
export function exactTime(/** @type {number} */ seconds) {
  return `${Number(seconds.toFixed(2))} s`;
}

/** "1:05". */
export function clock(/** @type {number} */ seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

/** "16.0 frames/s", or a dash where nothing was measured. */
export function frameRate(/** @type {number | null} */ rate) {
  if (rate === null) return "–";
  return `${rate < 100 ? rate.toFixed(1) : Math.round(rate)} frames/s`;
}

/** The name of a branch. */
export function branchName(/** @type {number} */ id) {
  return id === 0 ? "Main line" : `Branch ${id}`;
}
