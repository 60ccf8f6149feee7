"""GoldenFile: the recorded inputs, results and weights of one golden file.

It is one safetensors: `w.*` are weights under the original Wan names, `t.*` inputs and recorded results; JSON
under `config` in the header says how they were made, its `kind` (causal, vae, umt5) of which part they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfengine.checkpoint.layouts import Part, engine_names
from rfengine.checkpoint.shapes import PartConfig, describe_mismatch, expected_shapes, infer_config
from rfengine.checkpoint.tensor_file import StoredTensor, open_safetensors
from rfengine.config import VAEConfig, to_dict

PARTS: dict[str, Part] = {"causal": "transformer", "vae": "vae", "umt5": "text_encoder"}


class GoldenFile:
    """One opened file; tensors are read when they are asked for."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        from safetensors import safe_open

        stored = open_safetensors(path)
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("config", "")
        try:
            self.header = json.loads(text)
        except ValueError:
            self.header = None
        if not isinstance(self.header, dict):
            raise ValueError("its header has no JSON object under 'config'; give a golden file")
        self.kind = self.value("kind", str)
        if self.kind not in PARTS:
            raise ValueError(f"its kind is {self.kind!r}; the engine replays {', '.join(PARTS)}")
        self.device, self.dtype = device, dtype
        self._tensors = {name[2:]: value for name, value in stored.items() if name.startswith("t.")}
        self._weights = {name[2:]: value for name, value in stored.items() if name.startswith("w.")}

    def value(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """A value of the header, which must be there."""
        found = self.header.get(name)
        if not isinstance(found, kind) or isinstance(found, bool):
            raise ValueError(f"its header has {name} {found!r}; record the file again with a proper value")
        return found

    def numbers(self, name: str) -> list[float]:
        """A list of numbers in the header, which must be there."""
        found = self.value(name, list)
        if any(type(number) not in (int, float) for number in found):
            raise ValueError(f"its header has {name} {found!r}; record the file again with numbers there")
        return found

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def recorded(self, name: str, axes: int) -> Tensor:
        """A tensor as it was recorded, on the CPU."""
        if name not in self._tensors:
            raise ValueError(f"it has no tensor t.{name}, which a {self.kind} file needs; record it as well")
        tensor = self._tensors[name]
        if len(tensor.shape) != axes:
            raise ValueError(f"t.{name} is {list(tensor.shape)}; it must have {axes} axes")
        return tensor.read()

    def input(self, name: str, axes: int) -> Tensor:
        """A tensor where the engine runs."""
        return self.recorded(name, axes).to(device=self.device, dtype=self.dtype)

    def config_and_weights(self) -> tuple[PartConfig, dict[str, StoredTensor]]:
        """The configuration that the weights and the header give, and the weights by the engine's names."""
        wanted = PARTS[self.kind]
        part, stored = engine_names(self._weights)
        if part != wanted:
            raise ValueError(f"its weights are those of a {part}; a {self.kind} file has a {wanted}")
        shapes = {name: tensor.shape for name, tensor in stored.items()}
        config = infer_config(part, shapes, self._settings(shapes))
        problem = describe_mismatch(expected_shapes(config), shapes)
        if problem:
            raise ValueError(f"its weights are damaged: {problem}; record it again")
        for name, own in to_dict(config).items():
            stated = self.header.get(name, own)
            if (tuple(stated) if isinstance(stated, list) else stated) != own:
                raise ValueError(
                    f"its header states {name} {stated} and its weights have {own}; record it again"
                )
        return config, stored

    def _settings(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        """The header in the words of a config.json."""
        settings = dict(self.header)
        if self.kind == "causal":
            self.value("num_heads", int)
            settings["text_len"] = self._tensors["prompt_embeds"].shape[1] if "prompt_embeds" in self else 0
        channels = shapes.get("conv2.weight", (0,))[0]
        if self.kind == "vae" and channels != VAEConfig().z_dim:
            # there are no published statistics for another number of channels: such a file is not normalised
            settings = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels, **settings}
        if "max_distance" in settings:
            settings["relative_attention_max_distance"] = settings["max_distance"]
        return settings

    def load(self, module: nn.Module, stored: dict[str, StoredTensor]) -> None:
        """Put the checked weights onto `module`, which is moved to the device and dtype, in place."""
        module.load_state_dict({name: tensor.read() for name, tensor in stored.items()}, strict=False)
        module.to(device=self.device, dtype=self.dtype).eval()
