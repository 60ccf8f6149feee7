"""The trainings of the toy study: those before the students, by the recipe of the shipped weights, and the
students."""

from __future__ import annotations

import dataclasses

from recipes.tiny.run import STEPS, Options, run_stage
from recipes.tiny.stages import STAGES, RunDirectory
from rfengine.training.build import base_engine, build_stage, export_checkpoint
from rfengine.training.checkpoints import locked_run
from rfengine.training.config import TrainConfig
from rfengine.training.parallel import Ranks
from rfengine.training.recipes import toy_dmd, toy_dmd_no_eviction, toy_re_dmd
from rfengine.training.samples import averaged_state
from rfengine.training.trainer import Trainer
from studies.toy.setting import TRAINED_SINKS, WITHOUT_EVICTION, Setting, seeded_name
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
    """The students' trainings by the name of their model; all have the same steps, teacher and start."""
    size, teacher = setting.size, str(setting.checkpoint("teacher"))
    engine, configs = base_engine(teacher), {}
    for seed in size.training_seeds:
        students = {"dmd": toy_dmd(engine, teacher), WITHOUT_EVICTION: toy_dmd_no_eviction(engine, teacher)}
        students |= {f"re_dmd_{beta:g}": toy_re_dmd(engine, teacher, beta) for beta in size.betas}
        for sink in TRAINED_SINKS:
            changed = dataclasses.replace(engine, cache=with_sink(engine.cache, sink))
            students[f"dmd_{sink}"] = toy_dmd(changed, teacher)
        for name, config in students.items():
            configs[seeded_name(name, seed)] = dataclasses.replace(
                config,
                steps=size.student_steps,
                student=str(setting.checkpoint("start")),
                base=teacher,
                batch=size.batch,
                precision=setting.precision,
                seed=seed,
            )
    return configs


def run_training(setting: Setting, name: str) -> None:
    """Train model `name` to its end, from its newest checkpoint where there is one, and export it with the
    window that all stream with."""
    config, ranks = training_configs(setting)[name], Ranks()
    with locked_run(setting.directory / name):
        stage = build_stage(config, setting.device, ranks)
        Trainer(config, stage, setting.directory / name, ranks).finish("with the same command")
        engine, window = config.engine, base_engine(config.base).cache.window_frames
        streams = dataclasses.replace(engine, cache=dataclasses.replace(engine.cache, window_frames=window))
        export_checkpoint(averaged_state(stage), streams, config.base, setting.checkpoint(name))
