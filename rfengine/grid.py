"""LatentGrid: pixels <-> latents <-> tokens. The only place that knows the strides of the VAE and of the
patches."""

from __future__ import annotations

from dataclasses import dataclass

from rfengine.config import MAX_PIXELS, EngineConfig, VAEConfig, WanConfig
from rfengine.limits import as_integer, shown


@dataclass(frozen=True, slots=True)
class LatentGrid:
    """Sizes of one video at `height` x `width` pixels; every other size of the engine follows from here."""

    height: int  # pixels
    width: int  # pixels
    spatial_stride: int = 8  # pixels per latent
    temporal_stride: int = 4  # pixel frames per latent frame, after the first
    patch: int = 2  # latents per token, along each side

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            value = as_integer(name, getattr(self, name))
            if abs(value) > MAX_PIXELS:
                raise ValueError(f"{name} is {shown(value)} pixels; use at most {MAX_PIXELS}")
            if value < self.multiple or value % self.multiple:
                near = max(self.multiple, round(value / self.multiple) * self.multiple)
                raise ValueError(
                    f"{name} is {value} pixels; it must be a multiple of {self.multiple}, such as {near}"
                )

    @classmethod
    def of(cls, config: EngineConfig, height: int | None = None, width: int | None = None) -> LatentGrid:
        """The grid of `config`, at its own size unless `height` or `width` in pixels say otherwise."""
        height = config.height if height is None else as_integer("height", height)
        width = config.width if width is None else as_integer("width", width)
        return cls.of_parts(config.model, config.vae, height, width)

    @classmethod
    def of_parts(cls, model: WanConfig, vae: VAEConfig, height: int, width: int) -> LatentGrid:
        _, patch, patch_width = model.patch_size
        if patch != patch_width:
            raise ValueError(f"patch_size is {model.patch_size}; patches must be square")
        return cls(height, width, vae.spatial_stride, vae.temporal_stride, patch)

    @property
    def multiple(self) -> int:
        """Height and width in pixels must be multiples of this."""
        return self.spatial_stride * self.patch

    @property
    def latent_height(self) -> int:
        return self.height // self.spatial_stride

    @property
    def latent_width(self) -> int:
        return self.width // self.spatial_stride

    @property
    def token_rows(self) -> int:
        return self.latent_height // self.patch

    @property
    def token_columns(self) -> int:
        return self.latent_width // self.patch

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame."""
        return self.token_rows * self.token_columns

    def pixel_frames(self, latent_frames: int) -> int:
        """Pixel frames that `latent_frames` latents from the start of a video decode to; the first is one."""
        return 0 if latent_frames <= 0 else 1 + self.temporal_stride * (latent_frames - 1)

    def latent_frames(self, pixel_frames: int) -> int:
        """The fewest latents from the start of a video that decode to at least `pixel_frames`."""
        return 0 if pixel_frames <= 0 else 1 + -(-(pixel_frames - 1) // self.temporal_stride)
