/** Plays the fragments of a session with Media Source Extensions, near the end of what has arrived. */

const HISTORY_SECONDS = 600; // that can be looked at again
const TRIM_SECONDS = 30; // are removed at once, so that not every chunk removes something
const LATE_SECONDS = 2.5; // behind the end: play a little faster
const LOST_SECONDS = 6; // behind the end: jump
const CLOSE_SECONDS = 1.5; // behind the end is near enough
const SCARCE_SECONDS = 0.4; // behind the end: play a little slower, so that it need not stop
const SAFE_SECONDS = 0.8;
const CATCH_UP_RATE = 1.1;
const WAIT_RATE = 0.9;
const STUCK_MS = 1500;

/** @returns {boolean} whether this browser plays streams of that type */
export function canPlay(/** @type {string} */ mime) {
  const Source = self.MediaSource ?? self.ManagedMediaSource;
  return Boolean(Source?.isTypeSupported(mime));
}

export class Player {
  #video;
  #onFailure;
  #source = null;
  #buffer = null;
  #queue = [];
  #complete = false;
  #jump = null;
  #still = { time: -1, since: 0 };
  live = false;

  /**
   * @param {HTMLVideoElement} video
   * @param {{onFrame(time: number, frames: number, now: number): void, onFailure(): void}} listeners
   *   onFrame: a frame is on the screen: its time, frames shown so far, and when.
   */
  constructor(video, listeners) {
    this.#video = video;
    this.#onFailure = listeners.onFailure;
    this.#watchFrames(listeners.onFrame);
  }

  #watchFrames(onFrame) {
    const video = this.#video;
    if (!video.requestVideoFrameCallback) {
      const report = () => onFrame(video.currentTime, NaN, performance.now());
      video.addEventListener("timeupdate", report);
      video.addEventListener("seeked", report);
      return;
    }
    const shown = (now, frame) => {
      onFrame(frame.mediaTime, frame.presentedFrames, now);
      video.requestVideoFrameCallback(shown);
    };
    video.requestVideoFrameCallback(shown);
  }

  /** Begin a stream; what was there before is gone. */
  open(/** @type {string} */ mime) {
    this.close();
    const source = new (self.MediaSource ?? self.ManagedMediaSource)();
    const url = URL.createObjectURL(source);
    this.#source = source;
    source.addEventListener(
      "sourceopen",
      () => {
        URL.revokeObjectURL(url);
        if (this.#source !== source) return;
        this.#buffer = source.addSourceBuffer(mime);
        this.#buffer.addEventListener("updateend", () => this.#pump());
        this.#buffer.addEventListener("error", () => this.#onFailure());
        this.#pump();
      },
      { once: true },
    );
    this.#video.src = url;
    this.live = true;
  }

  /** Drop the stream and its memory. */
  close() {
    this.live = false;
    this.#source = this.#buffer = this.#jump = null;
    this.#queue = [];
    this.#complete = false;
    this.#video.removeAttribute("src");
    this.#video.load();
  }

  /** Take the next bytes of the stream. */
  append(/** @type {ArrayBuffer} */ bytes) {
    this.#queue.push(bytes);
    this.#pump();
  }

  /** Nothing follows. */
  complete() {
    this.#complete = true;
    this.#pump();
  }

  #pump() {
    const buffer = this.#buffer;
    if (!buffer || buffer.updating || this.#source.readyState !== "open") return;
    this.#followJump();
    if (this.#trim(HISTORY_SECONDS, TRIM_SECONDS)) return;
    if (this.#queue.length === 0) {
      if (this.#complete) this.#source.endOfStream();
      return;
    }
    try {
      buffer.appendBuffer(this.#queue[0]);
      this.#queue.shift();
    } catch (error) {
      if (error.name === "QuotaExceededError") this.#trim((this.end - this.start) * 0.75, 0);
      else this.#onFailure();
    }
  }

  /** Remove what is older than `seconds`, once it is `least` seconds long; what is on the screen stays. */
  #trim(/** @type {number} */ seconds, /** @type {number} */ least) {
    const stop = Math.min(this.end - seconds, this.#video.currentTime - 1);
    if (stop - this.start <= least) return false;
    this.#buffer.remove(0, stop);
    return true;
  }

  /** The first second that can be looked at. */
  get start() {
    const ranges = this.#video.buffered;
    return ranges.length ? ranges.start(0) : 0;
  }

  /** Where the stream ends so far, in seconds. */
  get end() {
    const ranges = this.#video.buffered;
    return ranges.length ? ranges.end(ranges.length - 1) : 0;
  }

  /** The moment on the screen, in seconds. */
  get time() {
    return this.#video.currentTime;
  }

  /** Whether everything was played and nothing follows. */
  get hasEnded() {
    return this.#video.ended;
  }

  /** Seconds that have arrived and were not shown. */
  get ahead() {
    return Math.max(0, this.end - this.#video.currentTime);
  }

  /** Whether it would play and has nothing to play. */
  get isWaiting() {
    return this.live && this.#source !== null && this.#video.readyState < HTMLMediaElement.HAVE_FUTURE_DATA;
  }

  /** Whether that moment can be shown. */
  has(/** @type {number} */ seconds) {
    const ranges = this.#video.buffered;
    for (let i = 0; i < ranges.length; i += 1) {
      if (ranges.start(i) <= seconds + 1e-3 && seconds < ranges.end(i)) return true;
    }
    return false;
  }

  /** Stand still, at another moment where one is given. */
  hold(/** @type {number | null} */ seconds = null) {
    this.live = false;
    this.#jump = null;
    this.#video.playbackRate = 1;
    this.#video.pause();
    if (seconds !== null && this.has(seconds)) this.#video.currentTime = seconds;
  }

  /** Play on from a moment, as soon as it is there; from where it stands without one. */
  play(/** @type {number | null} */ seconds = null) {
    this.live = true;
    this.#jump = seconds;
    this.#followJump();
    if (this.#jump === null) this.#start();
  }

  #start() {
    // refused where the stream is replaced meanwhile; tick() tries again
    this.#video.play().catch(() => {});
  }

  #followJump() {
    if (this.#jump === null || !this.has(this.#jump)) return;
    this.#video.currentTime = this.#jump;
    this.#jump = null;
    this.#start();
  }

  /** To be called a few times a second: keeps near the end, and gets going again what stands still. */
  tick(/** @type {number} */ now) {
    this.#pump();
    if (!this.live || this.#source === null || this.#jump !== null) return;
    const video = this.#video;
    if (video.paused && !video.ended) this.#start();
    if (this.#complete) video.playbackRate = 1;
    else this.#keepDistance();
    this.#freeWhereStuck(now);
  }

  #keepDistance() {
    const video = this.#video;
    const behind = this.ahead;
    if (behind > LOST_SECONDS) video.currentTime = this.end - CLOSE_SECONDS;
    else if (behind > LATE_SECONDS) video.playbackRate = CATCH_UP_RATE;
    else if (behind < SCARCE_SECONDS) video.playbackRate = WAIT_RATE;
    else if (behind > SAFE_SECONDS && behind < CLOSE_SECONDS) video.playbackRate = 1;
  }

  /** Step over a gap, or over what does not play although it is there. */
  #freeWhereStuck(/** @type {number} */ now) {
    const time = this.#video.currentTime;
    if (time !== this.#still.time || this.ahead < 0.3) {
      this.#still = { time, since: now };
      return;
    }
    if (now - this.#still.since < STUCK_MS) return;
    this.#still.since = now;
    const ranges = this.#video.buffered;
    let next = time + 0.1;
    for (let i = ranges.length - 1; i >= 0; i -= 1) {
      if (ranges.start(i) > time) next = ranges.start(i) + 1e-3;
    }
    this.#video.currentTime = next;
  }
}

/** Scale the video to its stage: tiny ones by a whole number of pixels, so that all are of one size. */
export function fitVideo(/** @type {HTMLVideoElement} */ video, /** @type {HTMLElement} */ stage, width, height) {
  const scale = Math.min(stage.clientWidth / width, stage.clientHeight / height);
  const tiny = Math.max(width, height) < 128;
  const pixels = window.devicePixelRatio || 1;
  const factor = tiny && scale > 1 ? Math.floor(scale * pixels) / pixels : scale;
  video.classList.toggle("tiny", tiny);
  video.style.width = `${width * factor}px`;
  video.style.height = `${height * factor}px`;
}
