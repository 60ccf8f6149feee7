"""Checkpoint: one configuration and the weights of its parts, of a directory or seeded random ones."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rfengine.checkpoint.directories import (
    CONFIG_FILE,
    PARTS,
    SKYREELS_STEM,
    CheckpointDirectory,
    checkpoint_directory,
    read_json,
)
from rfengine.checkpoint.int8_tensors import with_int8
from rfengine.checkpoint.layouts import Part
from rfengine.checkpoint.loader import assign
from rfengine.checkpoint.manifest import check_sizes
from rfengine.checkpoint.rank_weights import rank_parts
from rfengine.checkpoint.shapes import (
    PartConfig,
    describe_mismatch,
    expected_shapes,
    infer_config,
    part_configs,
    shapes_of,
    tells_frame_rate,
)
from rfengine.checkpoint.tensor_file import StoredTensor
from rfengine.checkpoint.text_states import TextStateFiles
from rfengine.config import EngineConfig, RuntimeConfig, TextConfig, TinyVAEConfig, VAEConfig, WanConfig
from rfengine.config_json import from_dict, to_dict
from rfengine.files import write_text
from rfengine.grid import LatentGrid
from rfengine.limits import shown
from rfengine.models.int8_products import text_encoder_in_int8
from rfengine.models.text_encoder import (
    ByteTokenizer,
    SentencePieceTokenizer,
    TextEncoder,
    Tokenizer,
    build_umt5,
)
from rfengine.presets import PRESETS
from rfengine.tensor_parallel import WHOLE, TensorParallel

logger = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)

CONFIG_FORMAT = 1
RETIRED = {"merged_pass": False}  # a field of runtime that was removed, at the value that convert wrote
BIAS_SCALE = 0.02  # of random biases
_SINGLE_FILES: dict[Part, str] = {"tiny_vae": "taew2_1.pth"}  # a part that is published in a file of its own


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A configuration and where the weights of its parts come from.

    directory: what they are read from; None for random weights, which `seed` determines.
    """

    config: EngineConfig
    directory: CheckpointDirectory | None = None
    seed: int = 0

    @classmethod
    def open(cls, source: Path | str) -> Checkpoint:
        """Open "tiny", which comes with the package, or a directory of any known layout; no tensor is read.

        Raises ValueError for a directory without checkpoint, and as read_config does.
        """
        directory = CheckpointDirectory.of(checkpoint_directory(source))
        return cls(read_config(directory), directory)

    @classmethod
    def random(cls, config: EngineConfig, seed: int = 0) -> Checkpoint:
        """Seeded random weights that keep activations near 1, made on the device that they are loaded onto.

        What a chunk costs does not depend on the values; the frames are noise.
        """
        return cls(config, seed=seed)

    @property
    def path(self) -> Path:
        """The directory. Raises ValueError for random weights."""
        if self.directory is None:
            raise ValueError(f"{self.config.name} has random weights; give a checkpoint directory")
        return self.directory.path

    def has(self, part: Part) -> bool:
        """Whether there are weights of `part`."""
        return self.directory is None or bool(self.directory.files(part))

    def load(
        self,
        build: Callable[[], Module],
        part: Part,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        parallel: TensorParallel = WHOLE,
    ) -> Module:
        """The module that `build` makes, with the weights of `part` in `dtype` on `device`; of a transformer,
        those of one rank alone (rank_part).

        build is called on the meta device; tied parameters stay tied and requires_grad stays. Weights that it
        makes in int8 are rounded as they are read. Raises ValueError when the directory lacks the part, has
        it only as a pickle, or has it for another model, for values that are not finite, and where a file has
        not the size in the manifest.
        """
        with torch.device("meta"):
            module = build()
        if self.directory is None:
            stored = _random_tensors(part_configs(self.config)[part], self.seed + PARTS.index(part), device)
            stored = rank_parts(with_int8(stored, module, dtype), parallel)
            assign(module, stored, dtype, device, f"the random {part}")
            return module
        stored, label = self.stored(part)
        stored = rank_parts(with_int8(stored, module, dtype), parallel)
        assign(module, stored, dtype, device, label, check_finite=True)
        return module

    def stored(self, part: Part) -> tuple[dict[str, StoredTensor], str]:
        """The tensors of `part` in the directory, none of which is read, and what errors call them.

        Raises ValueError when the directory lacks the part or has it only as a pickle, and where a file has
        not the size in the manifest.
        """
        check_sizes(self.path)
        files = self.directory.files(part)
        if not files:
            way = "run `rfengine convert SRC DST --base WAN` where WAN is a directory that has it"
            if part in _SINGLE_FILES:
                way = f"run `rfengine convert {_SINGLE_FILES[part]} DST --base {self.path}` and load DST"
            raise ValueError(f"{self.path} has no {part}; {way}")
        self.directory.refuse_pickles(part)
        return self.directory.open(part), str(files[0])

    def text_encoder(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        cache: Path | str | None = None,
        runtime: RuntimeConfig | None = None,
    ) -> TextEncoder | GivenTextStates:
        """What makes text states; its weights are read at the first prompt that `cache` does not hold.

        cache: a directory that keeps text states by prompt. runtime: where its weights are and whether they
        are int8. Random weights have random states instead.
        Raises ValueError where the directory has no text encoder or no tokenizer.
        """
        text, model = self.config.text, self.config.model
        if self.directory is None:
            shape, generator = (
                (1, model.text_len, model.text_dim),
                torch.Generator("cpu").manual_seed(self.seed),
            )
            states = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            return GivenTextStates(states)
        folder = self.directory.tokenizer()
        if not self.directory.files("text_encoder") or (folder is None and text.tokenizer != "bytes"):
            raise ValueError(
                f"{self.directory.path} has no text encoder or no tokenizer; run `rfengine convert SRC DST "
                "--base WAN` where WAN is a directory that has them"
            )

        tokenizer, files = open_tokenizer(folder, text), None
        runtime = runtime or RuntimeConfig()
        is_int8, by_layers = runtime.text_weights == "int8", runtime.text_encoder == "layers"
        if cache is not None:
            weights = self.fingerprint() + ", int8" * is_int8
            files = TextStateFiles(cache, weights, model.text_len, text.dim)
        build = partial(_built_text_encoder, text, is_int8)
        load = partial(self.load, build, "text_encoder", dtype, "cpu" if by_layers else device)
        return TextEncoder(load, tokenizer, model.text_len, device, dtype, files, by_layers)

    def fingerprint(self) -> str:
        """What distinguishes these weights from others, see CheckpointDirectory.fingerprint."""
        if self.directory is None:
            return f"random weights, seed {self.seed}"
        return self.directory.fingerprint()


class GivenTextStates:
    """Takes the place of a text encoder: every prompt has the same states [1, text_len, text_dim]."""

    def __init__(self, states: Tensor) -> None:
        self.states = states

    def encode(
        self, prompts: list[str], device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """States [len(prompts), text_len, text_dim]; by default on the device and in the dtype they have."""
        return self.states.to(device=device, dtype=dtype).expand(len(prompts), -1, -1)


def _built_text_encoder(config: TextConfig, is_int8: bool) -> nn.Module:
    model = build_umt5(config)
    return text_encoder_in_int8(model) if is_int8 else model


def open_tokenizer(folder: Path | None, config: TextConfig) -> Tokenizer:
    """The tokenizer of a text encoder; `folder` has its files, unless it takes bytes.

    Raises ValueError when they are damaged or foreign, and for ids that the encoder has no row for.
    """
    tokenizer = ByteTokenizer() if config.tokenizer == "bytes" else SentencePieceTokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has ids up to {tokenizer.vocab_size - 1} and "
            f"the text encoder has {config.vocab_size} rows; use the two of one model"
        )
    return tokenizer


def write_config(directory: Path, config: EngineConfig) -> None:
    """Write `rfengine.json` into `directory`, for Checkpoint.open."""
    text = json.dumps({"format": CONFIG_FORMAT, "engine": to_dict(config)}, indent=2)
    write_text(directory / CONFIG_FILE, text + "\n")


def engine_config(
    configs: Mapping[Part, PartConfig], name: str = "", diffusion_forcing: bool = False
) -> EngineConfig:
    """The EngineConfig of inferred parts; the published VAEs and text encoder stand in for absent ones.

    name: how the checkpoint is called; its size is appended. diffusion_forcing: whether it is such a model,
    whose size, rate and length are those of SkyReels-V2 at 540P. Raises ValueError when parts do not fit.
    """
    model = configs["transformer"]
    assert isinstance(model, WanConfig)
    published = {preset.model: key.rpartition("-")[2] for key, preset in PRESETS.items()}
    size = published.get(model, f"dim{model.dim}-layers{model.num_layers}")
    vae, text = configs.get("vae", VAEConfig()), configs.get("text_encoder", TextConfig())
    tiny_vae = configs.get("tiny_vae", TinyVAEConfig())
    parts = {"model": model, "vae": vae, "tiny_vae": tiny_vae, "text": text}
    if diffusion_forcing:
        return replace(PRESETS["skyreels-df-1.3b"], name=f"skyreels-df-{size}", **parts)
    return EngineConfig(name=f"{name or 'wan'}-{size}", **parts)


def is_diffusion_forcing(directory: CheckpointDirectory, model: WanConfig) -> bool:
    """Whether a directory of another layout holds a diffusion forcing model, by its tensors or its files.

    Raises ValueError where they are of SkyReels-V2, or of its names, and neither says it.
    """
    names = directory.class_names()
    if model.fps_embedding or any("DiffusionForcing" in name for name in names):
        return True
    files = directory.files("transformer")
    named_so = directory.layout == "wan" and files and files[0].name.startswith(f"{SKYREELS_STEM}.")
    if named_so or (names and all(name.startswith("SkyReelsV2Transformer") for name in names)):
        raise ValueError(
            f"{directory.path} has the files of SkyReels-V2 and no table of frame rates, and nothing says "
            "whether it is a diffusion forcing model; run `rfengine convert` with --kind skyreels or another"
        )
    return False


def _without_retired(engine: Any) -> Any:
    """Drop runtime fields that an earlier rfengine wrote and that changed nothing at the value it wrote."""
    runtime = engine.get("runtime") if isinstance(engine, dict) else None
    if not isinstance(runtime, dict):
        return engine
    kept = {key: value for key, value in runtime.items() if (key, value) not in RETIRED.items()}
    return engine | {"runtime": kept}


def read_config(directory: CheckpointDirectory) -> EngineConfig:
    """The directory's own configuration, or an inferred one for the layouts that have none.

    Inferred means: sizes from tensors and config.json; the published VAE and text encoder where their files
    are absent or pickles; the default cache and schedule, with a warning, since those layouts name none.
    Raises ValueError for a configuration that is damaged, too new, or of other sizes than the tensors beside
    it.
    """
    if directory.layout != "rfengine":
        return _infer_config(directory)
    path = directory.path / CONFIG_FILE
    values = read_json(path)
    stated = values.get("format")
    if type(stated) is not int or stated != CONFIG_FORMAT or "engine" not in values:
        raise ValueError(
            f"{path} has format {shown(stated)} and this rfengine reads {CONFIG_FORMAT}; convert the source "
            "again"
        )
    unknown = [key for key in values if key not in ("format", "engine")]
    if unknown:
        raise ValueError(f"{path} has the key {shown(unknown[0])}; it holds format and engine alone")
    try:
        config = from_dict(EngineConfig, _without_retired(values["engine"]), "engine")
        LatentGrid.of(config)
    except ValueError as error:
        raise ValueError(f"{path} is not a configuration of this rfengine: {error}") from error
    _require_agreement(directory, config)
    return config


def _require_agreement(directory: CheckpointDirectory, config: EngineConfig) -> None:
    """Raises ValueError unless the parts that `directory` has are of the sizes that its `config` says.

    The headers of the files are read and no tensor is, before anything of those sizes is built.
    """
    for part, stated in part_configs(config).items():
        files = directory.files(part)
        if not files or directory.pickle(part):
            continue
        expected, found = expected_shapes(stated), shapes_of(directory.open(part))
        if (is_told := tells_frame_rate(found)) != tells_frame_rate(expected):
            raise ValueError(
                f"{files[0]} has {'the' if is_told else 'no'} tensors of the frame rate that SkyReels-V2's "
                f"diffusion forcing models have, and {CONFIG_FILE} says otherwise; convert its source again"
            )
        if problem := describe_mismatch(expected, found):
            raise ValueError(
                f"{files[0]} does not fit the model of {CONFIG_FILE}: {problem}; get both from one place"
            )


def _infer_config(directory: CheckpointDirectory) -> EngineConfig:
    configs: dict[Part, PartConfig] = {}
    for part in PARTS:
        files = directory.files(part)
        if part == "transformer":
            if not files:
                raise ValueError(f"{directory.path} has no transformer; give the directory that has it")
            directory.refuse_pickles(part)
        if files and not directory.pickle(part):
            shapes = shapes_of(directory.open(part))
            configs[part] = infer_config(part, shapes, directory.settings(part), files[0].parent)
    if is_diffusion_forcing(directory, configs["transformer"]):
        return engine_config(configs, diffusion_forcing=True)
    logger.warning(
        "%s names no cache; EMA-Sink is taken, and the model is treated as a teacher, which a few steps do "
        "not suit",
        directory.path,
    )
    return engine_config(configs)


def _random_tensors(config: PartConfig, seed: int, device: torch.device | str) -> dict[str, StoredTensor]:
    """Float32 tensors of a part, drawn on `device` one by one as they are read."""
    generator = torch.Generator(device).manual_seed(seed)
    return {
        name: StoredTensor(shape, torch.float32, partial(_random_tensor, name, shape, generator))
        for name, shape in expected_shapes(config).items()
    }


def _random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Matrices are scaled by their inputs, norms are 1, biases are near 0."""
    values = torch.empty(shape, dtype=torch.float32, device=generator.device)
    if name.endswith("modulation"):
        return values.normal_(0, shape[-1] ** -0.5, generator=generator)
    if name.endswith("bias"):
        return values.normal_(0, BIAS_SCALE, generator=generator)
    if values.numel() == shape[0]:  # the scale of a norm
        return values.fill_(1)
    return values.normal_(0, values[0].numel() ** -0.5, generator=generator)
