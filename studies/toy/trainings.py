"""The trainings of the toy study: those before the students, by the recipe of the shipped weights, and the
students: some by DMD and Re-DMD, the others, as the shipped one, by the truth of their own streams."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from recipes.tiny.run import STEPS, Options, run_stage
from recipes.tiny.stages import STAGES, RunDirectory
from recipes.tiny.streams import train_on_streams
from recipes.tiny.training import StageConfig, train
from rfengine.config import EngineConfig
from rfengine.toy.data import LatentDataset, load_dataset
from rfengine.training.build import base_engine, build_stage, export_checkpoint
from rfengine.training.config import TrainConfig
from rfengine.training.parallel import Ranks
from rfengine.training.recipes import toy_dmd, toy_re_dmd
from studies.toy.setting import WITHOUT_EVICTION, Setting, seeded_name, split_model, trained_sink
from studies.toy.streams import with_sink


def train_start(setting: Setting) -> None:
    """All stages of recipes.tiny up to the student's first weights; those that are done stay."""
    size, files = setting.size, RunDirectory(setting.base, setting.base / "export")
    for stage in STAGES[: STAGES.index("streams")]:
        if not files.is_done(stage):
            steps = size.base_steps if stage in STEPS else None
            videos = None if stage in STEPS else size.base_videos
            run_stage(Options(stage, setting.base, steps, videos, device=setting.device.type))


def training_configs(setting: Setting) -> dict[str, TrainConfig]:
    """The trainings of the distilled students by their names; all have the same steps, teacher and start."""
    size, teacher = setting.size, str(setting.checkpoint("teacher"))
    engine, configs = base_engine(teacher), {}
    for seed in size.training_seeds:
        students = {"dmd": toy_dmd(engine, teacher)}
        students |= {f"re_dmd_{beta:g}": toy_re_dmd(engine, teacher, beta) for beta in size.betas}
        for name, config in students.items():
            model = seeded_name(name, seed)
            configs[model] = dataclasses.replace(
                config,
                name=model,
                steps=size.student_steps,
                student=str(setting.checkpoint("start")),
                base=teacher,
                batch=size.batch,
                precision=setting.precision,
                seed=seed,
            )
    return configs


def stream_config(setting: Setting, model: str) -> StageConfig:
    """The training of a student by the truth of its streams, under the sink of its name."""
    engine, seed = base_engine(str(setting.checkpoint("teacher"))), split_model(model)[1]
    engine = dataclasses.replace(engine, cache=with_sink(engine.cache, trained_sink(model)))
    return StageConfig(model, engine, setting.size.stream_steps, seed)


def within_window(videos: LatentDataset, engine: EngineConfig) -> LatentDataset:
    """The beginnings of the videos that fit into the window, so that a stream as long evicts nothing."""
    frames, size = engine.cache.window_frames, engine.cache.chunk_frames
    return dataclasses.replace(
        videos,
        latents=videos.latents[:, :, :frames],
        foreground=videos.foreground[:, :frames],
        text_rows=videos.text_rows[:, : frames // size],
    )


def run_training(setting: Setting, name: str) -> None:
    """Train model `name` to its end, from its newest checkpoint where there is one, and export it."""
    if name in setting.size.distilled:
        config = training_configs(setting)[name]
        engine, ranks = config.engine, Ranks()
        weights = train(config, build_stage(config, setting.device, ranks), setting.directory, ranks)
    else:
        stream = stream_config(setting, name)
        engine, weights = stream.model, _streamed(setting, stream)
    export_checkpoint(weights, engine, str(setting.checkpoint("teacher")), setting.checkpoint(name))


def _streamed(setting: Setting, config: StageConfig) -> dict[str, Tensor]:
    videos, start = load_dataset(setting.base / "videos.pt"), setting.checkpoint("start")
    if split_model(config.name)[0] == WITHOUT_EVICTION:
        videos = within_window(videos, config.model)
    return train_on_streams(config, start, videos, setting.directory, Ranks(), setting.device)
