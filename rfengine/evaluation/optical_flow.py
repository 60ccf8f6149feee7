"""Optical flow without weights: what moves between one frame and the next, and where that can be trusted.

Every frame is normalised locally, channel by channel, to zero mean and unit variance, so that light or colour
that changes slowly over the picture moves nothing. Over a pyramid, from coarse to fine, blocks are matched
within two pixels and the match is refined by Lucas-Kanade steps. A vector counts where three things hold: the
block has contrast, the matched blocks agree (normalised correlation; noise and flicker do not), and the
backward flow leads back.

Along a straight edge only the motion across it can be seen, and none within a plain surface; where an edge
moves across still parallel lines, a motion along the lines explains both, and is taken for it.

T frames, P pairs of frames, h x w the size at which flow is measured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

WORKING_SIDE = 256  # pixels; motion between frames of a larger video is measured on shrunken ones

_NORMAL_RADIUS = 7  # pixels around, over which light and contrast are evened out
_NOISE_LEVEL = 0.03  # of the range 0 to 1: contrast far below it is not amplified
_LEAST_CONTRAST = 0.04  # standard deviation within a block, of the range 0 to 1
_BLOCK_RADIUS = 3
_COARSEST_SIDE = 12  # pixels
_REFINEMENTS = 4  # Lucas-Kanade steps a level
_DAMPING = 0.02  # of the structure tensor: plain surfaces stay where they are
_STAY = 0.02  # what a search step of one pixel has to gain in squared difference, for ties in plain surfaces
_AGREEMENT = 0.75  # least correlation of the matched blocks
_STILL = (1.5, 0.005)  # factor and normalised variance by which staying has to explain less than moving
_ROUND_TRIP = (0.35, 0.1)  # pixels, and part of the length, by which the way back may miss
_PAIRS_AT_ONCE = 16
_PIXELS_AT_ONCE = 2**18  # of the first pictures of the pairs


class OpticalFlow(NamedTuple):
    """vectors: [T - 1, h, w, 2], (x, y) in pixels of the video per frame. mask: bool [T - 1, h, w], where the
    vectors can be trusted."""

    vectors: Tensor
    mask: Tensor


def optical_flow(frames: Tensor, working_side: int = WORKING_SIDE) -> OpticalFlow:
    """The flow from every frame of a video to the next, on the device of the frames.

    frames: [T, H, W, 3], uint8 or float from 0 to 1. working_side: where the shorter side is longer, the flow
    is measured at this size; its unit stays the pixel of the video. Motion of up to a quarter of the shorter
    side a frame is found. Raises ValueError for other shapes and for fewer than two frames.
    """
    pictures = as_pictures(frames)
    if len(pictures) < 2:
        raise ValueError(f"the video has {len(pictures)} frames; flow needs at least two")
    height, width = pictures.shape[-2:]
    return picture_flow(shrunk(pictures, working_side), height, width)


def shrunk(pictures: Tensor, shorter_side: int = WORKING_SIDE) -> Tensor:
    """Pictures [T, 3, H, W] with a longer shorter side, at this size."""
    height, width = pictures.shape[-2:]
    scale = min(1.0, shorter_side / min(height, width))
    if scale == 1:
        return pictures
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return functional.interpolate(pictures, size, mode="area")


def pairs_at_once(height: int, width: int) -> int:
    """How many pairs of pictures of this size are measured together, so that memory stays bounded."""
    return max(1, min(_PAIRS_AT_ONCE, _PIXELS_AT_ONCE // (height * width)))


def picture_flow(pictures: Tensor, height: int, width: int) -> OpticalFlow:
    """The flow between pictures [T, 3, h, w] from 0 to 1, as `shrunk` made them of a video of `height` and
    `width`."""
    levels = _pyramid(pictures)
    at_once = pairs_at_once(*pictures.shape[-2:])
    normal = [_normalised(level) for level in levels]
    vectors, masks = [], []
    for start in range(0, len(pictures) - 1, at_once):
        end = min(start + at_once, len(pictures) - 1)
        pairs = [(level[start:end], level[start + 1 : end + 1]) for level in normal]
        flow, mask = _trusted_flow(pairs)
        vectors.append(flow)
        masks.append(mask & _has_contrast(pictures[start:end]))
    unit = torch.tensor(
        (width / pictures.shape[-1], height / pictures.shape[-2]), dtype=torch.float32, device=pictures.device
    )
    return OpticalFlow(torch.cat(vectors).permute(0, 2, 3, 1) * unit, torch.cat(masks))


def moving_speed(flow: OpticalFlow, share: float = 0.05) -> Tensor:
    """How fast what moves is, in pixels per frame: float32 [T - 1].

    The median length of the fastest `share` of the picture, where vectors that cannot be trusted have length
    0: a small object counts as much as a large one, stray vectors do not.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; use a part of the picture above 0 and up to 1")
    lengths = torch.where(flow.mask, flow.vectors.norm(dim=-1), 0.0).flatten(1)
    return lengths.topk(max(1, round(share * lengths.shape[1])), dim=1).values.median(dim=1).values


def as_pictures(frames: Tensor) -> Tensor:
    """Frames [T, H, W, 3], uint8 or float, to float32 [T, 3, H, W] from 0 to 1."""
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames have shape {tuple(frames.shape)}; give [T, H, W, 3]")
    scale = 255.0 if frames.dtype == torch.uint8 else 1.0
    return (frames.float() / scale).permute(0, 3, 1, 2).contiguous()


def _pyramid(pictures: Tensor) -> list[Tensor]:
    """From fine to coarse, each half as large as the one before."""
    levels = [pictures]
    while min(levels[-1].shape[-2:]) >= 2 * _COARSEST_SIDE:
        levels.append(functional.avg_pool2d(levels[-1], 2, ceil_mode=True, count_include_pad=False))
    return levels


def _block_mean(values: Tensor, radius: int) -> Tensor:
    """The mean over the square around every pixel, which ends at the border."""
    size = 2 * radius + 1
    rows = functional.avg_pool2d(values, (1, size), 1, (0, radius), count_include_pad=False)
    return functional.avg_pool2d(rows, (size, 1), 1, (radius, 0), count_include_pad=False)


def _normalised(pictures: Tensor) -> Tensor:
    mean = _block_mean(pictures, _NORMAL_RADIUS)
    variance = _block_mean((pictures - mean).square(), _NORMAL_RADIUS)
    return (pictures - mean) / (variance + _NOISE_LEVEL**2).sqrt()


def _has_contrast(pictures: Tensor) -> Tensor:
    deviation = (pictures - _block_mean(pictures, _BLOCK_RADIUS)).square().amax(1, keepdim=True)
    return _block_mean(deviation, _BLOCK_RADIUS)[:, 0] > _LEAST_CONTRAST**2


def _trusted_flow(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Flow [P, 2, h, w] of normalised pyramids, fine to coarse, and where it can be trusted [P, h, w]."""
    both = [(torch.cat((first, second)), torch.cat((second, first))) for first, second in pairs]
    first, second = pairs[0]
    flow = first.new_zeros(2 * len(first), 2, *both[-1][0].shape[-2:])
    for here, there in reversed(both):
        size = here.shape[-2:]
        if flow.shape[-2:] != size:
            grown = flow.new_tensor([size[1] / flow.shape[-1], size[0] / flow.shape[-2]])[:, None, None]
            flow = functional.interpolate(flow, size, mode="bilinear", align_corners=False) * grown
        flow = _refined(here, there, _matched(here, there, flow))
    forward, backward = _without_jitter(*both[0], flow).chunk(2)
    missed = (forward + _warped(backward, forward)).norm(dim=1)
    allowed = _ROUND_TRIP[0] + _ROUND_TRIP[1] * forward.norm(dim=1)
    return forward, (missed < allowed) & (_correlation(first, _warped(second, forward)) > _AGREEMENT)


def _without_jitter(here: Tensor, there: Tensor, flow: Tensor) -> Tensor:
    """Zero where staying explains the picture nearly as well: noise moves blocks along straight edges."""
    staying, moving = (
        _block_mean((here - other).square().mean(1, keepdim=True), _BLOCK_RADIUS)
        for other in (there, _warped(there, flow))
    )
    return torch.where(staying > _STILL[0] * moving + _STILL[1], flow, 0.0)


def _warped(pictures: Tensor, flow: Tensor) -> Tensor:
    """The pictures [B, C, h, w] sampled where the flow [B, 2, h, w] points; the border continues outwards."""
    height, width = pictures.shape[-2:]
    x = torch.arange(width, dtype=torch.float32, device=flow.device) + 0.5 + flow[:, 0]
    y = (torch.arange(height, dtype=torch.float32, device=flow.device) + 0.5)[:, None] + flow[:, 1]
    grid = torch.stack((2 * x / width - 1, 2 * y / height - 1), dim=-1)
    return functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def _matched(here: Tensor, there: Tensor, flow: Tensor) -> Tensor:
    """The flow moved by the whole pixels, up to two either way, that make the blocks most alike."""
    height, width = here.shape[-2:]
    reach = functional.pad(_warped(there, flow), (2, 2, 2, 2), mode="replicate")
    steps = [(x, y) for y in range(-2, 3) for x in range(-2, 3)]
    best, chosen = None, torch.zeros_like(flow)
    for x, y in sorted(steps, key=lambda step: step[0] ** 2 + step[1] ** 2):
        candidate = reach[..., 2 + y : 2 + y + height, 2 + x : 2 + x + width]
        cost = _block_mean((here - candidate).square().mean(1, keepdim=True), _BLOCK_RADIUS)
        cost = cost + _STAY * (x * x + y * y) ** 0.5
        if best is None:
            best = cost
            continue
        chosen = torch.where(cost < best, chosen.new_tensor([x, y])[:, None, None], chosen)
        best = torch.minimum(cost, best)
    return _median(flow + chosen)


def _median(flow: Tensor) -> Tensor:
    """The median of the 3 x 3 vectors around, each component by itself."""
    height, width = flow.shape[-2:]
    padded = functional.pad(flow, (1, 1, 1, 1), mode="replicate")
    around = [padded[..., y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return torch.stack(around).median(dim=0).values


def _refined(here: Tensor, there: Tensor, flow: Tensor) -> Tensor:
    """Lucas-Kanade steps, each of at most a pixel.

    Every pixel of a block asks for its own flow plus what its own difference asks for, and the block takes
    the vector that suits all of them: sum g g' v = sum g (difference + g' flow), damped towards the flow.
    """
    for _ in range(_REFINEMENTS):
        warped = _warped(there, flow)
        x, y = gradient((here + warped) / 2)
        wanted = here - warped + x * flow[:, :1] + y * flow[:, 1:]
        pairs = ((x, x), (x, y), (y, y), (x, wanted), (y, wanted))
        sums = _block_mean(torch.stack([(a * b).mean(1) for a, b in pairs], dim=1), _BLOCK_RADIUS)
        xx, xy, yy, xw, yw = sums.unbind(1)
        xx, yy = xx + _DAMPING, yy + _DAMPING
        xw, yw = xw + _DAMPING * flow[:, 0], yw + _DAMPING * flow[:, 1]
        found = torch.stack((yy * xw - xy * yw, xx * yw - xy * xw), dim=1)
        step = found / (xx * yy - xy.square())[:, None] - flow
        flow = flow + step.clamp(-1, 1)
    return flow


def gradient(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences of pictures [..., C, H, W] across and down, of their shape."""
    padded = functional.pad(pictures, (1, 1, 1, 1), mode="replicate")
    x = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    y = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return x, y


def _correlation(here: Tensor, there: Tensor) -> Tensor:
    """Normalised correlation of the blocks around every pixel, all channels together: [P, h, w]."""

    def block(values: Tensor) -> Tensor:
        return _block_mean(values, _BLOCK_RADIUS).mean(1)

    here, there = (part - _block_mean(part, _BLOCK_RADIUS) for part in (here, there))
    norm = (block(here.square()) * block(there.square())).sqrt()
    return block(here * there) / norm.clamp(min=1e-6)
