"""Snapshot: a stream between two chunks, as tensors and JSON values, in memory or in one file.

A file may come from anywhere: its checksum covers every tensor and every value, and what a stream takes over
is first compared with what it expects.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.cache.position import CachePosition, check_device_held
from rfengine.checkpoint.layouts import list_names
from rfengine.config import CacheConfig, WanConfig
from rfengine.config_json import from_dict
from rfengine.files import strict_json
from rfengine.grid import LatentGrid
from rfengine.host_state import ordinary
from rfengine.limits import Range, check_value, shown
from rfengine.models.dit import WanDiT
from rfengine.older_snapshot import OLDER_FORMATS, upgraded
from rfengine.prompt_blend import MOST_TRANSITION_CHUNKS, Interpolation, TextTransition
from rfengine.runtime.ranks import on_all
from rfengine.schedule import MAX_SEED
from rfengine.snapshot_parts import joined, part_of, part_path, part_paths
from rfengine.tensor_parallel import TensorParallel

logger = logging.getLogger(__name__)

SNAPSHOT_FORMAT = 4
_WITHOUT_CHECKSUM = 2  # an older format, the same but for the checksum
_Count = Annotated[int, Range(0, 2**31 - 1)]
_Side = Annotated[int, Range(1, 2**16)]  # pixels
# The type of each value of info; from_dict checks those inside cache.
_FIELDS = {
    "format": int, "fingerprint": str, "dtype": str, "decoder": str, "cache": dict,
    "denoising_timesteps": tuple[float, ...], "first_timesteps": tuple[float, ...], "rolling": str,
    "prompt": str, "seed": Annotated[int, Range(0, MAX_SEED)],
    "height": _Side, "width": _Side, "index": _Count, "next_chunk": _Count, "next_frame": _Count,
    "held": Annotated[tuple[int, ...], Range(-1, 2**31 - 1)], "joint_chunks": _Count,
    "decoded_frames": _Count,
    "transition_chunks": Annotated[int, Range(1, MOST_TRANSITION_CHUNKS)],
    "transition_step": Annotated[int, Range(0, MOST_TRANSITION_CHUNKS - 1)], "interpolation": Interpolation,
    "given_frames": Annotated[int, Range(1, 64)], "loras": tuple[str, ...], "precision": str,
    "part": Annotated[tuple[int, int], Range(0, 1024)],
}  # fmt: skip
# there while the text states go to those of a new prompt, while the next chunk begins with given frames, with
# LoRAs in the weights (sha256, scale and name of each), with products in FP8, and on one of several ranks
# (snapshot_parts.py), and what stands for them elsewhere; older formats count in transition_chunks those that
# are left
_OPTIONAL = {
    "transition_chunks": 0, "transition_step": 0, "interpolation": "linear", "given_frames": 0, "loras": (),
    "precision": "without FP8", "part": (0, 1),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """What a snapshot says of its stream beside the tensors; every field is of its type and in its range.

    index: of the next chunk that the caller gets. position: of the cache, counted from the last hard switch.
    ahead: whether the chunk before it is denoised and was not handed out. transition_chunks: of the way of
    the text states to those of the prompt, 0 where they are there; transition_step: those that are done.
    given_frames: latent frames with which the next chunk begins as they are. part: of which rank, and of how
    many, the heads are.
    """

    prompt: str
    seed: int
    height: int
    width: int
    index: int
    position: CachePosition
    decoded_frames: int
    cache: CacheConfig
    ahead: bool
    transition_chunks: int
    transition_step: int
    interpolation: Interpolation
    given_frames: int
    part: tuple[int, int]

    @property
    def kept_frames(self) -> range:
        """The frames whose clean latents a stream keeps: those that a prompt switch may recompute."""
        frames = self.position.frame
        return range(max(0, frames - self.cache.past_frames), frames)

    @property
    def undecoded(self) -> bool:
        """Whether there are chunks that the decoder has not seen."""
        return self.decoded_frames < self.position.frame

    def check(self) -> None:
        """Raises ValueError where two fields cannot be true at once."""
        self.position.check(self.cache)
        frames, begun = self.position.frame, self.position.chunk - self.ahead
        if self.decoded_frames > frames:
            raise ValueError(f"decoded_frames is {self.decoded_frames} after {frames} latent frames")
        if self.ahead and (begun < 1 or self.undecoded):
            raise ValueError(
                f"a chunk is ahead, but next_chunk is {self.position.chunk}, next_frame {frames} and "
                f"decoded_frames {self.decoded_frames}"
            )
        following = self.cache.chunk_frames if frames else self.cache.first_chunk
        if self.given_frames >= following or (self.given_frames and self.cache.joint_frames):
            raise ValueError(
                f"given_frames is {self.given_frames} of a chunk of {following}, which is begun with fewer, "
                "and in a rolling schedule with none"
            )
        if self.part[0] >= self.part[1]:
            raise ValueError(f"part is {self.part}, a rank and the number of ranks")
        if self.index < begun:
            raise ValueError(f"index is {self.index} and {begun} chunks were handed out")
        if self.transition_step >= max(self.transition_chunks, 1):
            raise ValueError(
                f"transition_step is {self.transition_step} of {self.transition_chunks} transition_chunks"
            )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A stream between two chunks: tensors by name, and everything else as JSON values."""

    tensors: dict[str, Tensor]
    info: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file whose metadata holds the JSON and a checksum; it appears under its name
        when it is whole. Of several ranks each writes a file of its own beside `path` (part_path). Raises
        ValueError where info is not that of a stream."""
        from rfengine.checkpoint.loader import save_weights

        rank, count = self.stream_info().part
        own = Path(path) if count == 1 else part_path(Path(path), rank, count)
        text = json.dumps(self.info | {"format": SNAPSHOT_FORMAT})
        save_weights(own, self.tensors, {"snapshot": text, "sha256": _checksum(self.tensors, text)})

    @classmethod
    def joined(cls, parts: Iterable[Snapshot]) -> Snapshot:
        """The whole snapshot of those of all ranks, in any order. Raises ValueError where one is missing or
        damaged, and where they are not of one moment."""
        parts = list(parts)
        for each in parts:
            each.stream_info()
        whole = [(each.tensors, {"part": [0, 1]} | each.info) for each in parts]
        return cls(*joined(whole))

    def of_rank(self, parallel: TensorParallel) -> Snapshot:
        """What this rank restores: its part of a whole snapshot, or its own one. Raises ValueError for the
        part of another rank."""
        own, stated = (parallel.rank, parallel.count), self.stream_info().part
        if stated == own:
            return self
        if stated != _OPTIONAL["part"]:
            raise ValueError(
                f"the snapshot is part {stated[0] + 1} of {stated[1]} and this is rank {own[0]} of {own[1]}; "
                "give the whole one, of Snapshot.load with the name without a number or of Snapshot.joined"
            )
        return Snapshot(*part_of((self.tensors, self.info), *own))

    @classmethod
    def _of_parts(cls, path: Path, parts: Sequence[Path]) -> Snapshot:
        names = ", ".join(each.name for each in parts)
        if path.exists():
            raise ValueError(
                f"{path} is there whole and in parts ({names}); remove what is of another moment"
            )
        try:
            return cls.joined(map(cls.load, parts))
        except ValueError as error:
            raise ValueError(
                f"{path} is in the parts {names}, which are not one snapshot: {error}"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Snapshot:
        """Read what save wrote, on several ranks all parts as one. Raises ValueError when the file is none of
        ours or damaged."""
        from rfengine.checkpoint.loader import read_safetensors

        if parts := part_paths(Path(path)):
            return cls._of_parts(Path(path), parts)
        tensors, metadata = read_safetensors(Path(path))
        if "snapshot" not in metadata:
            raise ValueError(
                f"{path} is a safetensors file but holds no stream; give one that Snapshot.save wrote"
            )
        text = metadata["snapshot"]
        try:
            info = strict_json(text)
            number = info.get("format") if isinstance(info, dict) else None
            present = upgraded(info, tensors, SNAPSHOT_FORMAT) if number in OLDER_FORMATS else (info, tensors)
            snapshot = cls(present[1], present[0])
            snapshot.stream_info()
        except ValueError as error:
            raise ValueError(f"{path} cannot be restored: {error}") from error
        plain = {"format": "pt", "snapshot": text}
        if number == _WITHOUT_CHECKSUM and metadata == plain:
            logger.warning(
                "%s has no checksum, since an older rfengine wrote it: damage may go unseen; save it again",
                path,
            )
        elif metadata != plain | {"sha256": _checksum(tensors, text)}:
            raise ValueError(
                f"{path} is damaged: its content does not give its checksum; take another copy of it"
            )
        return snapshot

    def stream_info(self) -> StreamInfo:
        """The values of info, checked. Raises ValueError for any that is absent, unknown, of a wrong type,
        out of range or against another."""
        if not isinstance(self.info, dict):
            raise ValueError(f"the snapshot's info is {shown(self.info)}, no table of values; take it again")
        known = self.info.get("format")
        if type(known) is not int or known != SNAPSHOT_FORMAT:
            raise ValueError(
                f"the snapshot's format is {shown(known)} and this rfengine reads {SNAPSHOT_FORMAT}; "
                "take it again"
            )
        missing = [name for name in _FIELDS if name not in self.info and name not in _OPTIONAL]
        if missing:
            raise ValueError(f"the snapshot lacks {', '.join(missing)}; take it again")
        values = {name: tuple(each) if isinstance(each, list) else each for name, each in self.info.items()}
        for name, value in values.items():
            if name not in _FIELDS:
                raise ValueError(f"the snapshot has {shown(name)}, which no stream has; take it again")
            check_value(f"the snapshot's {name}", value, _FIELDS[name])
        try:
            values = _OPTIONAL | values
            values |= {
                "cache": from_dict(CacheConfig, values["cache"]),
                "ahead": "ahead.frames" in self.tensors,
                "position": CachePosition(
                    values["next_chunk"], values["next_frame"], values["held"], values["joint_chunks"]
                ),
            }
            info = StreamInfo(**{name: values[name] for name in StreamInfo.__dataclass_fields__})
            info.check()
        except ValueError as error:
            raise ValueError(f"the snapshot is damaged: {error}; take it again") from error
        return info

    def check(self, expected: dict[str, Any], any_loras: bool = False) -> None:
        """Raises ValueError unless info, which stream_info has checked, holds what the pipeline that restores
        it has; with any_loras, its LoRAs may be others."""
        taken_with, own = (_loras(info.get("loras", ())) for info in (self.info, expected))
        if taken_with.keys() != own.keys() and not any_loras:
            stated, present = (list_names(each.values()) or "none" for each in (taken_with, own))
            raise ValueError(
                f"the LoRAs of the snapshot are {stated}, those of this pipeline are {present}; restore it "
                "with the same LoRAs at the same scales"
            )
        for name, value in ({"precision": _OPTIONAL["precision"]} | expected).items():
            stated = self.info.get(name, _OPTIONAL.get(name))
            if name != "loras" and stated != value:
                raise ValueError(
                    f"the snapshot's {name} is {shown(stated)}, this pipeline's is {shown(value)}; "
                    "restore it with the model and settings it was taken with"
                )

    def checked(
        self,
        settings: dict[str, Any],
        model: WanDiT,
        grid: LatentGrid,
        any_loras: bool = False,
    ) -> tuple[Snapshot, StreamInfo]:
        """What this rank restores, and what that says, once all but its decoder's tensors is known to fit a
        stream of `grid`.

        settings: what the pipeline that restores it has; its LoRAs count without any_loras. Raises
        ValueError, on every rank where one finds a fault or they have snapshots of different moments.
        """
        with on_all(model.parallel) as equal:
            own = self.of_rank(model.parallel)
            info = own.stream_info()
            own.check(settings, any_loras)
            if (info.height, info.width) != (grid.height, grid.width):
                raise ValueError(
                    f"the snapshot is of {info.height} x {info.width} pixels and the stream of {grid.height} "
                    f"x {grid.width}; restore it as a stream of its own"
                )
            others = {name: each for name, each in own.tensors.items() if not name.startswith("decoder.")}
            check_tensors(others, expected_tensors(info, model.config, grid, model.dtype))
            if (held := others.get("cache.device_held")) is not None:
                check_device_held(info.cache, held.tolist(), info.position.frame)
            equal["snapshot"] = {name: value for name, value in own.info.items() if name != "part"}
        return own, info

    def group(self, name: str) -> dict[str, Tensor]:
        """The tensors called `name`.something, by that something."""
        prefix = f"{name}."
        return {key[len(prefix) :]: tensor for key, tensor in self.tensors.items() if key.startswith(prefix)}

    def transition(self, info: StreamInfo, device: torch.device) -> TextTransition | None:
        """The way of the text states to those of the prompt, on `device`; None where they are there."""
        if not info.transition_chunks:
            return None
        names = ("text_start" if info.transition_step else "text_states", "text_target")
        start, target = (ordinary(self.tensors[name]).to(device) for name in names)
        return TextTransition(start, target, info.transition_chunks, info.interpolation, info.transition_step)


def _loras(entries: Iterable[str]) -> dict[tuple[str, ...], str]:
    """sha256 and scale of each LoRA of a snapshot, and what errors call it."""
    words = [(*each.split(" ", 2), "", "")[:3] for each in entries]
    return {(digest, scale): f"{name[:80]} at {scale[:24]} ({digest[:8]})" for digest, scale, name in words}


def expected_tensors(
    info: StreamInfo, model: WanConfig, grid: LatentGrid, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What a snapshot holds beside the decoder's state, by name, on the meta device."""
    frames = info.cache.chunk_frames
    parallel = TensorParallel(*info.part)
    cache = StreamingKVCache(model, info.cache, grid, dtype=dtype, device="meta", parallel=parallel)
    latents = {"window_latents": len(info.kept_frames), "given_latents": info.given_frames}
    shapes = {
        name: (1, model.in_dim, count, grid.latent_height, grid.latent_width)
        for name, count in latents.items()
        if count
    }
    shapes["text_states"] = (1, model.text_len, model.text_dim)
    if info.transition_chunks:
        shapes["text_target"] = shapes["text_states"]
    if info.transition_step:
        shapes["text_start"] = shapes["text_states"]
    expected = {f"cache.{name}": tensor for name, tensor in cache.tensors().items()}
    expected |= {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    if info.ahead:
        shown_frames = 0 if info.part[0] else frames * grid.temporal_stride  # the first rank decodes
        pixels = (shown_frames, grid.height, grid.width, 3)
        expected["ahead.frames"] = torch.empty(pixels, dtype=torch.uint8, device="meta")
    return expected


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless `tensors` have the names, shapes and dtypes of `expected`, whose values do not
    matter, and are finite."""
    for name in expected:
        if name not in tensors:
            raise ValueError(f"the snapshot lacks {name}; take it again")
    for name, tensor in tensors.items():
        if name not in expected:
            raise ValueError(f"the snapshot has {shown(name)}, which this stream has not; take it again")
        own = expected[name]
        if not isinstance(tensor, Tensor) or tensor.shape != own.shape or tensor.dtype != own.dtype:
            found = f"{tuple(tensor.shape)} in {tensor.dtype}" if isinstance(tensor, Tensor) else "no tensor"
            raise ValueError(
                f"{name} of the snapshot is {found}; this stream needs {tuple(own.shape)} in {own.dtype}"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} of the snapshot has values that are not finite; take it again")


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """sha256 over the JSON text and every name, shape, dtype and byte of the tensors."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
