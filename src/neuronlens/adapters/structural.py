"""The adapter for models nobody registered: sites by structure, tokens by experiment.

Blocks are found by what they are made of, activations that are functions by running a copy
of their block, visual tokens and what they see by changing pixels. What was established, and
how, is told in `established`; what cannot be is an error that says what to write.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from neuronlens.adapters.base import ANY, register
from neuronlens.adapters.discover import Block, features, feed_forward_blocks, is_activation
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.geometry import Placement
from neuronlens.adapters.grids import Grid, ImageSize, Seen
from neuronlens.adapters.taps import DownInput, Functional, Tap
from neuronlens.errors import AdapterError
from neuronlens.hooks import Call, Point, attached
from neuronlens.tokens import Role

WRITE_ONE = "Write an adapter that says it: docs/adapters.md."

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu (tanh)": lambda x: F.gelu(x, approximate="tanh"),
    "gelu (quick)": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu squared": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""Activation functions that a block is tried for."""

KEPT = 64
"""For how many shapes of images what was established is kept."""

STRIPES = 64
"""The finest experiment: an image is changed in this many stripes along each axis."""


@register(ANY)
class StructuralAdapter(FamilyAdapter):
    """Sites by structure, visual tokens and boxes by experiment.

    The stack next to the token embedding is the language model; other numbered blocks are
    the vision encoder's, blocks without a number the projector's. To know the tokens of some
    inputs, the model is run up to its first language layer, with pixels changed: twice for
    every text, and many times, once, for every shape of the images. The first axis of
    `pixel_values` counts the images, its last two are pixels.

    Attributes:
        established: What was found out, and how, in the order in which it was.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.established: list[str] = []
        self._seen: dict[tuple[Any, ...], Seen] = {}
        self._last: tuple[tuple[Any, ...], Tensor, Seen] | None = None
        self._places: dict[tuple[ImageSize, ImageSize], Placement] = {}
        super().__init__(*args, **kwargs)

    # Sites.

    def check_model(self) -> None:
        """Find the language stack: the numbered blocks next to the token embedding."""
        self._found = [*feed_forward_blocks(self.model), *_functional(self.model, self._say)]
        order = {path: i for i, (path, _) in enumerate(self.model.named_modules())}
        self._found.sort(key=lambda block: order[block.path])
        lists = list(dict.fromkeys(filter(None, (_list_of(each.path) for each in self._found))))
        # A list whose name says that it sees is not the language model's if there is another.
        named = FamilyAdapter.stack_of
        lists = [path for path in lists if named(self, path) == "language"] or lists
        if not lists:
            raise AdapterError(
                f"{type(self.model).__name__} has no feed-forward block in a list of layers, that "
                f"is, no activation module between two projections. {WRITE_ONE}"
            )
        embedding = self._embedding_path()
        ranked = {path: (-_common(path, embedding), path.count(".")) for path in lists}
        nearest = [path for path in lists if ranked[path] == min(ranked.values())]
        if len(nearest) > 1:
            raise AdapterError(
                f"{type(self.model).__name__} has {len(nearest)} lists of layers that are equally "
                f"near to the token embedding {embedding!r}: {', '.join(nearest)}. Which of them "
                f"is the language model cannot be told. {WRITE_ONE}"
            )
        self._language = nearest[0]
        self._say(
            f"language: the blocks in {self._language!r}, the list of layers nearest to the token "
            f"embedding {embedding!r}"
        )

    def _embedding_path(self) -> str:
        model: Any = self.model
        embedding = None
        with suppress(NotImplementedError, AttributeError):
            embedding = model.get_input_embeddings()
        tables: dict[str, nn.Embedding] = {
            path: m for path, m in self.model.named_modules() if isinstance(m, nn.Embedding)
        }
        for path, module in tables.items():
            if module is embedding:
                return path
        if not tables:
            raise AdapterError(
                f"{type(self.model).__name__} has no token embedding, so its language model cannot "
                f"be told. {WRITE_ONE}"
            )
        return max(tables, key=lambda path: tables[path].num_embeddings)

    def _say(self, what: str) -> None:
        if what not in self.established:
            self.established.append(what)

    def blocks(self) -> Iterable[Block]:
        """Blocks with an activation module, and blocks whose activation is a function."""
        return self._found

    @property
    def language_list(self) -> str:
        """Path of the list of the language model's layers."""
        return self._language

    def stack_of(self, path: str) -> str | None:
        """Language, vision or projector, by where the block is."""
        if path.startswith(f"{self._language}."):
            return "language"
        known = super().stack_of(path)
        if known is None and any(block.path == path for block in self._found):
            self._say(f"left out: {path!r}, named like an audio part, a head or a pooler")
        if known != "language":
            return known
        return "projector" if _list_of(path) is None else "vision"

    # Tokens.

    def placeholders(
        self, inputs: Mapping[str, Any], ids: Int[Tensor, "batch token"]
    ) -> Bool[Tensor, "batch token"]:
        """The positions at which the language model's input moves with the pixels."""
        if not self.has_images(inputs):
            return super().placeholders(inputs, ids)
        return self._experiment(inputs)[0]

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """What tokens see, by changing the image stripe by stripe without any mixing."""
        return self._experiment(inputs)[1]

    def place(self, original: ImageSize, size: ImageSize, index: int) -> Placement:
        """Where an image lies in the processed one, by processing a picture with a painted part.

        Raises:
            AdapterError: If the processor makes something else of it than one image.
        """
        if (original, size) not in self._places:
            self._places[original, size] = _painted(self.image_processor, original, size)
            self._say(
                "boxes in original pixels: where the image processor puts the painted middle of "
                "a picture"
            )
        return self._places[original, size]

    def _experiment(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Seen]:
        """Visual positions, by two runs per text; what they see, once per shape of the images."""
        whole = _key(inputs)
        if self._last is None or self._last[0] != whole:
            if next(self.model.parameters()).device.type == "meta":
                raise AdapterError(
                    "What tokens are and see is established by running the model, which a model "
                    "on the meta device cannot. Load its weights first."
                )
            text = self.text(inputs).shape
            images = _key(
                {
                    name: value
                    for name, value in inputs.items()
                    if isinstance(value, Tensor)
                    and (value.is_floating_point() or value.shape != text)
                }
            )
            experiment = _Experiment(self, inputs)
            seen = self._seen.pop(images, None)
            here = None if seen is None else experiment.positions()
            expected = 0 if seen is None or seen.language is None else len(seen.language.role)
            if seen is None or here is None or int(here.sum()) != expected:
                here, seen = experiment.result()
            self._seen[images] = seen
            while len(self._seen) > KEPT:
                self._seen.pop(next(iter(self._seen)))
            self._last = (whole, here, seen)
        return self._last[1], self._last[2]

    def __repr__(self) -> str:
        return super().__repr__()[:-1] + f"; {len(self.established)} things established)"


def _painted(image_processor: Any, original: ImageSize, size: ImageSize) -> Placement:
    """Scale and offset along both axes, from the width and middle of a painted square."""
    width, height = original
    black = np.zeros((height, width, 3), np.uint8)
    side = min(width, height) // 4  # small enough to be inside of what a centre crop leaves
    left, top = (width - side) // 2, (height - side) // 2
    part = (left, top, left + side, top + side)
    painted = black.copy()
    painted[part[1] : part[3], part[0] : part[2]] = 255

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
    moved = (processed(painted) - processed(black)).abs()
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


def _list_of(path: str) -> str | None:
    """The path of the list of layers a block is in; None if it is in none."""
    steps = path.split(".")
    numbered = [i for i, step in enumerate(steps) if step.isdigit() and i + 1 < len(steps)]
    return ".".join(steps[: numbered[0]]) if numbered else None


def _common(a: str, b: str) -> int:
    count = 0
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        count += 1
    return count


# Activations that are functions.


def _functional(model: nn.Module, say: Callable[[str], None]) -> Iterator[Block]:
    """Blocks of two or three projections without an activation module, tried for a function."""
    found: dict[tuple[object, ...], tuple[str, str, str | None, str]] = {}
    for path, block in model.named_modules():
        projections = _candidate(block)
        if projections is None:
            continue
        key = (type(block), tuple(sorted(projections.items())))
        if key not in found:
            established = _tried(block, list(projections))
            if established is None:
                continue
            found[key] = established
            before, function, up, down = established
            product = f" * {up}" if up else ""
            say(
                f"{type(block).__name__}: {down} takes {function}({before}){product}, as a copy "
                "of the block with random weights showed"
            )
        before, function, up, down = found[key]
        width, _ = features(block.get_submodule(down)) or (0, 0)
        tap: Tap = DownInput(f"{path}.{down}")
        if up is not None:
            tap = Functional(
                path, f"{path}.{before}", FUNCTIONS[function], f"{path}.{down}", f"{path}.{up}"
            )
        yield Block(path, function, tap, width)


def _candidate(block: nn.Module) -> dict[str, tuple[int, int]] | None:
    """The projections of a block without activation module: into a width and out of it.

    None for what is no such block.
    """
    children = dict(block.named_children())
    if any(is_activation(child) for child in children.values()) or isinstance(
        block, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    ):
        return None
    sizes = {name: size for name, child in children.items() if (size := features(child))}
    if len(sizes) not in (2, 3):
        return None
    for down, (width, out) in sizes.items():
        rest = [size for name, size in sizes.items() if name != down]
        if all(size == (out, width) for size in rest) and width != out:
            return sizes
    return None


def is_feed_forward(block: nn.Module) -> bool:
    """Whether a block without an activation module is two or three projections and a function."""
    projections = _candidate(block)
    if projections is None:
        return False
    try:
        return _tried(block, list(projections)) is not None
    except AdapterError:  # gated by a function that is not known, or two maps in a row
        return len(projections) == 3


def _tried(block: nn.Module, names: Sequence[str]) -> tuple[str, str, str | None, str] | None:
    """Which projection goes through which function, and into which: by running a copy."""
    twin = copy.deepcopy(block).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    taken: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Call], None]:
        def see(call: Call) -> None:
            taken[name], given[name] = call.args[0], call.out

        return see

    points = {name: [Point(twin.get_submodule(name), keep(name))] for name in names}
    wide = features(twin.get_submodule(names[0])) or (1, 1)
    down = next(
        name
        for name in names
        if all(
            (features(twin.get_submodule(o)) or (0, 0))[1]
            == (features(twin.get_submodule(name)) or (0, 0))[0]
            for o in names
            if o != name
        )
    )
    first = next(name for name in names if name != down)
    wide = features(twin.get_submodule(first)) or wide
    try:
        with torch.no_grad(), attached(points):
            twin(torch.randn(1, 5, wide[0], generator=generator))
    except Exception:  # noqa: BLE001 - whatever it is, it is no block that takes one tensor
        return None
    others = [name for name in names if name != down]
    for before in others:
        up = next((name for name in others if name != before), None)
        for function, act in FUNCTIONS.items():
            value = act(given[before])
            value = value if up is None else value * given[up]
            if value.shape == taken[down].shape and torch.allclose(value, taken[down], atol=1e-5):
                return before, function, up, down
    raise AdapterError(
        f"{type(block).__name__} looks like a feed-forward block ({', '.join(names)}), but what "
        f"{down} takes is none of {', '.join(FUNCTIONS)} of the other projections. {WRITE_ONE} "
        "Declare it with special_block."
    )


# Tokens by experiment.


class _FirstLayerReachedError(Exception):
    """The first language layer was reached: the rest of the forward is not needed."""


class _Experiment:
    """What the tokens of some inputs are and see, by changing pixels."""

    def __init__(self, adapter: StructuralAdapter, inputs: Mapping[str, Any]) -> None:
        adapter.require_eval()
        self.adapter = adapter
        self.inputs = dict(inputs)
        self.pixels = self._pixels()
        sites = adapter.sites.values()
        self.first = f"{adapter.language_list}.0"
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
            within = _list_of(site.path)
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
        self.adapter._say(
            f"visual tokens: the {int(flat.sum())} positions whose input to {self.first!r} moves "
            f"with the pixels of {self.pixels} {tuple(pixels.shape)}"
        )
        self.adapter._say(
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
            if isinstance(module, nn.Conv2d) and not path.startswith(self.adapter.language_list):
                patch = module.stride[0]
                if module.kernel_size == module.stride == (patch, patch) and size % patch == 0:
                    return int(patch)
                break
        step = max(1, size // STRIPES)
        if step > 1:
            self.adapter._say(f"boxes are told to within {step} pixels of the processed image")
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


def _key(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Shapes of the floating inputs, and the whole of the others."""
    return tuple(
        (
            name,
            tuple(value.shape),
            None if value.is_floating_point() else value.cpu().numpy().tobytes(),
        )
        for name, value in sorted(inputs.items())
        if isinstance(value, Tensor)
    )


def _silence(call: Call) -> Any:
    if isinstance(call.out, tuple):
        return (torch.zeros_like(call.out[0]), *call.out[1:])
    return torch.zeros_like(call.out)
