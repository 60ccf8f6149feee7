"""The options by which a command takes LoRAs."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import UseAppendAction

from rfengine.checkpoint.lora import Lora


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """LoRAs that are merged into the transformer's weights."""

    lora: UseAppendAction[tuple[str, ...]] = ()
    """FILE or FILE:SCALE, a LoRA to merge into the transformer: a file, or the directory that PEFT or
    Diffusers saved it in; may be given several times. SCALE, 1 where none is given, multiplies what its
    alphas, adapter_config.json or header state. A path that ends in a colon and a number needs its scale."""
    allow_unmatched_lora: bool = False
    """Leave out, with a warning, keys of a LoRA that match nothing in the transformer."""

    def loras(self) -> tuple[Lora, ...]:
        """Those that were given."""
        return tuple(Lora.parse(text, self.allow_unmatched_lora) for text in self.lora)
