"""ServiceTimes: how long the engine and the encoder of one replica take, measured on `tiny` or computed for a
GPU from its data sheet."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from rfengine.costs.chunk import ChunkWork, Part, Precision, prompt_parts
from rfengine.costs.memory import parameter_count
from rfengine.costs.rates import GPU, GPUS, GPUName, floor_ms
from rfengine.costs.shapes import Shapes
from rfengine.presets import PRESETS

EFFICIENCY = 0.5  # assumed: the data sheet's floor over what is reached; no run on a GPU has measured it
ENCODE_S = 0.1  # assumed: 12 frames of 832 x 480 on one core of the host; studies.fleet.measure has a CPU's
GPU_DELIVERY_THREADS = 2  # of a server beside a GPU, as rfengine/serving/sessions.py starts them
FPS, FIRST_FRAMES, CHUNK_FRAMES = 16, 9, 12  # of every shipped streaming model
CHUNK_SECONDS = CHUNK_FRAMES / FPS  # how long a chunk plays


@dataclass(frozen=True, slots=True)
class ServiceTimes:
    """Seconds of one replica, as samples. They are played in the order in which they were taken, from any
    place on, since a machine's slow moments come together.

    turns: of a turn that makes chunk 0, chunk 1, ... of a session; the last entry stands for all later ones.
    encodes: from a chunk to its delivered fragment. delivery_threads: that encode beside the engine; with 0
    the engine's own thread encodes between two turns. origin: measured, computed or made up. ahead_s: of a
    later turn, for the chunk after its own; a session's last turn does not begin one.
    """

    name: str
    origin: str
    turns: tuple[tuple[float, ...], ...]
    encodes: tuple[float, ...]
    delivery_threads: int
    ahead_s: float = 0.0

    def __post_init__(self) -> None:
        samples = [*self.turns, self.encodes]
        if not self.turns or not all(samples) or min(map(min, samples)) < 0:
            raise ValueError(
                f"the service times of {self.name} have {len(self.turns)} kinds of turns and a least sample "
                f"of {min((min(each) for each in samples if each), default=None)} s; give at least one "
                "sample of each, none below 0"
            )

    def turn(self, chunk: int, place: int) -> float:
        """Seconds of the turn that makes a session's chunk of that number, from 0."""
        samples = self.turns[min(chunk, len(self.turns) - 1)]
        return samples[place % len(samples)]

    def last_turn(self, chunk: int, place: int) -> float:
        """Seconds of the turn that makes a session's last chunk."""
        return self.turn(chunk, place) - (self.ahead_s if chunk else 0.0)

    def video_s(self, chunks: int) -> float:
        """Mean seconds of the engine for a whole video that has it to itself."""
        means = [sum(each) / len(each) for each in self.turns]
        later = means[min(1, len(means) - 1) :]
        turns = [means[0], *(later[min(number, len(later) - 1)] for number in range(chunks - 1))]
        return sum(turns) - (self.ahead_s if chunks > 1 else 0.0)

    def encode(self, place: int) -> float:
        """Seconds that a chunk's delivery takes."""
        return self.encodes[place % len(self.encodes)]

    @property
    def steady_s(self) -> float:
        """Mean seconds of the engine's thread for a chunk in the steady state."""
        turn = sum(self.turns[-1]) / len(self.turns[-1])
        own = 0 if self.delivery_threads else sum(self.encodes) / len(self.encodes)
        return turn + own

    @property
    def streams(self) -> int:
        """Sessions that the engine can keep playing: chunks that fit into the time that one plays."""
        return int(CHUNK_SECONDS / self.steady_s)


def measured(record: dict[str, Any]) -> ServiceTimes:
    """Those of a record of studies.fleet.measure, of one session alone."""
    alone = record["alone"]
    turns = tuple(tuple(alone[f"turn_{chunk}_s"]) for chunk in ("0", "1", "later"))
    return ServiceTimes("tiny, CPU", "measured", turns, tuple(alone["outside_s"]), delivery_threads=0)


@cache
def computed(
    precision: Precision, gpu: GPUName = "h100", efficiency: float = EFFICIENCY, encode_s: float = ENCODE_S
) -> ServiceTimes:
    """Those of wan-1.3b at 832 x 480 with the full decoder in 16 bits: the floors of the roofline over
    `efficiency`, without any spread.

    On a GPU a stream is a chunk ahead from its second chunk on, so that turn denoises two. encode_s: of one
    chunk on a core of the host. Raises ValueError for an efficiency that is none.
    """
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency is {efficiency:g}; it is a share of the data sheet, above 0, at most 1")
    sheet = GPUS[gpu]
    shapes = Shapes(PRESETS["wan-1.3b"])

    def seconds(chunk: int, decodes: bool = True) -> float:
        parts = [part for part in ChunkWork(shapes, chunk, precision).parts() if decodes or not part.decodes]
        return _floor_s(parts, sheet) / efficiency

    steady = shapes.config.cache.filling_chunks
    first, second = prompt_s(sheet, efficiency) + seconds(0), seconds(1) + seconds(2, decodes=False)
    turns = tuple((each,) for each in (first, second, seconds(steady)))
    return ServiceTimes(
        f"{sheet.name}, {precision}", "computed", turns, (encode_s,), GPU_DELIVERY_THREADS,
        ahead_s=seconds(steady, decodes=False),
    )  # fmt: skip


def chunk_floor_s(precision: Precision, gpu: GPUName, decodes: bool = True) -> float:
    """The floor of a chunk in the steady state, in seconds."""
    work = ChunkWork.steady(Shapes(PRESETS["wan-1.3b"]), precision)
    return _floor_s([part for part in work.parts() if decodes or not part.decodes], GPUS[gpu])


def prompt_s(gpu: GPU, efficiency: float) -> float:
    """A prompt: the transformer's part of the roofline, and the text encoder's products, two FLOPs for each
    weight but those of its table of words and each token; both over `efficiency`."""
    config = PRESETS["wan-1.3b"]
    words = config.text.vocab_size * config.text.dim
    flops = 2 * (parameter_count(config.text) - words) * config.model.text_len
    encoder = Part("once a prompt", "text encoder", flops=flops)
    return _floor_s([*prompt_parts(config.model), encoder], gpu) / efficiency


def _floor_s(parts: list[Part], gpu: GPU) -> float:
    return sum(floor_ms(part, gpu) for part in parts) / 1e3


def constant(turn_s: float, encode_s: float = 0.0, delivery_threads: int = 1) -> ServiceTimes:
    """The same for every chunk, for checks against closed forms."""
    return ServiceTimes(f"{turn_s:g} s", "made up", ((turn_s,),), (encode_s,), delivery_threads)
