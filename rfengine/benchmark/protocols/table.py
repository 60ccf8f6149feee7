"""The protocols of `rfengine bench --protocol`, and the published figures that they stand beside."""

from __future__ import annotations

from rfengine.benchmark.protocols.protocol import RATE, Protocol, Rival
from rfengine.benchmark.protocols.repetition import measure_repetition
from rfengine.benchmark.protocols.streams import (
    measure_first_frame,
    measure_frames,
    measure_latency,
    measure_latents,
)
from rfengine.benchmark.protocols.videos import measure_cold_clip, measure_file, measure_warm_clip
from rfengine.video import DEFAULT_NUM_FRAMES

LONG_FRAMES = 1596  # as in the table of Wave Forcing

_FLASHDREAMS = "NVIDIA/flashdreams, docs/source/_static/performance/self_forcing/perf-0521.json"
_FOUR_PASSES = (
    "4 denoising passes of the 6th chunk, 18 to 21 latent frames of keys; no context pass, no decoder"
)
_WAVE_FORCING = "model card of Wave Forcing, SJTU-DENG-Lab/WaveForcing-1.3B"
_ROLLING = "end to end, full decoder, 1,596 frames, file written; chunks denoised beside each other"
_USER = "a user's question of 2026-04-10 to the authors, github.com/JaydenLyh/Reward-Forcing"
_UNSAID = "4 denoising passes and the context pass; the decoder perhaps"
_CLIP = "81 frames with the decoder; loading and warm-up are not named"

_PASSES = ("the chunk's noise", "4 denoising passes", "the sampler's steps", "eviction and rotary phases")
_CONTEXT = "the context pass"
_NOT_FRAMES = ("text encoding", "the decoder", "writing a file")
_NOT_FILE = ("text encoding", "writing a file", "the start of the stream")
_FRAMES_INSIDE = (
    "noise",
    "all denoising passes",
    _CONTEXT,
    "the decoder",
    "the copy of the frames to the host",
)
_ENCODING = "text encoding, where the model has a text encoder"

_ALL = (
    Protocol(
        "dit-4-passes",
        "The transformer alone: 4 denoising passes of a chunk, over a window of 21 latent frames without a "
        "sink. Its frames are those that the latents would decode to.",
        _PASSES,
        (_CONTEXT, *_NOT_FRAMES),
        measure_latents,
        rivals=(
            Rival("FlashDreams", "chunk_ms_p50", 344, "H100", _FOUR_PASSES, _FLASHDREAMS, 21, None),
            Rival(
                "Self-Forcing's own code", "chunk_ms_p50", 432, "H100",
                _FOUR_PASSES, _FLASHDREAMS, 21, None,
            ),
            Rival("FastVideo", "chunk_ms_p50", 511, "H100", _FOUR_PASSES, _FLASHDREAMS, 21, None),
        ),
        system="self-forcing",
        context_pass=False,
        decodes=False,
    ),
    Protocol(
        "dit-context",
        "As dit-4-passes, with the context pass.",
        (*_PASSES, _CONTEXT),
        _NOT_FRAMES,
        measure_latents,
        system="self-forcing",
        decodes=False,
    ),
    Protocol(
        "dit-window-9",
        "The transformer alone: 4 denoising passes and the context pass, over a window of 9 latent frames, "
        "3 of them an averaged sink.",
        (*_PASSES, _CONTEXT),
        _NOT_FRAMES,
        measure_latents,
        system="reward-forcing",
        decodes=False,
    ),
    Protocol(
        "tiny-decoder",
        "The stream of dit-window-9 as frames, by the tiny decoder.",
        _FRAMES_INSIDE,
        _NOT_FILE,
        measure_frames,
        rivals=(
            Rival(
                "FlashDreams", RATE, 46.6, "GB200",
                "4 denoising passes and the context pass, window 21, tiny decoder",
                "NVIDIA/flashdreams, PERFORMANCE.md", 21, "reduced",
            ),
        ),
        system="reward-forcing",
        vae="tiny",
    ),
    Protocol(
        "full-decoder",
        "The stream of dit-window-9 as frames, by the full decoder.",
        _FRAMES_INSIDE,
        _NOT_FILE,
        measure_frames,
        rivals=(
            Rival(
                "Reward Forcing", RATE, 23.1, "H100", _UNSAID, "README of JaydenLyh/Reward-Forcing",
                9, "lossless", is_stated=False,
            ),
            Rival(
                "Self-Forcing", RATE, 17.0, "H100",
                _UNSAID, "arXiv 2506.08009", 21, "lossless", is_stated=False,
            ),
        ),
        system="reward-forcing",
        vae="full",
    ),
    Protocol(
        "file",
        f"A video of {LONG_FRAMES:,} frames in a warm process, until its file is closed.",
        (_ENCODING, "the window filling", *_FRAMES_INSIDE, "encoding to H.264", "the file on the disk"),
        ("the process's start", "loading", "compiling"),
        measure_file,
        rivals=(
            Rival(
                "Rolling Forcing, 4 steps", "seconds", 106.5, "H200",
                _ROLLING, _WAVE_FORCING, None, "lossless",
            ),
            Rival(
                "Rolling Forcing, 5 steps", RATE, 11.9, "H200",
                _ROLLING, _WAVE_FORCING, None, "lossless", steps=5,
            ),
        ),
        encodes_text=True,
        frames=LONG_FRAMES,
        writes=True,
    ),
    Protocol(
        "clip-cold",
        f"A clip of {DEFAULT_NUM_FRAMES} frames from the start of a process, with nothing compiled before.",
        ("the process's start", "loading", "compiling and timing backends", _ENCODING, *_FRAMES_INSIDE),
        ("writing a file", "reading weights from the disk, where the system still holds them"),
        measure_cold_clip,
        encodes_text=True,
        frames=DEFAULT_NUM_FRAMES,
    ),
    Protocol(
        "clip-warm",
        f"A clip of {DEFAULT_NUM_FRAMES} frames in a process that has made one before.",
        (_ENCODING, "the window filling", *_FRAMES_INSIDE),
        ("the process's start", "loading", "compiling", "writing a file"),
        measure_warm_clip,
        rivals=(
            Rival(
                "Reward Forcing, a user's run", "seconds", 5.9, "H100",
                _CLIP, _USER, 9, "lossless", is_stated=False,
            ),
            Rival(
                "Self-Forcing, a user's run", "seconds", 6.2, "H100",
                _CLIP, _USER, 21, "lossless", is_stated=False,
            ),
        ),
        encodes_text=True,
        frames=DEFAULT_NUM_FRAMES,
    ),
    Protocol(
        "first-frame",
        "The first chunk of a new stream in a warm process: with the text states given, and with the prompt "
        "encoded where the model has a text encoder.",
        ("the stream's memory", "keys and values of the text", *_FRAMES_INSIDE),
        ("loading", "compiling", "the server and the network"),
        measure_first_frame,
        encodes_text=True,
    ),
    Protocol(
        "latency",
        "How long a caller waits for each chunk of a stream in its steady state, and how evenly they come.",
        _FRAMES_INSIDE,
        (*_NOT_FILE, "the server and the network"),
        measure_latency,
    ),
    Protocol(
        "repeat",
        "Whether a seed gives the same video bit for bit: twice in one process, and in another process.",
        ("latents and frames of the first chunks, until graphs have been replayed",),
        ("any time",),
        measure_repetition,
    ),
)  # fmt: skip
PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in _ALL}
