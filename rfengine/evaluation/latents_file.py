"""The latents of a video, from the safetensors file beside it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from torch import Tensor

from rfengine.checkpoint.tensor_file import open_safetensors
from rfengine.evaluation.video_frames import Frames
from rfengine.files import open_regular

logger = logging.getLogger(__name__)

_MOST_BYTES = 2**31


def read_latents(path: Path, video: Frames) -> Tensor | None:
    """`latents` [C, F, h, w] of a safetensors file, a batch of one taken off; None where there is no file.

    Latents of a shape that cannot be the video's are told by a warning. Raises ValueError for a file that is
    damaged or has none, and for latents of other axes, of integers, above 2 GiB, or that are not finite.
    """
    if not os.path.lexists(path):
        return None
    try:
        open_regular(path).close()
        stored = open_safetensors(path)
        if "latents" not in stored:
            raise ValueError(f"{path} has no tensor `latents`; add it or remove the file")
        entry = stored["latents"]
        shape = entry.shape[1:] if len(entry.shape) == 5 and entry.shape[0] == 1 else entry.shape
        if len(shape) != 4 or 0 in shape or not entry.dtype.is_floating_point:
            raise ValueError(
                f"{path} has latents {entry.dtype} {tuple(entry.shape)}; give floating point [C, F, h, w]"
            )
        if entry.nbytes > _MOST_BYTES:
            raise ValueError(f"{path} has {entry.nbytes} bytes of latents; at most {_MOST_BYTES} are read")
        latents = entry.read().float().reshape(shape)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); make it readable or remove it"
        ) from error
    if not latents.isfinite().all():
        raise ValueError(f"{path} has latents that are not finite; decode and save them again")
    _, frames, height, width = shape
    if frames > video.count or video.height * width != video.width * height:
        logger.warning(
            "%s has %d latent frames of %d x %d, which are none of a video of %d frames of %d x %d",
            path, frames, height, width, video.count, video.height, video.width,
        )  # fmt: skip
    return latents
