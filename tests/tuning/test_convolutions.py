"""Every layer shape of the decoder has its case; a cuDNN that is wrong at one of them is refused there."""

from __future__ import annotations

import dataclasses
import json
import logging
from functools import cache

import pytest
import torch

from rfengine.config import RuntimeConfig
from rfengine.grid import LatentGrid
from rfengine.ops import choose_ops
from rfengine.ops.table import implementation
from rfengine.presets import PRESETS
from rfengine.tuning import candidates as tuning_candidates
from rfengine.tuning import convolutions
from rfengine.tuning.autotune import tune
from rfengine.tuning.candidates import TuningShapes
from rfengine.tuning.convolutions import convolution_shapes, decoder_cases
from support.models import GRID, small_config

CPU = torch.device("cpu")
CONFIG = small_config()  # 8, 8, 4 and 4 channels at 4 x 6 latents
WRONG_KEY = "causal_conv3d@8x8x3x3x3x4x6"
PHASE_KEY = "phase_conv@2x2x4x8x2x2x4x6"


@pytest.fixture(scope="module", autouse=True)
def shapes_are_computed_once_for_each_size():
    """The decoder runs on the meta device for them, which takes a fifth of a second each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolutions, "convolution_shapes", cache(convolution_shapes))
        yield


def shapes_of(config, height=None, dtype=torch.bfloat16):
    shapes = TuningShapes(config, LatentGrid.of(config, height), dtype, CPU)
    return {shape.key: frames for shape, frames in convolutions.convolution_shapes(shapes).items()}


def test_shapes_are_those_of_every_layer_at_the_streams_size():
    config = PRESETS["wan-1.3b"]
    assert shapes_of(config) == {
        "causal_conv3d@384x16x3x3x3x60x104": [3],
        "causal_conv3d@384x384x3x3x3x60x104": [3],
        "causal_conv3d@384x384x3x1x1x60x104": [2, 3],
        "phase_conv@2x2x192x384x2x2x60x104": [5, 6],
        "causal_conv3d@384x192x3x3x3x120x208": [5, 6],
        "causal_conv3d@384x384x3x3x3x120x208": [5, 6],
        "causal_conv3d@384x384x3x1x1x120x208": [4, 6],
        "phase_conv@2x2x192x384x2x2x120x208": [9, 12],
        "causal_conv3d@192x192x3x3x3x240x416": [9, 12],
        "phase_conv@2x2x96x192x2x2x240x416": [9, 12],
        "causal_conv3d@96x96x3x3x3x480x832": [9, 12],
    }
    assert [key for key in shapes_of(config, 240) if key.endswith("x240x832")] == [
        "causal_conv3d@96x96x3x3x3x240x832"
    ]


def test_convolutions_in_fp8_are_in_no_case():
    config = dataclasses.replace(PRESETS["wan-1.3b"], runtime=RuntimeConfig(vae_precision="fp8"))
    left = set(shapes_of(PRESETS["wan-1.3b"])) - set(shapes_of(config))
    assert left == {
        "causal_conv3d@384x384x3x3x3x120x208",
        "causal_conv3d@192x192x3x3x3x240x416",
        "causal_conv3d@96x96x3x3x3x480x832",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_convolutions_pass_and_one_wrong_frame_does_not(dtype):
    frames = shapes_of(CONFIG, dtype=dtype)
    for case in decoder_cases(TuningShapes(CONFIG, GRID, dtype, CPU)):
        op = case.key.name.partition("@")[0]
        arguments = case.make_inputs(torch.Generator().manual_seed(0))
        for run in (case.meaning, implementation(op, "cudnn")):
            assert case.check(run, arguments) == "", case.key
        first = frames[case.key.name][0]

        def spoiled(*arguments, meaning=case.meaning):
            result = meaning(*arguments)
            result[-1, 1, 2, 0] *= -9
            return result

        assert f"frame {first - 1} of {first} is" in case.check(spoiled, arguments), case.key


def test_wrong_only_with_the_frames_of_the_first_chunk_is_wrong():
    held = decoder_cases(TuningShapes(CONFIG, GRID, torch.float32, CPU))
    case = next(each for each in held if "9 frames" in each.key.depends_on)

    def first_is_wrong(x, *rest):
        result = case.meaning(x, *rest)
        return 2 * result if result.shape[0] == 9 else result

    arguments = case.make_inputs(torch.Generator().manual_seed(0))
    assert "frame 0 of 9 is" in case.check(first_is_wrong, arguments)


class FakeLibrary:
    """A cuDNN that is right but for one shape, and the kernels of Triton, both on the CPU; counts calls."""

    def __init__(self, monkeypatch, wrong=WRONG_KEY):
        self.calls = []
        # the last sizes of the wrong key are those of x
        sizes = [int(size) for size in wrong.partition("@")[2].split("x")]

        def candidates(op, device, dtype):
            def cudnn(x, weight, *rest):
                self.calls.append(op)
                result = implementation(op, "cudnn")(x, weight, *rest)
                if [*weight.shape, *x.shape[1:3]] == sizes:
                    result[0, 0, 0] += 1
                return result

            def triton(*arguments):
                return implementation(op, "reference")(*arguments)

            return {"triton": triton, "cudnn": cudnn}

        monkeypatch.setattr("rfengine.tuning.convolutions.runnable", candidates)


class Clock:
    """cudnn takes one millisecond less than triton."""

    def __init__(self):
        self.timed = []

    def __call__(self, run, sets):
        self.timed.append(run.__name__)
        return lambda: {"triton": 2.0, "cudnn": 1.0}[run.__name__]


def tuned(path, clock=None, **options):
    cases = decoder_cases(TuningShapes(CONFIG, GRID, torch.float32, CPU))
    return tune(cases, CPU, cache_path=path, timer=clock or Clock(), **options)


def test_a_backend_that_is_wrong_at_one_shape_is_refused_there_alone(monkeypatch, tmp_path, caplog):
    FakeLibrary(monkeypatch)
    clock = Clock()
    with caplog.at_level(logging.INFO):
        choice = tuned(tmp_path / "a.json", clock)
    shapes = shapes_of(CONFIG, dtype=torch.float32)
    assert choice.overrides == {key: "triton" if key == WRONG_KEY else "cudnn" for key in shapes}
    assert f"{WRONG_KEY} at 3x4x6 in float32: triton" in caplog.text
    assert "cudnn refused: frame 0 of 3 is" in caplog.text
    stored = json.loads((tmp_path / "a.json").read_text())["decisions"]
    (refused,) = [entry["refused"] for entry in stored if entry["refused"]]
    assert "the limit is" in refused["cudnn"] and len(stored) == len(shapes)
    assert clock.timed.count("cudnn") == clock.timed.count("triton") - 1
    again = Clock()
    assert tuned(tmp_path / "a.json", again) == choice and again.timed == []


@pytest.mark.parametrize(
    "options",
    [{"requested": "cudnn"}, {"forced": {"causal_conv3d": "cudnn"}}, {"forced": {WRONG_KEY: "cudnn"}}],
    ids=["requested", "forced op", "forced shape"],
)
def test_a_refused_backend_that_is_asked_for_is_an_error(monkeypatch, tmp_path, options):
    library = FakeLibrary(monkeypatch)
    with pytest.raises(RuntimeError, match=f"backend 'cudnn' is asked for and refused for {WRONG_KEY}"):
        tuned(tmp_path / "a.json", **options)
    before = len(library.calls)
    with pytest.raises(RuntimeError, match="frame 0 of 3 is .* use 'auto'"):  # this time from the file
        tuned(tmp_path / "a.json", **options)
    assert len(library.calls) == before


def test_what_autotune_found_wrong_is_wrong_when_it_is_asked_for(monkeypatch, tmp_path):
    library = FakeLibrary(monkeypatch)
    tuned(tmp_path / "a.json")
    before = len(library.calls)
    with pytest.raises(RuntimeError, match="refused for"):
        tuned(tmp_path / "a.json", requested="cudnn")
    assert len(library.calls) == before


def test_a_right_backend_that_is_asked_for_is_not_timed(monkeypatch, tmp_path):
    FakeLibrary(monkeypatch, wrong="causal_conv3d@1x1")
    clock = Clock()
    assert tuned(tmp_path / "a.json", clock, requested="cudnn").overrides == {} and clock.timed == []
    forced = {PHASE_KEY: "cudnn", "causal_conv3d": "reference"}
    choice = tuned(tmp_path / "b.json", clock, forced=forced)
    assert choice.overrides.items() >= forced.items()
    assert all(key in forced or key.startswith("phase") for key in choice.overrides)


def test_the_native_convolution_is_a_candidate_where_it_serves_the_shape(monkeypatch):
    monkeypatch.setattr(
        convolutions,
        "runnable",
        lambda op, *_: dict.fromkeys(("triton", "native"), implementation(op, "cudnn")),
    )

    def offered(dtype, capability=None, device=CPU):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        cases = decoder_cases(TuningShapes(PRESETS["wan-1.3b"], GRID, dtype, device))
        return {case.key.name.rpartition("x3x3x3x")[0] for case in cases if "native" in case.candidates}

    served = {
        "384x384",
        "384x192",
        "192x192",
        "96x96",
    }  # out and in; not from 16 channels nor over time alone
    assert offered(torch.float16) == {f"causal_conv3d@{sizes}" for sizes in served}
    assert offered(torch.float32) == set()
    cuda = torch.device("cuda", 0)
    assert offered(torch.float16, (9, 0), cuda) == offered(torch.float16)
    assert offered(torch.float16, (8, 0), cuda) == offered(torch.float16, (10, 0), cuda) == set()


def test_a_cpu_measures_nothing_and_a_device_alone_has_no_case(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # a test of a kernel in the same process has set it
    unread = decoder_cases(TuningShapes(CONFIG, GRID, torch.float32, CPU))
    assert tune(unread, "cpu").decisions == () and next(unread).key.name in shapes_of(CONFIG)
    choice = tuned(tmp_path / "a.json")
    assert set(choice.overrides.values()) == {"reference"} and not (tmp_path / "a.json").exists()
    ops = choose_ops("auto", "cpu", choice.overrides)
    assert ops.choice[WRONG_KEY] == "reference"


def test_the_backends_of_a_case_are_those_that_can_run(monkeypatch):
    monkeypatch.setattr(tuning_candidates, "backend_reasons", lambda _: {"triton": "", "cudnn": ""})
    monkeypatch.setattr(tuning_candidates, "default_choice", lambda *_: {"phase_conv": "triton"})
    assert list(tuning_candidates.runnable("phase_conv", CPU, torch.float32)) == ["triton", "cudnn"]


@pytest.mark.gpu
def test_a_gpu_decides_every_convolution_and_remembers(tmp_path):
    config, path = PRESETS["tiny"], tmp_path / "autotune.json"
    shapes = TuningShapes(config, LatentGrid.of(config), torch.bfloat16, torch.device("cuda"))
    choice = tune(decoder_cases(shapes), "cuda", cache_path=path)
    assert set(choice.overrides) == set(shapes_of(config))
    choose_ops("auto", "cuda", choice.overrides)
    assert tune(decoder_cases(shapes), "cuda", cache_path=path) == choice
