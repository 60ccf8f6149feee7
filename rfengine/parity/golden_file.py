"""GoldenFile: the recorded inputs, results and weights of one golden file.

It is one safetensors: `w.*` are weights under the original Wan names, `t.*` inputs and recorded results; JSON
under `config` in the header says how they were made, its `kind` (causal, vae, umt5) of which part they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rfengine.checkpoint.layouts import Part, engine_names, list_names
from rfengine.checkpoint.shapes import PartConfig, describe_mismatch, expected_shapes, infer_config
from rfengine.checkpoint.tensor_file import StoredTensor, open_safetensors, read_header
from rfengine.config import VAEConfig
from rfengine.config_json import to_dict
from rfengine.parity.golden_header import check_golden_header, parse_golden_header

Module = TypeVar("Module", bound=nn.Module)

PARTS: dict[str, Part] = {"causal": "transformer", "vae": "vae", "umt5": "text_encoder"}
# Axes of every t.* by kind: of those that must be there, and of those that may.
_TENSORS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "causal": (
        {"noise": 5, "renoise": 7, "prompt_embeds": 3, "latents": 5, "first_flow": 5},
        {"cache_k": 4, "cache_v": 4, "sink_k_last": 4, "sink_v_last": 4},
    ),
    "vae": ({}, {"latents": 5, "video": 5, "pixels": 5, "encoded": 5}),
    "umt5": ({"ids": 2, "mask": 2, "embeds": 3}, {}),
}
_PAIRS = (("latents", "video"), ("pixels", "encoded"))  # of a vae file: what is put in, and what comes out
_WHOLE_NUMBERS = ("ids", "mask")
_ENGINE_NAMES = {"vocab": "vocab_size", "dim_ffn": "ffn_dim", "layer_norm_epsilon": "eps"}


class GoldenFile:
    """One opened file; tensors are read when they are asked for."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        stored = open_safetensors(path)
        self.header = parse_golden_header(read_header(path)[1].get("config", ""))
        self.kind: str = self.header["kind"]
        self.device, self.dtype = device, dtype
        self._tensors = {name[2:]: value for name, value in stored.items() if name.startswith("t.")}
        weights = {name[2:]: value for name, value in stored.items() if name.startswith("w.")}
        others = [name for name in stored if not name.startswith(("t.", "w."))]
        if others:
            raise ValueError(f"it has {list_names(others)}, neither w.* nor t.*; record it without")
        self._part, self._weights = engine_names(weights)
        if self._part != PARTS[self.kind]:
            raise ValueError(
                f"its weights are those of a {self._part}; a {self.kind} file has a {PARTS[self.kind]}"
            )
        check_golden_header(self.header)
        self._check_tensors()

    def _check_tensors(self) -> None:
        """Raises ValueError for a tensor that is missing, empty, of a wrong kind, or never looked at."""
        required, optional = _TENSORS[self.kind]
        needed = set(required)
        for pair in _PAIRS:
            needed |= set(pair) if self._tensors.keys() & set(pair) & optional.keys() else set()
        missing = sorted(needed - self._tensors.keys()) or ["latents"] * (not self._tensors)
        if missing:
            raise ValueError(
                f"it has no tensor t.{missing[0]}, which a {self.kind} file needs; record it as well"
            )
        for name, tensor in self._tensors.items():
            axes = (required | optional).get(name)
            if axes is None:
                raise ValueError(f"it has t.{name}, which a {self.kind} file has not; record it without")
            # one step needs no fresh noise
            if len(tensor.shape) != axes or (0 in tensor.shape and name != "renoise"):
                raise ValueError(f"t.{name} is {list(tensor.shape)}; it must have {axes} axes, none empty")
            whole = name in _WHOLE_NUMBERS
            if tensor.dtype.is_floating_point == whole or tensor.dtype == torch.bool:
                wanted = "whole" if whole else "floating-point"
                raise ValueError(f"t.{name} is in {tensor.dtype}; it must be of {wanted} numbers")
        whole_weights = [name for name, each in self._weights.items() if not each.dtype.is_floating_point]
        if whole_weights:
            raise ValueError(f"its weights {list_names(whole_weights)} are whole numbers; record it again")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def recorded(self, name: str) -> Tensor:
        """A tensor as it was recorded, on the CPU."""
        return self._tensors[name].read()

    def shape(self, name: str) -> list[int]:
        return list(self._tensors[name].shape)

    def input(self, name: str) -> Tensor:
        """A tensor where the engine runs."""
        return self.recorded(name).to(device=self.device, dtype=self.dtype)

    def config_and_weights(self) -> tuple[PartConfig, dict[str, StoredTensor]]:
        """The configuration that the weights and the header give, and the weights by the engine's names."""
        shapes = {name: tensor.shape for name, tensor in self._weights.items()}
        config = infer_config(self._part, shapes, self._settings(shapes))
        problem = describe_mismatch(expected_shapes(config), shapes)
        if problem:
            raise ValueError(f"its weights are damaged: {problem}; record it again")
        own_sizes = to_dict(config) | self._stated_by_tensors()
        for name, value in self.header.items():
            stated = tuple(value) if isinstance(value, list) else value
            own = own_sizes.get(_ENGINE_NAMES.get(name, name), stated)
            if stated != own:
                raise ValueError(
                    f"its header states {name} {stated} and its tensors have {own}; record it again"
                )
        return config, self._weights

    def _stated_by_tensors(self) -> dict[str, int]:
        """Sizes that the header may state and the shapes of a causal file's tensors tell."""
        if self.kind != "causal":
            return {}
        *_, height, width = self.shape("noise")
        return {"latent_height": height, "latent_width": width, "chunks": self.shape("renoise")[0]}

    def _settings(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        """The header in the words of a config.json."""
        settings = dict(self.header)
        if self.kind == "causal":
            settings["text_len"] = self.shape("prompt_embeds")[1]
        channels = shapes.get("conv2.weight", (0,))[0]
        if self.kind == "vae" and channels != VAEConfig().z_dim:
            # there are no published statistics for another number of channels: such a file is not normalised
            settings = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels, **settings}
        if "max_distance" in settings:
            settings["relative_attention_max_distance"] = settings["max_distance"]
        return settings

    def load(self, module: Module, stored: dict[str, StoredTensor]) -> Module:
        """Put the checked weights onto `module`, which is moved to the device and dtype, in place."""
        module.load_state_dict({name: tensor.read() for name, tensor in stored.items()}, strict=False)
        return module.to(device=self.device, dtype=self.dtype).eval()
