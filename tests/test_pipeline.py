import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator

import numpy
import pytest
import torch

from rfengine import Pipeline, memory
from rfengine.checkpoint.checkpoint import write_config
from rfengine.checkpoint.loader import read_safetensors, save_weights
from rfengine.config import CacheConfig, RuntimeConfig, TinyVAEConfig
from rfengine.export.tensorrt_decoder import TensorRTDecoder
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.tiny_vae import TinyVAE
from rfengine.ops.reference import frame_pack
from rfengine.runtime import decoders, options
from rfengine.runtime.options import Switch, runtime_switches
from rfengine.tuning import autotune, candidates
from support.models import small_pipeline


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return small_pipeline()


def test_generate_gives_the_frames_asked_for(pipe):
    assert pipe.generate("a circle", num_frames=20).frames.shape == (20, 32, 48, 3)
    assert pipe.generate("a circle", seconds=0.5).frames.shape[0] == 8
    video = pipe.generate("a circle")
    assert video.frames.shape[0] == 81 and video.fps == 16


def test_a_shorter_video_is_the_beginning_of_a_longer_one(pipe):
    long = pipe.generate("a circle", num_frames=40, seed=4).frames
    assert numpy.array_equal(pipe.generate("a circle", num_frames=11, seed=4).frames, long[:11])


def test_generate_and_stream_agree(pipe):
    stream = pipe.stream("a circle", seed=2)
    frames = numpy.concatenate([next(stream).frames for _ in range(2)])
    assert numpy.array_equal(pipe.generate("a circle", num_frames=21, seed=2).frames, frames)


def test_on_chunk_sees_every_chunk_as_it_is_made(pipe):
    seen = []
    pipe.generate(
        "a circle", num_frames=22, on_chunk=lambda chunk: seen.append((chunk.index, len(chunk.frames)))
    )
    assert seen == [(0, 9), (1, 12), (2, 12)]


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ({"seconds": -1.0}, "seconds is -1.0; give a positive length"),
        ({"seconds": float("nan")}, "seconds is nan"),
        (
            {"seconds": 1e308},
            r"seconds is 1e\+308; a video has at most 86400, a day, and a stream has no end",
        ),
        ({"seconds": 1e18}, r"seconds is 1e\+18; a video has at most 86400"),
        ({"seconds": 10**400}, "seconds is an integer of 1329 bits; it must be a finite number"),
        ({"seconds": "5"}, "seconds is '5'; it must be a finite number"),
        (
            {"num_frames": 2**64},
            "num_frames is 18446744073709551616; a video has at most 1382400, a day at 16",
        ),
        ({"num_frames": 20.5}, "num_frames is 20.5; it must be an integer"),
        ({"num_frames": True}, "num_frames is True; it must be an integer"),
        ({"num_frames": 9, "height": 65536}, "height is 65536 pixels; use at most 8192"),
        ({"num_frames": 0}, "num_frames is 0; a video has at least one frame"),
        ({"seconds": 1.0, "num_frames": 5}, "give one of them"),
    ],
)
def test_a_length_that_makes_no_video_is_refused(pipe, length, message):
    with pytest.raises(ValueError, match=message):
        pipe.generate("a circle", **length)


def test_frames_that_memory_cannot_hold_point_to_the_stream(pipe, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**7)
    reason = (
        "holding 1382400 frames of 32 x 48 pixels needs 11.9 GiB and this machine has 0.0 GiB free; ask for"
    )
    with pytest.raises(RuntimeError, match=reason):
        pipe.generate("a circle", seconds=86_400)
    with pytest.raises(RuntimeError, match=r"holding 50000 frames .*; ask for fewer, or take .* stream\(\)"):
        pipe(["a circle"] * 50, num_frames=1000)
    assert next(pipe.stream("a circle")).frames.shape == (9, 32, 48, 3)


def test_a_stream_that_memory_cannot_hold_is_refused_before_it_is_opened(pipe, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 3 * 10**7)
    with pytest.raises(RuntimeError, match="a stream of 8192 x 8192 pixels needs .* choose a smaller height"):
        pipe.stream("a circle", height=8192, width=8192)
    monkeypatch.setattr(memory, "free_memory", lambda device: 10)
    with pytest.raises(RuntimeError, match="a stream of 32 x 48 pixels needs"):
        pipe.stream("a circle")


def test_bad_prompts_and_seeds_are_refused(pipe):
    with pytest.raises(ValueError, match="empty"):
        pipe.generate(" \n ")
    with pytest.raises(ValueError, match="seed is -1"):
        pipe.stream("a circle", seed=-1)


def test_call_gives_every_output_type(pipe):
    arrays = pipe("a circle", num_frames=10, seed=1).frames
    assert arrays.shape == (1, 10, 32, 48, 3) and arrays.dtype == numpy.float32
    assert arrays.min() >= 0 and arrays.max() <= 1
    tensors = pipe("a circle", num_frames=10, seed=1, output_type="pt").frames
    assert torch.equal(tensors.permute(0, 1, 3, 4, 2), torch.from_numpy(arrays))
    images = pipe("a circle", num_frames=10, seed=1, output_type="pil").frames
    assert len(images) == 1 and len(images[0]) == 10 and images[0][0].size == (48, 32)
    latents = pipe("a circle", num_frames=10, seed=1, output_type="latent").frames
    assert latents.shape == (1, 4, 4, 4, 6)
    with pytest.raises(ValueError, match="output_type is 'gif'"):
        pipe("a circle", output_type="gif")


def test_latents_of_the_call_decode_to_its_frames(pipe):
    latents = pipe("a circle", num_frames=9, seed=1, output_type="latent").frames
    frames = frame_pack(pipe.vae.decode(latents)[0]).numpy()
    expected = pipe("a circle", num_frames=9, seed=1).frames[0]
    assert numpy.abs(frames / 255 - expected).max() <= 1 / 255 + 1e-6


def test_several_prompts_make_several_videos(pipe):
    both = pipe(["a circle", "a square"], num_frames=9, seed=1).frames
    assert both.shape[0] == 2
    assert numpy.array_equal(both[1], pipe("a square", num_frames=9, seed=1).frames[0])


def test_a_generator_gives_the_seed_and_advances(pipe):
    generator = torch.Generator().manual_seed(3)
    first, second = (pipe("a circle", num_frames=9, generator=generator).frames for _ in range(2))
    again = pipe("a circle", num_frames=9, generator=torch.Generator().manual_seed(3)).frames
    assert numpy.array_equal(first, again) and not numpy.array_equal(first, second)
    with pytest.raises(ValueError, match="give one of them"):
        pipe("a circle", generator=generator, seed=1)


def test_callback_sees_every_step_and_may_replace_the_latents(pipe):
    steps = []

    def callback(owner, step, timestep, tensors):
        assert owner is pipe
        steps.append((step, round(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step % 2 else None

    frames = pipe("a circle", num_frames=21, callback_on_step_end=callback, output_type="latent").frames
    assert steps == [(0, 1000), (1, 833), (2, 1000), (3, 833)]
    assert torch.equal(frames, torch.zeros_like(frames))


def test_a_source_that_is_nowhere_is_refused():
    with pytest.raises(ValueError, match="no/such/place is no directory"):
        Pipeline.from_pretrained("no/such/place")


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype is 'int8'; use float32, bfloat16, float16"):
        Pipeline.from_pretrained("tiny", dtype="int8")


@pytest.fixture
def saved(pipe, tmp_path):
    """The small pipeline's weights in the engine's own directory layout."""
    write_config(tmp_path, pipe.config)
    save_weights(tmp_path / "transformer.safetensors", pipe.model.state_dict())
    save_weights(tmp_path / "vae.safetensors", pipe.vae.state_dict())
    encoder = pipe.text_encoder._model.state_dict()
    encoder.pop("encoder.embed_tokens.weight")
    save_weights(tmp_path / "text_encoder.safetensors", encoder)
    return tmp_path


def test_a_saved_checkpoint_makes_the_same_frames(pipe, saved):
    default = Pipeline.from_pretrained(saved, "cpu")
    assert default.config == pipe.config and default.backend == "cpu, reference"
    loaded = Pipeline.from_pretrained(saved, backend="reference")  # as pipe, to the bit
    assert loaded.backend == "reference"
    expected = pipe.generate("a circle", num_frames=21).frames
    assert numpy.array_equal(loaded.generate("a circle", num_frames=21).frames, expected)


def test_text_states_are_kept_by_prompt(saved, tmp_path):
    folder = tmp_path / "text"
    expected = Pipeline.from_pretrained(saved, text_cache=folder).generate("a circle", num_frames=9).frames
    assert len(list(folder.iterdir())) == 1
    cached = Pipeline.from_pretrained(saved, text_cache=folder)
    cached.text_encoder._build_model = None
    assert numpy.array_equal(cached.generate("a circle", num_frames=9).frames, expected)


def test_the_cache_configuration_can_be_replaced(saved):
    pipe = Pipeline.from_pretrained(saved, cache=CacheConfig(sink="frozen"))
    assert pipe.config.cache.sink == "frozen"


def test_half_precision_runs_and_stays_near(pipe, saved):
    exact = pipe.generate("a circle", num_frames=9).frames.astype(int)
    half = (
        Pipeline.from_pretrained(saved, dtype="bfloat16")
        .generate("a circle", num_frames=9)
        .frames.astype(int)
    )
    assert numpy.abs(half - exact).mean() < 8


def test_a_checkpoint_without_text_encoder_says_how_to_add_one(saved):
    (saved / "text_encoder.safetensors").unlink()
    with pytest.raises(ValueError, match="rfengine convert SRC DST --base"):
        Pipeline.from_pretrained(saved)


def test_weights_of_another_size_are_refused_by_name(saved):
    save_weights(saved / "transformer.safetensors", {"patch_embedding.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="patch_embedding.weight"):
        Pipeline.from_pretrained(saved)


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_weights_that_are_not_finite_are_refused(saved, part):
    path = saved / f"{part}.safetensors"
    tensors, _ = read_safetensors(path)
    name = next(iter(tensors))
    save_weights(path, tensors | {name: torch.full_like(tensors[name], float("nan"))})
    with pytest.raises(ValueError, match=f"{name} has values that are not finite"):
        Pipeline.from_pretrained(saved)


def test_what_makes_no_request_is_refused(pipe):
    with pytest.raises(ValueError, match="give a text or a list of texts"):
        pipe([])
    with pytest.raises(ValueError, match="seed is 1.5"):
        pipe.stream("a circle", seed=1.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_cuda_device_is_one_sentence():
    with pytest.raises(RuntimeError, match="device is cuda but torch .* sees no CUDA device; use 'cpu'"):
        Pipeline.from_pretrained("tiny", device="cuda")


def test_the_runtime_can_be_replaced(pipe, saved):
    runtime = RuntimeConfig(overlap=True)
    loaded = Pipeline.from_pretrained(saved, runtime=runtime)
    assert loaded.config.runtime == runtime and loaded.vae_tier == "lossless"
    assert Pipeline.from_pretrained(saved).config.runtime == RuntimeConfig()
    for wrong in (RuntimeConfig(graphs=True), RuntimeConfig(decode_device="cuda:1")):
        with pytest.raises(RuntimeError, match="CUDA graphs need a CUDA device|decode_device is cuda:1"):
            Pipeline.from_pretrained(saved, device="cpu", runtime=wrong)


def test_the_tiny_decoder_makes_frames_of_a_lower_tier(saved):
    runtime = RuntimeConfig(vae="tiny")
    with pytest.raises(ValueError, match="z_dim of the tiny decoder is 16 and that of the VAE 4"):
        Pipeline.from_pretrained(saved, runtime=runtime)
    full = Pipeline.from_pretrained(saved)
    tiny_config = TinyVAEConfig(4, (8, 8, 8, 8), 1)
    config = dataclasses.replace(full.config, tiny_vae=tiny_config)
    write_config(saved, config)
    with pytest.raises(ValueError, match="has no tiny_vae"):
        Pipeline.from_pretrained(saved, runtime=runtime)
    torch.manual_seed(0)
    save_weights(saved / "tiny_vae.safetensors", TinyVAE(tiny_config).state_dict())
    tiny = Pipeline.from_pretrained(saved, runtime=runtime)
    assert tiny.vae_tier == "reduced" and full.vae_tier == "lossless"
    frames = tiny.generate("a circle", num_frames=21).frames
    assert frames.shape == (21, 32, 48, 3)
    assert not numpy.array_equal(frames, full.generate("a circle", num_frames=21).frames)
    stream = tiny.stream("a circle")
    snapshot = [next(stream), stream.snapshot()][1]
    assert numpy.array_equal(next(tiny.restore(snapshot)).frames, next(stream).frames)
    with pytest.raises(ValueError, match="the snapshot's decoder is 'tiny', this pipeline's is 'full'"):
        Pipeline.from_pretrained(saved).restore(snapshot)


def test_ops_are_those_that_won_where_autotune_is_on(saved, monkeypatch):
    asked = []

    def tune(shapes, device, requested):
        asked.append((shapes.grid.height, shapes.grid.width, shapes.dtype, device, requested))
        return autotune.Choice()

    def tuning(runtime, device):
        return runtime_switches(runtime, device) | {"autotune": Switch(runtime.autotune, "for the test")}

    monkeypatch.setattr(autotune, "tune", tune)
    monkeypatch.setattr(candidates, "transformer_cases", lambda shapes: shapes)
    monkeypatch.setattr(options, "runtime_switches", tuning)
    Pipeline.from_pretrained(saved, "cpu", "bfloat16")
    assert asked == [(32, 48, torch.bfloat16, torch.device("cpu"), "auto")]
    Pipeline.from_pretrained(saved, "cpu", runtime=RuntimeConfig(autotune=False))
    assert len(asked) == 1
    winners = {"rms_norm": "triton"}
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # a test of a kernel in the same process has set it
    monkeypatch.setattr(
        autotune, "tune", lambda *_, **__: type("Won", (), {"overrides": winners, "folds_gate": True})
    )
    with pytest.raises(RuntimeError, match="'triton' cannot run on cpu"):
        Pipeline.from_pretrained(saved, "cpu")


def test_without_tensorrt_its_decoder_is_one_sentence_before_the_weights_are_read(saved, monkeypatch):
    def absent():
        raise RuntimeError("TensorRT cannot be imported; pip install tensorrt")

    monkeypatch.setattr(decoders, "import_tensorrt", absent)
    (saved / "vae.safetensors").unlink()
    with pytest.raises(RuntimeError, match="TensorRT cannot be imported; pip install"):
        Pipeline.from_pretrained(saved, runtime=RuntimeConfig(vae="tensorrt"))


def test_engines_are_opened_once_for_each_size(pipe, saved, monkeypatch):
    opened = []

    def open_engine(directory, config, grid, dtype, device, graphs):
        chunk_frames = config.cache.chunk_frames
        opened.append((directory, grid.height, grid.width, dtype, device, chunk_frames, graphs))
        return StreamingDecoder(pipe.vae, pipe.model.ops)

    monkeypatch.setattr(decoders, "import_tensorrt", lambda: None)
    monkeypatch.setattr(TensorRTDecoder, "open", open_engine)
    runtime = RuntimeConfig(vae="tensorrt")
    engined = Pipeline.from_pretrained(saved, device="cpu", backend="reference", runtime=runtime)
    assert opened == [] and engined.vae_tier == "lossless"
    expected = pipe.generate("a circle", num_frames=9).frames
    for _ in range(2):
        assert numpy.array_equal(engined.generate("a circle", num_frames=9).frames, expected)
    engined.stream("a circle", height=64)
    assert opened == [
        (saved, height, 48, torch.float32, torch.device("cpu"), 3, False) for height in (32, 64)
    ]


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed in a test has gone with its last reference, not by Python's collector."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def run_and_drop(pipe: Pipeline) -> None:
    stream = pipe.stream("a circle")
    next(stream)
    stream.set_prompt("a square", "recache")
    next(stream)
    pipe.restore(stream.snapshot())
    pipe("a circle", 9, callback_on_step_end=lambda *step: None)


def run_and_close(pipe: Pipeline) -> None:
    stream = pipe.stream("a circle")
    next(stream)
    next(stream)
    stream.close()


def fail_in_a_step(pipe: Pipeline) -> None:
    with pytest.raises(ZeroDivisionError):
        pipe.stream("a circle").advance(lambda *step: 1 / 0)


def fail_in_the_decoder(pipe: Pipeline) -> None:
    with pytest.raises((RuntimeError, ValueError), match="finite"):
        pipe.stream("a circle").advance(lambda step, timestep, latents: latents * float("nan"))


def alive_after(make: Callable[[], Pipeline], use: Callable[[Pipeline], object]) -> list[bool]:
    """Whether the model, the VAE and the text encoder of a pipeline are there once it is dropped."""
    own = make()
    models = [weakref.ref(each) for each in (own.model, own.vae, own.text_encoder)]
    thread = own._engine.queue.thread
    use(own)
    del own
    if thread is not None:
        thread.shutdown()  # waits for it to let go of what it decoded last
    return [model() is not None for model in models]


def fail_in_the_decoder_with_a_chunk_ahead(pipe: Pipeline) -> None:
    stream = pipe.stream("a circle")
    next(stream)
    pipe.model.patch_embedding.weight.data.fill_(float("nan"))
    with pytest.raises((RuntimeError, ValueError), match="finite"):
        next(stream)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "use",
    [
        run_and_drop,
        run_and_close,
        fail_in_a_step,
        fail_in_the_decoder,
        fail_in_the_decoder_with_a_chunk_ahead,
    ],
)
def test_a_dropped_pipeline_frees_its_models_at_once(pipe, use, overlap):
    config = dataclasses.replace(pipe.config, runtime=RuntimeConfig(overlap=overlap))

    def make() -> Pipeline:
        parts = (copy.deepcopy(part) for part in (pipe.model, pipe.vae, pipe.text_encoder))
        return Pipeline(config, *parts, "small-0")

    assert alive_after(make, use) == [False, False, False]


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("runtime", [RuntimeConfig(), RuntimeConfig(vae="tiny", overlap=True)])
def test_a_dropped_pipeline_of_a_checkpoint_frees_its_models_at_once(runtime):
    def make() -> Pipeline:
        return Pipeline.from_pretrained("tiny", "cpu", runtime=runtime)

    assert alive_after(make, lambda pipe: next(pipe.stream("a circle"))) == [False, False, False]
