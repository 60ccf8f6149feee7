"""What a training needs, from its TrainConfig alone: memory of one rank and FLOPs of one step.

Nothing is loaded or allocated: weights are counted from shapes, and the VAE by running its code without data.
A multiply-add is two FLOPs; norms, rotations and the optimizer are not counted. What autograd keeps of a
block is an estimate: 18 tensors of the model's width and two of the feed-forward's for every token.
D model dim, T tokens, S keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean

from rfengine.config import WanConfig
from rfengine.costs.memory import parameter_count
from rfengine.costs.training import adapter_parameters, clip_flops, decode_flops, pass_flops, text_flops
from rfengine.grid import LatentGrid
from rfengine.training.config import TrainConfig

_KEPT_OF_WIDTH, _KEPT_OF_FFN = 18, 2  # tensors of a block that backward reads
_ARENAS = 3  # raw keys, rotated keys, values
_VAE_LIVE = 4  # tensors of full resolution that the decoder has at once
_REWARD_PARAMETERS = 2.2e9  # of the published reward model, vision tower included
_REWARD_TOKENS = 2300  # of its video and its prompt text, at two frames a second
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """Bytes of one model on one rank."""

    name: str
    parameters: int
    weights: float
    gradients: float = 0.0
    moments: float = 0.0
    average: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.moments + self.average


@dataclass(frozen=True, slots=True)
class ResourcePlan:
    """models: what stays for the whole training. group: ranks that hold one copy of the weights together.
    phases: by name, the further bytes at the worst moment of a part of a step. flops: by name, of one step on
    average, over all ranks."""

    name: str
    ranks: int
    group: int
    models: tuple[ModelMemory, ...]
    phases: dict[str, dict[str, float]]
    flops: dict[str, float]

    @property
    def resident(self) -> float:
        return sum(model.total for model in self.models)

    @property
    def peak(self) -> float:
        """Bytes of one rank at the worst moment."""
        return self.resident + max(sum(phase.values()) for phase in self.phases.values())

    @property
    def step_flops(self) -> float:
        return sum(self.flops.values())

    def render(self) -> str:
        copies = ""
        if 1 < self.group < self.ranks:
            copies = f", {self.ranks // self.group} copies of the weights, each on {self.group}"
        lines = [f"{self.name}: memory of one of {self.ranks} rank(s){copies}, GiB"]
        lines.append(f"  {'':<26}{'weights':>9}{'gradients':>11}{'moments':>9}{'average':>9}")
        for model in self.models:
            lines.append(
                f"  {model.name:<14}{model.parameters / 1e9:>10.3f} G {model.weights / _GIB:>8.2f}"
                f"{model.gradients / _GIB:>11.2f}{model.moments / _GIB:>9.2f}{model.average / _GIB:>9.2f}"
            )
        for name, phase in self.phases.items():
            parts = ", ".join(f"{part} {size / _GIB:.2f}" for part, size in phase.items())
            lines.append(f"  {name}: {sum(phase.values()) / _GIB:.2f} ({parts})")
        lines.append(f"  most at once: {self.peak / _GIB:.2f}")
        lines.append(f"work of one step, TFLOP, all ranks: {self.step_flops / 1e12:.3f}")
        lines += [f"  {name:<26}{count / 1e12:>12.3f}" for name, count in self.flops.items()]
        return "\n".join(lines)

    def check(self, available: float, place: str) -> None:
        """Raises RuntimeError, with the numbers, when the plan is more than the memory there is."""
        if self.peak > available:
            raise RuntimeError(
                f"{self.name} needs {self.peak / _GIB:.1f} GiB on a rank and {place} has "
                f"{available / _GIB:.1f} GiB; use more ranks with --parallel sharded, more --shard-ranks, a "
                "smaller --batch, --offload-teacher or --lora-rank"
            )


def plan_resources(config: TrainConfig, ranks: int, group: int, device_type: str) -> ResourcePlan:
    """The plan of `config` shared by `ranks` on devices of this type, of which `group` hold one copy of the
    weights together (parallel.group_size)."""
    engine, distils = config.engine, config.stage in ("dmd", "re-dmd")
    active = 2 if config.precision == "bfloat16" else 4  # bytes of an activation
    halved = 2 if device_type == "cuda" else 4  # of a weight of the VAE and the text encoder
    frozen = max(active, halved)  # of a weight of the teacher
    models = [_learner_memory("student", engine.model, config, group)]
    if distils:
        models.append(_learner_memory("critic", config.critic_model or engine.model, config, group))
        count = parameter_count(config.teacher_model or engine.model)
        models.append(ModelMemory("teacher", count, 0 if config.offload_teacher else frozen * count / group))
    for name, part in (("VAE", engine.vae), ("text encoder", engine.text)):
        models.append(ModelMemory(name, parameter_count(part), halved * parameter_count(part)))
    if config.stage == "re-dmd" and config.reward != "toy":
        models.append(ModelMemory("reward", int(_REWARD_PARAMETERS), 2 * _REWARD_PARAMETERS))
    if distils:
        phases, flops = _distillation_phases(config, group, active, halved), _distillation_flops(config)
    else:
        phases = {"update": {"activations": _clip_activations(engine.model, config, active)}}
        work = config.batch * config.accumulation * clip_flops(engine, engine.model, config.clip_frames)
        flops = {"forward": work, "backward": (3 if config.checkpointing else 2) * work}
    return ResourcePlan(config.name, ranks, group, tuple(models), phases, flops)


def _learner_memory(name: str, shape: WanConfig, config: TrainConfig, group: int) -> ModelMemory:
    count = parameter_count(shape)
    adapters = 0 if config.lora_rank is None else adapter_parameters(shape, config.lora_rank)
    trained, whole = (adapters or count) / group, 4 * (count + adapters) / group
    return ModelMemory(name, count, whole, 4 * trained, 8 * trained, 0 if name == "critic" else whole)


def _block_activations(shape: WanConfig, tokens: int, size: int) -> float:
    return size * tokens * (_KEPT_OF_WIDTH * shape.dim + _KEPT_OF_FFN * shape.ffn_dim)


def _clip_activations(shape: WanConfig, config: TrainConfig, size: int) -> float:
    """What a pass with gradient over whole clips keeps."""
    tokens = config.batch * config.clip_frames * LatentGrid.of(config.engine).frame_tokens
    block = _block_activations(shape, tokens, size)
    if config.checkpointing:
        return block + shape.num_layers * 2 * size * tokens * shape.dim
    return shape.num_layers * block


def _gathered_weights(shapes: tuple[WanConfig, ...], size: int) -> float:
    """What ranks that share these models gather of them: two blocks of the largest, the one that runs and the
    one after it, and of each what is outside of blocks, which stays (parallel.shard)."""
    blocks, others = [], 0
    for shape in shapes:
        one, two = (parameter_count(replace(shape, num_layers=layers)) for layers in (1, 2))
        blocks.append(two - one)
        others += one - blocks[-1]
    return size * (2 * max(blocks) + others)


def _distillation_phases(
    config: TrainConfig, group: int, active: int, halved: int
) -> dict[str, dict[str, float]]:
    engine, shape, rollout = config.engine, config.engine.model, config.rollout
    critic, teacher = config.critic_model or shape, config.teacher_model or shape
    size = max(active, halved)  # of a weight that is gathered, or brought from the CPU
    tokens = config.batch * LatentGrid.of(engine).frame_tokens  # of one latent frame
    arena = active * shape.num_layers * tokens * engine.cache.window_frames * shape.dim
    learned = min(rollout.gradient_chunks, rollout.max_chunks)
    block = _block_activations(shape, tokens * engine.cache.chunk_frames, active)
    pixels = engine.cache.chunk_frames * engine.vae.temporal_stride * engine.height * engine.width
    decoded = config.batch * pixels if config.stage == "re-dmd" else 0
    cast = 0 if active == 4 or config.parallel != "replicated" else 2 * parameter_count(shape)
    brought = config.offload_teacher and group == 1
    gathered = _gathered_weights((shape, critic, teacher), size) if group > 1 else 0
    student = {
        "cache": _ARENAS * arena,
        "windows kept": 2 * arena * learned,
        "activations": (1 if rollout.checkpointing else learned) * (shape.num_layers * block + 2 * arena),
        "weights cast": cast,
        "decoding": halved * _VAE_LIVE * engine.vae.base_dim * decoded,
        "weights gathered": gathered,
        "teacher": size * parameter_count(teacher) if brought else 0,
    }
    critic_update = {
        "activations": _clip_activations(critic, config, active),
        "weights cast": cast,
        "weights gathered": gathered,
    }
    return {"student update": student, "critic update": critic_update}


def _distillation_flops(config: TrainConfig) -> dict[str, float]:
    engine, shape, rollout = config.engine, config.engine.model, config.rollout
    samples = config.batch * config.accumulation
    students = samples / config.critic_updates  # the student's share of a step
    lengths = range(rollout.min_chunks, rollout.max_chunks + 1)
    free, learning = (
        fmean(_rollout_flops(config, chunks, gradient) for chunks in lengths) for gradient in (False, True)
    )
    critic = clip_flops(engine, config.critic_model or shape, config.clip_frames)
    teacher = clip_flops(engine, config.teacher_model or shape, config.clip_frames)
    flops = {
        "rollouts of the critic": samples * free,
        "critic, both ways": samples * critic * (4 if config.checkpointing else 3),
        "rollouts of the student": students * learning,
        "teacher": students * teacher * (2 if config.distillation.guidance else 1),
        "critic's score": students * critic,
    }
    if config.stage == "re-dmd":
        size = engine.cache.chunk_frames
        flops["VAE decode"] = students * fmean(decode_flops(engine, chunks * size) for chunks in lengths)
        if config.reward != "toy":
            flops["reward"] = students * 2 * _REWARD_PARAMETERS * _REWARD_TOKENS
    return flops


def _rollout_flops(config: TrainConfig, chunks: int, gradient: bool) -> float:
    """One sample's rollout: on average half of the steps, and the context pass; backward of the chunks that
    learn."""
    engine, shape, cache = config.engine, config.engine.model, config.engine.cache
    frame_tokens = LatentGrid.of(engine).frame_tokens
    tokens = cache.chunk_frames * frame_tokens
    steps = (len(engine.schedule.denoising_steps) + 1) / 2
    backward = 3 if config.rollout.checkpointing else 2
    total = text_flops(shape) * (3 if gradient else 1)
    for chunk in range(chunks):
        learns = gradient and chunk >= chunks - config.rollout.gradient_chunks
        seen = min(cache.frames_before(chunk + 1), cache.resident_frames)
        one = pass_flops(shape, tokens, seen * frame_tokens)
        total += one * (steps + 1 + (backward if learns else 0))
    return total
