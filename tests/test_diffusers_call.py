"""Calls as scripts for a Diffusers pipeline make them: they work, or a sentence says what is not there."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

from rfengine import Pipeline, pipeline
from rfengine.diffusers_call import requested_videos
from rfengine.schedule import MAX_SEED
from support.models import small_pipeline


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return small_pipeline()


def frames_of(pipe: Pipeline, prompt: str, seed: int) -> numpy.ndarray:
    return pipe(prompt, num_frames=9, seed=seed).frames[0]


@pytest.mark.parametrize("seed", [numpy.int64(5), numpy.uint8(5), torch.tensor(5), torch.tensor([[5]])])
def test_integers_of_numpy_and_torch_are_seeds(pipe, seed):
    assert numpy.array_equal(frames_of(pipe, "a circle", seed), frames_of(pipe, "a circle", 5))
    assert type(pipe.stream("a circle", seed=seed).snapshot().info["seed"]) is int


@pytest.mark.parametrize(
    "seed", [True, 5.0, numpy.float32(5), "5", -1, MAX_SEED + 1, 2**64 - 1, 10**1000, torch.tensor([1, 2])]
)
def test_what_is_no_seed_is_refused_in_one_sentence(pipe, seed):
    for call in (lambda: pipe("a circle", num_frames=9, seed=seed), lambda: pipe.stream("a", seed=seed)):
        with pytest.raises(ValueError, match="^seed is .*integer") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_list_of_generators_gives_each_video_its_own_seed(pipe):
    prompts = ["a circle", "a square"]

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(number) for number in (1, 2)]

    both = pipe(prompts, num_frames=9, generator=generators()).frames
    for video, prompt, generator in zip(both, prompts, generators(), strict=True):
        assert numpy.array_equal(video, pipe(prompt, num_frames=9, generator=generator).frames[0])
    with pytest.raises(ValueError, match="there are 2 generators for 1 videos; give one, or one for each"):
        pipe("a circle", generator=generators())
    for wrong in ([None, None], 3, ["a", torch.Generator()]):
        with pytest.raises(ValueError, match="^generator is .*; give a torch.Generator or a list of them"):
            pipe(prompts, generator=wrong)


def test_several_videos_of_a_prompt_stand_together_and_differ(pipe):
    assert requested_videos(["a", "b"], 2, None, 7) == [("a", 7), ("a", 8), ("b", 7), ("b", 8)]
    drawn = requested_videos(("a", "b"), 2, torch.Generator().manual_seed(3), None)
    assert [text for text, _ in drawn] == ["a", "a", "b", "b"] and len({seed for _, seed in drawn}) == 4
    assert drawn[:1] == requested_videos("a", 1, torch.Generator().manual_seed(3), None)
    found = pipe("a circle", num_frames=9, seed=1, num_videos_per_prompt=2).frames
    assert numpy.array_equal(found[1], frames_of(pipe, "a circle", 2)) and found.shape[0] == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"negative_prompt": "blurry"}, "negative_prompt is 'blurry'; the model is distilled"),
        ({"guidance_scale": 5.0}, "guidance_scale is 5.0; the model is distilled"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"num_inference_steps": 50}, "num_inference_steps is 50; the model was distilled to 2 steps"),
        ({"num_inference_steps": 2.0}, "num_inference_steps is 2.0; it must be an integer"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt is 0"),
        ({"num_frames": 9.0}, "num_frames is 9.0; it must be an integer"),
        ({"prompt": None}, "prompt is None; give a text or a list of texts"),
        ({"prompt": []}, "give a text or a list of texts"),
        ({"prompt": 3}, "prompt is 3; give a text"),
        ({"prompt": ["a circle", ""]}, "prompt 1 '' is empty"),
        ({"prompt": ["a circle", None]}, "prompt 1 is None; give a text"),
        ({"seed": 1, "generator": torch.Generator()}, "give one of them"),
        ({"height": 60}, "height is 60 pixels; it must be a multiple of 16"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_said_before_anything_is_made(pipe, monkeypatch, given, message):
    monkeypatch.setattr(pipeline, "make_video", lambda *_: pytest.fail("a video was begun"))
    with pytest.raises(ValueError, match=message):
        pipe(**({"prompt": "a circle", "num_frames": 9} | given))


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ({}, (1, 9, 32, 48, 3)),
        ({"prompt": ("a circle", "a square")}, (2, 9, 32, 48, 3)),
        ({"num_frames": numpy.int64(9)}, (1, 9, 32, 48, 3)),
        ({"num_frames": 1}, (1, 1, 32, 48, 3)),
        ({"num_frames": 10}, (1, 10, 32, 48, 3)),
        ({"height": numpy.int64(48), "width": 32}, (1, 9, 48, 32, 3)),
        ({"guidance_scale": 1.0, "negative_prompt": "", "num_inference_steps": 2}, (1, 9, 32, 48, 3)),
    ],
)
def test_what_is_there_works(pipe, given: dict[str, Any], shape):
    assert pipe(**({"prompt": "a circle", "num_frames": 9} | given)).frames.shape == shape


def test_the_result_is_a_tuple_too(pipe):
    (frames,) = pipe("a circle", num_frames=9, return_dict=False)
    assert numpy.array_equal(frames, pipe("a circle", num_frames=9)[0])


def test_moving_to_where_the_pipeline_is_changes_nothing_and_elsewhere_is_refused(pipe):
    assert pipe.to("cpu") is pipe.to(torch.device("cpu")) is pipe
    with pytest.raises(ValueError, match="the pipeline is on cpu and does not move to 'cuda'; load it with"):
        pipe.to("cuda")


def test_a_stream_refuses_what_is_no_prompt(pipe):
    stream = pipe.stream("a circle")
    for wrong in (None, 3, ["a circle"], "a\0b", "\ud800"):
        with pytest.raises(ValueError, match="^the prompt"):
            pipe.stream(wrong)
        with pytest.raises(ValueError, match="^the prompt"):
            stream.set_prompt(wrong)
    assert len(next(stream).frames) == 9
