"""The Gemma family's: a SigLIP tower, a linear projector, pooled or plain grids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from neuronlens.adapters.base import register
from neuronlens.adapters.discover import Block, special_block
from neuronlens.adapters.families.llava import GridAdapter
from neuronlens.adapters.geometry import Placement, stretched
from neuronlens.adapters.grids import (
    ImageSize,
    Piece,
    Seen,
    cells,
    flat,
    pad,
    raster,
    rows,
    text_rows,
)
from neuronlens.adapters.taps import DownInput
from neuronlens.errors import AdapterError
from neuronlens.tokens import Role


@register("gemma3", "shieldgemma2")
class Gemma3Adapter(GridAdapter):
    """Streams: `vision` [image, patch], `language`. The projector has no neurons.

    A token is the mean of a square of patches. Crops that pan and scan adds to an image
    are not described.
    """

    @property
    def placeholder_of_processor(self) -> int | None:
        """The tokenizer's: what the processor calls its image token begins an image."""
        return getattr(self.processor.tokenizer, "image_token_id", None)

    def image_tokens(self, size: ImageSize) -> Piece:
        """The means of squares of patches."""
        side = int(self._config.mm_tokens_per_image**0.5)
        return cells(raster(side, side, size))

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One grid per image, in reading order."""
        return _without_projector(super().look(inputs))


def _without_projector(seen: Seen) -> Seen:
    return Seen(seen.sizes, seen.language, {"vision": seen.streams["vision"]})


@register("paligemma")
class PaliGemmaAdapter(GridAdapter):
    """Streams: `vision` [image, patch], `language`. The projector has no neurons.

    Its texts are images, BOS, prompt, a line's end; then the response and EOS. What comes
    before the response is not causal: image tokens see the prompt.
    """

    before_response = "\u2028"

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One grid per image, in reading order."""
        return _without_projector(super().look(inputs))

    def as_processed(self, text: str) -> str:
        """With the BOS, line's end and EOS that the processor writes."""
        tokenizer = self.processor.tokenizer
        prompt, mark, response = text.partition(self.before_response)
        at = prompt.rfind(self.image_token) + len(self.image_token)
        if self.image_token not in prompt:
            at = 0
        asked = f"{prompt[:at]}{tokenizer.bos_token}{prompt[at:]}\n"
        return f"{asked}{response}{tokenizer.eos_token}" if mark else asked

    def process(
        self, texts: Sequence[str], images: Sequence[Sequence[Any]], *, add_special_tokens: bool
    ) -> dict[str, Any]:
        """Responses are given as the processor's suffixes, so that they are causal.

        Raises:
            AdapterError: If only some of the texts have a response.
        """
        parts = [text.partition(self.before_response) for text in texts]
        if len({mark for _, mark, _ in parts}) > 1:
            raise AdapterError(
                "PaliGemma's processor takes responses for all texts of a batch or for none. "
                "Encode samples with and without a response apart."
            )
        suffix = [response for _, _, response in parts] if parts[0][1] else None
        inputs: Mapping[str, Any] = self.processor(
            images=[list(each) for each in images],
            text=[prompt for prompt, _, _ in parts],
            suffix=suffix,
            add_special_tokens=add_special_tokens,
            padding=True,
            return_tensors="pt",
        )
        # Labels are for training; the loss they ask for would be computed for nothing.
        return {name: value for name, value in inputs.items() if name != "labels"}


@special_block("PI0ActionTimeEmbedding")
def _action_time(path: str, block: Any) -> Iterator[Block]:
    down = f"{path}.action_time_mlp_out"
    yield Block(path, "silu", DownInput(down), block.action_time_mlp_out.in_features)


@register("pi0")
class Pi0Adapter(GridAdapter):
    """A PaliGemma, of which an action expert reads the keys and values.

    Streams: `vision` [camera, patch], `language`, `action` [sample, state + action] (the
    expert), `action.time` [sample, action] (what embeds noisy actions and their time step).
    The images of a sample are its cameras.
    """

    parts = (("action", r"(^|\.)dit\."), ("action.time", r"embed_action_time"))

    def check_model(self) -> None:
        """The language model is the VLM's."""
        super().check_model()
        text = self._config.vlm_config.text_config
        self.max_tokens = getattr(text, "max_position_embeddings", None)

    def vision_config(self) -> Any:
        """The config of the VLM's tower."""
        return self._config.vlm_config.vision_config

    def placeholder_ids(self) -> list[int]:
        """The VLM's."""
        return [int(self._config.vlm_config.image_token_id)]

    def is_inert(self, stack: str, layer: int, last: int) -> bool:
        """The language model's last layer: only its keys and values are read."""
        return stack == "language" and layer == last

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """One grid per camera; those that only fill up run through the tower, too."""
        pixels = self.pixels(inputs)
        mask = inputs["pixel_attention_mask"].cpu().bool().flatten().tolist()
        size = (int(pixels.shape[-1]), int(pixels.shape[-2]))
        grid = self.patches(size)
        number = torch.tensor(mask).cumsum(0).tolist()
        tower = [
            (count - 1, grid) if here else (-1, pad(len(grid)))
            for count, here in zip(number, mask, strict=True)
        ]
        chunk = int(self._config.chunk_size)
        actions = torch.full((len(pixels), 1 + chunk), int(Role.SPECIAL))
        return Seen(
            sizes=[size] * sum(mask),
            language=flat((i, grid) for i in range(sum(mask))),
            streams={
                "vision": rows(tower),
                "action": text_rows(actions),
                "action.time": text_rows(actions[:, 1:]),
            },
        )

    def place(self, original: ImageSize, size: ImageSize, index: int) -> Placement:
        """Resized with its aspect ratio kept, padded on the right or below."""
        limit = getattr(self.image_processor, "size", None)
        across, down = getattr(limit, "max_width", None), getattr(limit, "max_height", None)
        if across is None or down is None:
            return stretched(original, size)
        if not getattr(self.image_processor, "do_resize", True):
            raise AdapterError("The image processor does not resize, so boxes cannot be placed.")
        share = min(across / original[0], down / original[1])
        resized = [int(each * share) for each in original]
        scale = (resized[0] / original[0], resized[1] / original[1])
        return Placement(original, scale, (0.0, 0.0))
