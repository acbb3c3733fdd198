"""What tokens are and see, established by changing pixels and running the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from neuronlens.adapters.discover import list_of
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.geometry import Placement
from neuronlens.adapters.grids import Grid, ImageSize, Seen
from neuronlens.errors import WRITE_ONE, AdapterError
from neuronlens.hooks import Call, Point, attached
from neuronlens.tokens import Role

STRIPES = 64
"""The finest experiment: an image is changed in this many stripes along each axis."""


class _FirstLayerReachedError(Exception):
    """The first language layer was reached: the rest of the forward is not needed."""


class Experiment:
    """What the tokens of some inputs are and see, by changing pixels."""

    def __init__(
        self,
        adapter: FamilyAdapter,
        inputs: Mapping[str, Any],
        layers: str,
        say: Callable[[str], None],
    ) -> None:
        """Choose the model and the inputs.

        Args:
            adapter: Of the model, with its sites.
            inputs: Of a forward, with one tensor of images.
            layers: Path of the list of the language model's layers.
            say: Is told what was established.
        """
        adapter.require_eval()
        self.adapter = adapter
        self.layers, self.say = layers, say
        self.inputs = {
            name: value.to(adapter.device) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        self.pixels = self._pixels()
        sites = adapter.sites.values()
        self.first = f"{layers}.0"
        self.sites = {
            stream: next(site for site in sites if site.stream == stream)
            for stream in dict.fromkeys(site.stream for site in sites)
            if stream != "language"
        }

    def _pixels(self) -> str:
        names = [
            name
            for name, value in self.inputs.items()
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 4
        ]
        tiled = [name for name in names if math.prod(self.inputs[name].shape[1:-3]) > 1]
        if tiled:
            raise AdapterError(
                f"{tiled[0]} is {tuple(self.inputs[tiled[0]].shape)}: several tiles of an image, "
                f"whose places in it cannot be told by changing pixels. {WRITE_ONE}"
            )
        if len(names) != 1:
            raise AdapterError(
                f"Of the inputs {', '.join(self.inputs)}, {len(names)} look like images (floating "
                "point, with rows and columns of pixels); exactly one is needed to change "
                f"pixels. {WRITE_ONE}"
            )
        return names[0]

    def run(self, pixels: Tensor, *, mixing: bool) -> dict[str, Tensor]:
        """By stream, the language model's input or the first block's activations, `[*axes, n]`."""
        model = self.adapter.model
        seen: dict[str, list[Tensor]] = {}

        def reached(call: Call) -> None:
            hidden = call.args[0] if call.args else call.kwargs["hidden_states"]
            seen["language"] = [hidden.clone()]
            raise _FirstLayerReachedError

        def keep(stream: str) -> Callable[[Any], None]:
            return lambda out: seen.setdefault(stream, []).append(out.clone())

        points: dict[str, list[Point]] = {
            "first language layer": [Point(model.get_submodule(self.first), reached, before=True)]
        }
        for stream, site in self.sites.items():
            points[stream] = self.adapter.tap(site).reading(model, keep(stream), "act_fn")
        if not mixing:
            for path in self._mixers():
                points[path] = [Point(model.get_submodule(path), _silence)]
        inputs = self.inputs | {self.pixels: pixels}
        with (
            torch.no_grad(),
            suppress(_FirstLayerReachedError),
            attached(points, may_be_left_out=points),
        ):
            model(**inputs)
        if "language" not in seen:
            raise AdapterError(
                f"The first language layer {self.first!r} was not run by these inputs. {WRITE_ONE}"
            )
        return {
            stream: torch.cat([part.flatten(0, -2) for part in parts])
            if len(parts) > 1
            else parts[0]
            for stream, parts in seen.items()
        }

    def _mixers(self) -> list[str]:
        """In every vision layer, what has weights and is neither a norm nor the block itself."""
        mixers = []
        for site in self.adapter.sites.values():
            within = list_of(site.path)
            if site.module != "vision" or within is None:
                continue
            number = site.path[len(within) + 1 :].split(".")[0]
            owner = f"{within}.{number}"
            for name, child in self.adapter.model.get_submodule(owner).named_children():
                path = f"{owner}.{name}"
                is_block = site.path == path or site.path.startswith(f"{path}.")
                has_weights = any(p.ndim >= 2 for p in child.parameters())
                feeds = isinstance(child, nn.Linear)
                if not is_block and has_weights and not feeds:
                    mixers.append(path)
        return list(dict.fromkeys(mixers))

    def positions(self) -> Bool[Tensor, "batch token"]:
        """Which positions of the text depend on any image."""
        pixels = self.inputs[self.pixels]
        plain = self.run(pixels, mixing=True)["language"]
        moved = (self.run(pixels + _noise(pixels), mixing=True)["language"] != plain).any(-1)
        self._check_text(moved)
        return moved.cpu()

    def result(self) -> tuple[Tensor, Seen]:
        """Which positions of the text depend on the image, and what every token sees."""
        pixels = self.inputs[self.pixels]
        noise = _noise(pixels)
        plain = self.run(pixels, mixing=True)
        images = len(pixels)
        moved: dict[str, Tensor] = {}
        owner: dict[str, Tensor] = {}
        for image in range(images):
            other = pixels.clone()
            other[image] += noise[image]
            for stream, rows in self.run(other, mixing=True).items():
                now = (rows != plain[stream]).any(-1).cpu()
                moved[stream] = moved.get(stream, torch.zeros_like(now)) | now
                owner.setdefault(stream, torch.full(now.shape, -1))[now] = image
        self._check_text(moved["language"])
        boxes = self._boxes(pixels, noise, plain)
        grids = {
            stream: self._grid(stream, moved[stream], owner[stream], boxes[stream])
            for stream in moved
        }
        here = moved["language"]
        height, width = int(pixels.shape[-2]), int(pixels.shape[-1])
        language = grids.pop("language")
        flat = here.flatten()
        at = Grid(
            language.role.flatten()[flat],
            language.image.flatten()[flat],
            language.box.reshape(-1, 4)[flat],
            language.sample.flatten()[flat],
        )
        seen = (~at.box.isnan().any(-1)).sum()
        silent = sorted({path.split(".")[-1] for path in self._mixers()})
        self.say(
            f"visual tokens: the {int(flat.sum())} positions whose input to {self.first!r} moves "
            f"with the pixels of {self.pixels} {tuple(pixels.shape)}"
        )
        self.say(
            f"boxes: {int(seen)} of {int(flat.sum())} visual tokens see one region, by changing "
            f"the image in stripes while the vision layers' {', '.join(silent) or 'mixers'} were "
            "silent"
        )
        return here, Seen([(width, height)] * images, at if len(at.role) else None, grids)

    def _check_text(self, moved: Bool[Tensor, "*axes"]) -> None:
        ids = self.adapter.text(self.inputs)
        if tuple(moved.shape) != tuple(ids.shape):
            raise AdapterError(
                f"The language model runs on {tuple(moved.shape)} tokens, but input_ids are "
                f"{tuple(ids.shape)}: the model puts image tokens between those of the text by "
                f"itself, so text positions cannot be told. {WRITE_ONE}"
            )

    def _grid(
        self, stream: str, moved: Tensor, owner: Tensor, box: Float[Tensor, "*axes 4"]
    ) -> Grid:
        role = torch.where(moved, int(Role.VISUAL), int(Role.SPECIAL)).to(torch.int8)
        box = box.clone()
        box[~moved] = float("nan")
        if stream != "language":
            # A CLS token or register moves by mixing alone: it is no patch.
            alone = moved & box.isnan().any(-1)
            if (moved & ~alone).any():
                role[alone] = int(Role.SPECIAL)
        return Grid(role, owner, box, torch.full(owner.shape, -1))

    def _step(self, size: int) -> int:
        """Width of a stripe: the patch of the first convolution, else as fine as is affordable."""
        for path, module in self.adapter.model.named_modules():
            if isinstance(module, nn.Conv2d) and not path.startswith(self.layers):
                patch = module.stride[0]
                if module.kernel_size == module.stride == (patch, patch) and size % patch == 0:
                    return int(patch)
                break
        step = max(1, size // STRIPES)
        if step > 1:
            self.say(f"boxes are told to within {step} pixels of the processed image")
        return step

    def _boxes(self, pixels: Tensor, noise: Tensor, plain: dict[str, Tensor]) -> dict[str, Tensor]:
        """First and last stripe along each axis that moves a token, in pixels."""
        still = self.run(pixels, mixing=False)
        edges: dict[str, list[Tensor]] = {}
        for axis in (-1, -2):
            size = pixels.shape[axis]
            step = self._step(size)
            low = {s: torch.full(r.shape[:-1], float("inf")) for s, r in still.items()}
            high = {s: torch.full(r.shape[:-1], float("-inf")) for s, r in still.items()}
            for start in range(0, size, step):
                end = min(start + step, size)
                other = pixels.clone()
                at = [slice(None)] * pixels.ndim
                at[axis] = slice(start, end)
                other[tuple(at)] += noise[tuple(at)]
                for stream, rows in self.run(other, mixing=False).items():
                    now = (rows != still[stream]).any(-1).cpu()
                    low[stream][now & (low[stream] > start)] = start
                    high[stream][now] = end
            for stream in still:
                edges.setdefault(stream, []).extend([low[stream], high[stream]])
        boxes = {}
        for stream, (left, right, top, bottom) in edges.items():
            box = torch.stack([left, top, right, bottom], -1)
            everything = torch.tensor([0, 0, pixels.shape[-1], pixels.shape[-2]]).float()
            sees_none = ~box.isfinite().all(-1) | (box == everything).all(-1)
            box[sees_none] = float("nan")
            boxes[stream] = box
        return boxes


def _noise(pixels: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(pixels.shape, generator=generator).to(pixels) + 1


def _silence(call: Call) -> Any:
    if isinstance(call.out, tuple):
        return (torch.zeros_like(call.out[0]), *call.out[1:])
    return torch.zeros_like(call.out)


def painted(image_processor: Any, original: ImageSize, size: ImageSize) -> Placement:
    """Scale and offset along both axes, from the width and middle of a painted square."""
    width, height = original
    black = np.zeros((height, width, 3), np.uint8)
    side = min(width, height) // 4  # small enough to be inside of what a centre crop leaves
    left, top = (width - side) // 2, (height - side) // 2
    part = (left, top, left + side, top + side)
    with_part = black.copy()
    with_part[part[1] : part[3], part[0] : part[2]] = 255

    def processed(pixels: NDArray[np.uint8]) -> Tensor:
        found = image_processor(images=[Image.fromarray(pixels)], return_tensors="pt")
        images = [v for v in found.values() if isinstance(v, Tensor) and v.is_floating_point()]
        is_one = len(images) == 1 and images[0].numel() <= 4 * size[0] * size[1]
        if not is_one or tuple(images[0].shape[-2:]) != (size[1], size[0]):
            raise AdapterError(
                f"{type(image_processor).__name__} makes "
                f"{[tuple(image.shape) for image in images]} of an image of {original} (width, "
                f"height), but the model was given {size}. Boxes cannot be placed. {WRITE_ONE}"
            )
        return images[0].double().reshape(-1, *images[0].shape[-2:]).mean(0)

    if image_processor is None or side == 0:
        raise AdapterError(
            f"Boxes in original pixels need an image processor, and images of more than a few "
            f"pixels; there is {type(image_processor).__name__}, and an image of {original}."
        )
    moved = (processed(with_part) - processed(black)).abs()
    if not moved.any():
        raise AdapterError(
            f"The painted middle of a picture of {original} is nowhere in what "
            f"{type(image_processor).__name__} makes of it. Boxes cannot be placed. {WRITE_ONE}"
        )
    scale, cut = [], []
    for axis, (low, high) in enumerate([(part[0], part[2]), (part[1], part[3])]):
        along = moved.sum(axis)
        along = along / along.max().clamp(min=1e-9)
        if along[0] > 1e-3 or along[-1] > 1e-3:
            raise AdapterError(
                f"{type(image_processor).__name__} cuts through the middle of an image of "
                f"{original}. Boxes cannot be placed. {WRITE_ONE}"
            )
        position = torch.arange(len(along), dtype=torch.float64) + 0.5
        length = float(along.sum())
        middle = float((along * position).sum() / max(length, 1e-9))
        scale.append(length / (high - low))
        cut.append(scale[-1] * (low + high) / 2 - middle)
    return Placement(original, (scale[0], scale[1]), (cut[0], cut[1]))
