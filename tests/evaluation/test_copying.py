"""Copying of the first frames, beyond the likeness of independent videos."""

from __future__ import annotations

import pytest

from rfengine.evaluation.copying import SinkTrace, measure_copying, trace_sink
from rfengine.evaluation.video_frames import NotMeasurableError
from rfengine.toy.world import Scene
from support.distortions import CLIPS, SCENE, copied_start, distorted, textured_clip, toy_clip


def independent(clip: str) -> list[SinkTrace]:
    if clip == "textured":
        return [trace_sink(textured_clip(seed=seed)) for seed in (3, 4, 5)]
    moved = [
        Scene(SCENE.objects, SCENE.motion, SCENE.speed, SCENE.direction, SCENE.background, (shift, 0.0))
        for shift in (-40.0, 0.0, 40.0)
    ]
    return [trace_sink(toy_clip(scene=scene)) for scene in moved]


@pytest.mark.parametrize("clip", CLIPS)
def test_the_more_of_the_start_comes_back_the_more_is_copied(clip: str) -> None:
    others = independent(clip)
    video = distorted(clip, "true")
    traces = [trace_sink(copied_start(video, share)) for share in (0, 0.3, 0.6, 0.9)]
    found = [measure_copying(trace, others)["copying_excess"] for trace in traces]
    assert found[0] < found[1] < found[2] < found[3]
    assert found[0] < 0.1 and found[3] > 0.45


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("distortion", ["gamma", "tint", "pulse", "noise"])
def test_drift_and_flicker_are_no_copying(clip: str, distortion: str) -> None:
    others = independent(clip)
    true = measure_copying(trace_sink(distorted(clip, "true")), others)["copying_excess"]
    found = measure_copying(trace_sink(distorted(clip, distortion)), others)["copying_excess"]
    assert found == pytest.approx(true, abs=0.05)


def test_a_still_video_copies_its_start_fully() -> None:
    found = measure_copying(trace_sink(distorted("textured", "frozen")), independent("textured"))
    assert found["copying_likeness"] == pytest.approx(1, abs=1e-4) and found["copying_excess"] > 0.7


def test_videos_of_several_sizes_are_compared() -> None:
    found = measure_copying(trace_sink(textured_clip()), [trace_sink(toy_clip())])
    assert -1 <= found["copying_baseline"] <= 1


def test_without_another_video_or_with_a_short_one_there_is_no_copying() -> None:
    with pytest.raises(NotMeasurableError, match="no other video"):
        measure_copying(trace_sink(textured_clip()), [])
    with pytest.raises(NotMeasurableError, match="41 frames are too few; copying needs 42"):
        trace_sink(textured_clip(41))
