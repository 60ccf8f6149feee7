"""One video's report: each metric is there or has its reason, and dynamics never stand without drift."""

from __future__ import annotations

import pytest
import torch

from rfengine.evaluation.copying import trace_sink
from rfengine.evaluation.report import METRICS
from rfengine.evaluation.video_frames import ChunkGrid
from rfengine.evaluation.video_report import VideoReport, measure_video, with_copying
from rfengine.toy.captions import caption
from rfengine.toy.world import Scene, SceneObject, WorldConfig, render
from support.distortions import SCENE, as_frames, distorted, textured_clip, toy_clip

FEW = (ChunkGrid(), 2)  # pairs of frames whose flow is measured


@pytest.mark.parametrize("frames", [1, 20, 21, 30, 48, 60])
def test_a_short_video_has_fewer_metrics_and_a_reason_for_each_it_lacks(frames: int) -> None:
    report, trace = measure_video("a", textured_clip(frames), *FEW)
    assert ("speed" in report.values) == ("exposure_drift" in report.values) == (frames >= 21)
    assert ("dynamics and drift" in report.absent) == (frames < 21)
    assert ("consistency" in report.absent) == (frames < 24)
    assert ("flicker" in report.absent) == (frames < 48) and ("repetition" in report.absent) == (frames < 49)
    assert ("copying" in report.absent) == (trace is None) == (frames < 42)


def test_a_long_video_with_caption_and_latents_has_every_metric_but_switches() -> None:
    generator = torch.Generator().manual_seed(0)
    first, trace = measure_video(
        "a",
        toy_clip(69, SCENE, WorldConfig()),
        *FEW,
        captions=[(0, caption(SCENE))],
        latents=torch.randn(4, 18, 8, 8, generator=generator),
    )
    second, other = measure_video("b", textured_clip(69), *FEW)
    assert not first.absent and first.captions == (caption(SCENE),)
    done = with_copying([first, second], [trace, other])
    missing = set(METRICS) - set(done[0].values) - {"switch_delay", "switch_failures", "repetition_lag"}
    assert missing == set() and set(done[0].values) <= set(METRICS)
    assert done[0].values["toy_permanence"] == 1


def test_copying_is_reckoned_against_baselines_then_equal_captions_then_all_others() -> None:
    videos = [distorted("textured", "frozen"), textured_clip(69, seed=3), textured_clip(69, seed=4)]
    reports = [VideoReport(str(index), 69, 48, 64, (), {}, {}, {}) for index in range(3)]
    traces = [trace_sink(video) for video in videos]

    def baseline(*extra) -> float:
        return with_copying(reports, traces, *extra)[0].values["copying_baseline"]

    alone = [
        with_copying([reports[0], reports[place]], [traces[0], traces[place]])[0].values["copying_baseline"]
        for place in (1, 2)
    ]
    assert baseline() == pytest.approx(sum(alone) / 2)
    assert baseline([traces[1]]) == pytest.approx(alone[0])
    single = with_copying(reports[:1], traces[:1])[0]
    assert "copying_excess" not in single.values and "no other video" in single.absent["copying"]


def test_switches_are_judged_one_after_the_other() -> None:
    other = Scene((SceneObject("blue", "circle", "large"),), "moving", "slowly", "left", "grey wall")
    frames = as_frames(torch.cat((render(SCENE, 40), render(other, 40, 40), render(other, 40, 80))))
    captions = [(0, caption(SCENE)), (40, caption(other)), (80, caption(SCENE))]
    report, _ = measure_video("a", frames, *FEW, captions=captions)
    # the first switch is done at once, the second never within its 40 frames
    assert report.values["switch_delay"] == (0 + 40) / 2 and report.values["switch_failures"] == 0.5


def test_switches_in_a_video_of_another_size_are_absent_and_the_rest_is_measured() -> None:
    captions = [(0, caption(SCENE)), (12, caption(SCENE))]
    odd = torch.zeros(30, 40, 64, 3, dtype=torch.uint8)
    report, _ = measure_video("a", odd, *FEW, captions=captions)
    assert "40 x 64; the toy world has multiples of 16" in report.absent["prompt switch"]
    assert "consistency_near" in report.values


def test_a_caption_of_no_toy_world_is_an_error() -> None:
    with pytest.raises(ValueError, match="'a cat' has no word of the toy world"):
        measure_video("a", textured_clip(24), *FEW, captions=[(0, "a cat")])
