"""LLaVA 1.5 and its like: one image is one grid of patches, one token per patch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

from neuronlens.adapters.base import register
from neuronlens.adapters.discover import Block, features, special_block
from neuronlens.adapters.families.patches import read_until
from neuronlens.adapters.family import FamilyAdapter, as_pixel_values
from neuronlens.adapters.geometry import Placement, processed_by, stretched
from neuronlens.adapters.grids import (
    ImageSize,
    Piece,
    Seen,
    cells,
    flat,
    queries,
    raster,
    rows,
    special,
)
from neuronlens.adapters.taps import ActOutput
from neuronlens.errors import AdapterError


class GridAdapter(FamilyAdapter):
    """A tower that cuts the whole image into patches, and one grid of tokens made of them.

    Streams: `vision` [image, class token (CLIP's) + patch], `projector` [image, patch],
    `language`.

    Attributes:
        towers: By model type of the vision tower, its tokens before the patches.
    """

    # Pooling heads run, and nothing of them is read.
    not_run = r"vision_(tower|model).*\.head\."
    towers: ClassVar[Mapping[str, int]] = {"siglip_vision_model": 0}

    def check_model(self) -> None:
        """Refuse vision towers whose tokens are not described here."""
        super().check_model()
        self._vision = self.vision_config()
        if self._vision.model_type not in self.towers:
            raise AdapterError(
                f"The vision tower is a {self._vision.model_type!r}; {type(self).__name__} knows "
                f"the tokens of {', '.join(self.towers)}. To describe another: docs/adapters.md."
            )
        self.first_tokens = self.towers[self._vision.model_type]

    def vision_config(self) -> Any:
        """The config of the vision tower."""
        return self._config.vision_config

    def agreements(self) -> dict[str, tuple[Any, Any]]:
        """Patch size and image size."""
        crop = edges(getattr(self.image_processor, "crop_size", None))
        side = self._vision.image_size
        return {
            "patch size": (getattr(self.processor, "patch_size", None), self._vision.patch_size),
            "image size": (crop, (side, side)),
        }

    def pixels(self, inputs: Mapping[str, Any]) -> Any:
        """The processed images."""
        if inputs.get("pixel_values") is None or inputs.get("pixel_values_videos") is not None:
            raise AdapterError(
                f"{type(self).__name__} describes images (pixel_values); what videos are made into "
                "is not described."
            )
        return inputs["pixel_values"]

    def patches(self, size: ImageSize, area: ImageSize | None = None) -> Piece:
        """The patches of an image or tile of `size`, told in the pixels of `area`."""
        patch = self._vision.patch_size
        return cells(raster(size[1] // patch, size[0] // patch, area or size))

    def image_tokens(self, size: ImageSize) -> Piece:
        """What the language model is given of an image."""
        return self.patches(size)

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One grid per image, in reading order."""
        pixels = self.pixels(inputs)
        size = (int(pixels.shape[-1]), int(pixels.shape[-2]))
        images = range(len(pixels))
        tokens = self.image_tokens(size)
        return Seen(
            sizes=[size for _ in images],
            language=flat((i, tokens) for i in images),
            streams={
                "vision": rows(
                    (i, special(self.first_tokens) + self.patches(size)) for i in images
                ),
                "projector": rows((i, tokens) for i in images),
            },
        )


def edges(size: Any) -> tuple[int, int] | None:
    """Height and width in an image processor's setting; Video-LLaVA's are plain dictionaries."""
    if not size:
        return None
    if isinstance(size, dict):
        return size["height"], size["width"]
    return size.height, size.width


class SelectingAdapter(GridAdapter):
    """Reads chosen layers of the tower, with or without its first token."""

    towers: ClassVar[Mapping[str, int]] = {"clip_vision_model": 1, "siglip_vision_model": 0}

    def check_model(self) -> None:
        """Remember which of the tower's tokens are passed on."""
        super().check_model()
        self._strategy = getattr(self._config, "vision_feature_select_strategy", "default")

    def agreements(self) -> dict[str, tuple[Any, Any]]:
        """Patch size, image size and which tower tokens are passed on."""
        theirs = getattr(self.processor, "vision_feature_select_strategy", None)
        return super().agreements() | {"feature selection": (theirs, self._strategy)}

    def read_layers(self) -> list[int]:
        """The tower's hidden states that are read: 0 is the first layer's input."""
        # VipLlava's are vision_feature_layers; both names from transformers 5.23 on.
        names = ("vision_feature_layers", "vision_feature_layer")
        chosen = getattr(self._config, next(name for name in names if hasattr(self._config, name)))
        return [chosen] if isinstance(chosen, int) else list(chosen)

    def is_inert(self, stack: str, layer: int, last: int) -> bool:
        """Tower layers behind the last one whose output is read."""
        return stack == "vision" and layer >= read_until(self.read_layers(), last)


@register("llava", "vipllava", "video_llava")
class LlavaAdapter(SelectingAdapter):
    """Streams: `vision` [image, CLS (CLIP's) + patch], `projector` [image, patch], `language`."""

    # Video-LLaVA has a second tower, for videos.
    not_run = rf"{GridAdapter.not_run}|video_tower"

    def process(
        self, texts: Sequence[str], images: Sequence[Sequence[Any]], *, add_special_tokens: bool
    ) -> dict[str, Any]:
        """The processor's inputs, the pixels of Video-LLaVA as the model takes them."""
        inputs = super().process(texts, images, add_special_tokens=add_special_tokens)
        return as_pixel_values(self.model, inputs, "pixel_values_images")

    def pixels(self, inputs: Mapping[str, Any]) -> Any:
        """The processed images, under either of Video-LLaVA's names."""
        legacy = inputs.get("pixel_values_images")
        return super().pixels(inputs if legacy is None else {**inputs, "pixel_values": legacy})

    def place(self, original: ImageSize, size: ImageSize, index: int) -> Placement:
        """Cropped if the image processor crops, else resized."""
        told = self.image_processor
        if type(getattr(told, "size", None)) is dict:
            told = SimpleNamespace(
                do_resize=told.do_resize,
                do_center_crop=told.do_center_crop,
                size=SimpleNamespace(**told.size),
                crop_size=SimpleNamespace(**told.crop_size),
            )
        return processed_by(told, original, size)

    def image_tokens(self, size: ImageSize) -> Piece:
        """One token per patch."""
        first, grid = self.first_tokens, self.patches(size)
        # "default" leaves the first token out, whether it is a CLS token or a patch. CLS, passed
        # on with "full", sees the whole image and no single region.
        return queries(first) + grid if self._strategy == "full" else (special(first) + grid)[1:]


def padded_square(
    image_processor: Any, setting: str, original: ImageSize, processed: ImageSize
) -> Placement:
    """Where an image lies that was made to fit into a square and padded on both sides alike.

    Args:
        image_processor: Of DeepSeek-VL or Janus; without one the image is taken to be as
            large as the square.
        setting: Where it has the size of the square that images are resized for.
        original: Size before processing.
        processed: Size of the square that boxes are told in.
    """
    if image_processor is None:
        return stretched(original, processed)
    side = (edges(getattr(image_processor, setting)) or processed)[0]
    width, height = original
    least = getattr(image_processor, "min_size", 1)
    share = side / max(original)
    resized = max(round(width * share), least), max(round(height * share), least)
    if not getattr(image_processor, "do_pad", True):
        raise AdapterError(
            f"{type(image_processor).__name__} has do_pad=False, so images are not made square. "
            "Boxes cannot be placed; leave it True."
        )
    square = max(resized)
    start = [(square - each) // 2 for each in resized]
    more = processed[0] / square
    scale = (resized[0] / width * more, resized[1] / height * more)
    return Placement(original, scale, (-start[0] * more, -start[1] * more))


@register("deepseek_vl", "janus")
class DeepseekVLAdapter(GridAdapter):
    """Streams: `vision` and `projector` [image, patch], `language`. Images are made square."""

    towers: ClassVar[Mapping[str, int]] = {"siglip_vision_model": 0, "janus_vision_model": 0}

    def blocks(self) -> Iterator[Block]:
        """The blocks; an aligner of another depth than the checkpoints' is refused."""
        depth = getattr(self._vision, "depth", 2)
        if depth != 2:
            raise AdapterError(
                f"The aligner has {depth} projections; one of 2 is described (the activation of a "
                "deeper one is called several times)."
            )
        yield from super().blocks()

    def place(self, original: ImageSize, size: ImageSize, index: int) -> Placement:
        """Resized with its aspect ratio kept, centred in a square."""
        return padded_square(self.image_processor, "size", original, size)


@special_block("JanusVisionAlignerMLP")
def _janus_aligner(path: str, block: Any) -> Iterator[Block]:
    width = block.fc1.out_features
    down = f"{path}.hidden_layers.0"
    yield Block(path, "activation_fn", ActOutput(f"{path}.activation_fn", down), width)


@special_block("DeepseekVLHybridAligner")
def _hybrid_aligner(path: str, block: Any) -> Iterator[Block]:
    # Two projections side by side are activated together.
    width, _ = features(block.proj) or (0, 0)
    yield Block(path, "act", ActOutput(f"{path}.act", f"{path}.proj"), width)


@register("deepseek_vl_hybrid")
class DeepseekVLHybridAdapter(GridAdapter):
    """Two towers see the image; boxes are told in the pixels of the finer one, SAM's.

    Streams: `vision` [image, patch], `vision.2` (SAM's) [image, row, column], `projector`
    [image, patch], `language`. The convolutions behind SAM see more than the box.
    """

    parts = (("vision.2", r"high_res_vision_model"),)

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One grid per tower and image."""
        pixels, fine = self.pixels(inputs), inputs["high_res_pixel_values"]
        size = (int(pixels.shape[-1]), int(pixels.shape[-2]))
        area = (int(fine.shape[-1]), int(fine.shape[-2]))
        patch = self._config.high_res_vision_config.patch_size
        across, down = area[0] // patch, area[1] // patch
        images = range(len(pixels))
        grid = self.patches(size, area)
        sam = rows((i, cells(raster(down, across, area))) for i in images)
        return Seen(
            sizes=[area for _ in images],
            language=flat((i, grid) for i in images),
            streams={
                "vision": rows((i, grid) for i in images),
                "vision.2": sam.reshape(len(pixels), down, across),
                "projector": rows((i, grid) for i in images),
            },
        )

    def place(self, original: ImageSize, size: ImageSize, index: int) -> Placement:
        """Resized with its aspect ratio kept, centred in a square."""
        return padded_square(self.image_processor, "high_res_size", original, size)
