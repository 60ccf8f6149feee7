"""The stages of the recipe in one directory: what each needs and leaves, and whether both belong together.

A stage that is done leaves a record of the files that it read. A directory into which files of another run
came, or in which an early stage was made again, is noticed before anything is trained on a mixture.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rfengine.files import file_sha256, json_object, read_text, write_text

Stage = Literal[
    "vae", "text", "videos", "starts", "teacher", "start", "streams", "distill", "export", "tiny_decoder",
    "evaluate",
]  # fmt: skip
STAGES: tuple[Stage, ...] = get_args(Stage)
NEEDS: dict[Stage, tuple[Stage, ...]] = {
    "vae": (),
    "text": (),
    "videos": ("vae", "text"),
    "starts": ("vae", "text"),
    "teacher": ("videos", "starts"),
    "start": ("teacher", "videos", "starts"),
    "streams": ("start", "videos"),
    "distill": ("teacher", "streams", "videos"),
    "export": ("vae", "text", "distill"),
    "tiny_decoder": ("export",),
    "evaluate": ("distill",),
}
CHECKPOINT = "checkpoint"  # the directory, inside that of the run, which the trainings fill up to the teacher
# the student's, stage by stage
STARTED, STREAMED, DISTILLED = "start_checkpoint", "streams_checkpoint", "distill_checkpoint"
_RECORDS = "stages"
_MOST_BYTES = 100_000


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The files of a run. output: the checkpoint that export writes."""

    directory: Path
    output: Path

    def result(self, stage: Stage) -> Path:
        """The file that a stage leaves when it is done."""
        own = {
            "vae": f"{CHECKPOINT}/vae.safetensors",
            "text": f"{CHECKPOINT}/text_encoder.safetensors",
            "videos": "videos.pt",
            "starts": "starts.pt",
            "teacher": f"{CHECKPOINT}/transformer.safetensors",
            "start": f"{STARTED}/transformer.safetensors",
            "streams": f"{STREAMED}/transformer.safetensors",
            "distill": f"{DISTILLED}/transformer.safetensors",
            "evaluate": "evaluated.json",
        }
        if stage in own:
            return self.directory / own[stage]
        part = {"export": "transformer", "tiny_decoder": "tiny_vae"}[stage]
        return self.output / f"{part}.safetensors"

    def is_done(self, stage: Stage) -> bool:
        """Whether the result of a stage is there, and was made from what its needs have left.

        Raises ValueError where it was made from other files.
        """
        result, record = self.result(stage), self._record(stage)
        if not result.exists() or not record.exists():
            return False
        made_from = json_object(read_text(record, _MOST_BYTES), str(record))
        for need in NEEDS[stage]:
            if made_from.get(need) != self._digest(need):
                source = self.result(need)
                raise ValueError(
                    f"{result} was made from another {source.name} than the one in {source.parent}; put that "
                    f"back, or remove {record} to run --stage {stage} again"
                )
        return True

    def check_needs(self, stage: Stage) -> None:
        """Raises ValueError where a stage that this one needs is not done."""
        for need in NEEDS[stage]:
            if not self.result(need).exists():
                raise ValueError(f"{self.result(need)} does not exist; run --stage {need} before {stage}")

    def remember(self, stage: Stage) -> None:
        """Record what the result of a stage was made from. Raises OSError."""
        self._record(stage).parent.mkdir(parents=True, exist_ok=True)
        digests = {need: self._digest(need) for need in NEEDS[stage]}
        write_text(self._record(stage), json.dumps(digests, indent=1) + "\n")

    def _record(self, stage: Stage) -> Path:
        return self.directory / _RECORDS / f"{stage}.json"

    def _digest(self, stage: Stage) -> str:
        result = self.result(stage)
        return file_sha256(result) if result.exists() else ""
