"""Procedural scenes with exact masks: what the testbed's model was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

SIZE: Final = 64
"""Width and height of a scene in pixels."""

COLOURS: Final = {
    "red": (214, 44, 44),
    "green": (44, 160, 60),
    "blue": (52, 84, 214),
    "yellow": (232, 214, 52),
    "purple": (146, 60, 176),
    "orange": (240, 138, 32),
}
SHAPES: Final = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES: Final = {"small": (8.5, 10.5), "large": (14.0, 17.0)}
TEXTURES: Final = ("plain", "striped", "checked", "dotted")
NUMBERS: Final = ("one", "two", "three")
CONCEPTS: Final = (*COLOURS, *SHAPES, *SIZES, *TEXTURES)
"""Every name an annotation of a scene can carry."""

PROMPT: Final = "describe the image ."


@dataclass(frozen=True)
class Object:
    """One shape of a scene.

    `mask` is exact: a pixel belongs to the object if its centre does.
    """

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Scene:
    """An image of one to three shapes on a grey, textured ground, and what is in it.

    `objects` run from left to right, the order in which the caption names them.
    """

    image: NDArray[np.uint8]
    objects: tuple[Object, ...]
    texture: str

    @property
    def caption(self) -> str:
        """The description the model learns to give; one word is one token."""
        named = [f"a {o.size} {o.colour} {o.shape}" for o in self.objects]
        listed = named[0] if len(named) == 1 else f"{' , '.join(named[:-1])} and {named[-1]}"
        sentences = [f"the image shows {listed} on a {self.texture} background ."]
        if len(self.objects) == 1:
            only = self.objects[0]
            sentences.append(f"the {only.colour} {only.shape} is {only.size} .")
        for a, b in zip(self.objects, self.objects[1:], strict=False):
            sentences.append(
                f"the {a.colour} {a.shape} is {relation(a, b)} the {b.colour} {b.shape} ."
            )
        many = len(self.objects)
        sentences.append(
            f"there {'is' if many == 1 else 'are'} {NUMBERS[many - 1]} "
            f"object{'' if many == 1 else 's'} ."
        )
        return " ".join(sentences)

    @property
    def labels(self) -> NDArray[np.uint8]:
        """Object number (from 1, left to right) of every pixel; 0 is the ground."""
        labels = np.zeros((SIZE, SIZE), np.uint8)
        for number, item in enumerate(self.objects, 1):
            labels[item.mask] = number
        return labels

    @property
    def names(self) -> dict[int, tuple[str, ...]]:
        """What each number in `labels` is called."""
        return {0: (self.texture,)} | {
            number: (o.colour, o.shape, o.size) for number, o in enumerate(self.objects, 1)
        }


def relation(a: Object, b: Object) -> str:
    """Where `a` lies seen from `b`, which is not to its left."""
    if b.x - a.x >= abs(b.y - a.y):
        return "left of"
    return "above" if a.y < b.y else "below"


def questions(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Three questions about the scene, each with its answer."""
    asked: list[tuple[str, str]] = []
    for kind in rng.permutation(5)[:3]:
        item = scene.objects[rng.integers(len(scene.objects))]
        same_shape = [o for o in scene.objects if o.shape == item.shape]
        same_colour = [o for o in scene.objects if o.colour == item.colour]
        if kind == 0 and len({o.colour for o in same_shape}) == 1:
            asked.append((f"what colour is the {item.shape} ?", f"{item.colour} ."))
        elif kind == 1 and len({o.shape for o in same_colour}) == 1:
            asked.append((f"what shape is the {item.colour} object ?", f"{item.shape} ."))
        elif kind == 2 and len({o.size for o in same_shape}) == 1:
            asked.append((f"what size is the {item.shape} ?", f"{item.size} ."))
        elif kind == 3:
            asked.append(("how many objects are there ?", f"{NUMBERS[len(scene.objects) - 1]} ."))
        else:
            asked.append(("what is the background ?", f"{scene.texture} ."))
    return asked


def draw(seed: int, index: int) -> Scene:
    """Scene number `index` of the stream `seed`; scenes of a stream do not depend on each other."""
    rng = np.random.default_rng([seed, index])
    texture = TEXTURES[rng.integers(len(TEXTURES))]
    canvas = _ground(texture, rng)
    objects: list[Object] = []
    for shape, colour, size, x, y, radius in _placed(rng):
        distance = _distance(shape, x, y, radius)
        shade = np.array(COLOURS[colour]) + rng.uniform(-12, 12, 3)
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        canvas = canvas * (1 - cover) + shade * cover
        objects.append(Object(colour, shape, size, x, y, radius, distance < 0))
    canvas += rng.normal(0, 5, canvas.shape)
    objects.sort(key=lambda o: o.x)
    return Scene(np.clip(np.rint(canvas), 0, 255).astype(np.uint8), tuple(objects), texture)


def _placed(rng: np.random.Generator) -> list[tuple[str, str, str, float, float, float]]:
    """Shapes that do not overlap and lie wholly inside the picture."""
    wanted = int(rng.integers(1, 4))
    placed: list[tuple[str, str, str, float, float, float]] = []
    while len(placed) < wanted:
        # Three large shapes do not fit: after some failures only small ones are tried.
        for attempt in range(60):
            size = "small" if attempt >= 20 else tuple(SIZES)[rng.integers(2)]
            radius = float(rng.uniform(*SIZES[size]))
            x, y = rng.uniform(radius + 1, SIZE - radius - 1, 2)
            if all(np.hypot(x - p[3], y - p[4]) > radius + p[5] + 1 for p in placed):
                shape = SHAPES[rng.integers(len(SHAPES))]
                colour = tuple(COLOURS)[rng.integers(len(COLOURS))]
                placed.append((shape, colour, size, float(x), float(y), radius))
                break
        else:
            placed.clear()
    return placed


def _grid() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    return columns, rows


def _distance(shape: str, x: float, y: float, r: float) -> NDArray[np.float64]:
    """Signed distance of every pixel centre to the outline, negative inside."""
    columns, rows = _grid()
    u, v = columns - x, rows - y
    if shape == "circle":
        return np.hypot(u, v) - r
    if shape == "square":
        return np.maximum(abs(u), abs(v)) - 0.8 * r
    if shape == "triangle":
        half, down = 0.866 * abs(u), 0.5 * v
        return np.asarray(np.maximum(half - down - 0.5 * r, v - 0.6 * r))
    if shape == "diamond":
        return np.asarray((abs(u) + abs(v) - r) / np.sqrt(2))
    if shape == "cross":
        bar = 0.32 * r
        upright = np.maximum(abs(u) - bar, abs(v) - r)
        level = np.maximum(abs(u) - r, abs(v) - bar)
        return np.minimum(upright, level)
    if shape == "ring":
        return np.asarray(abs(np.hypot(u, v) - 0.72 * r) - 0.28 * r)
    raise ValueError(f"No shape {shape!r}. Known: {', '.join(SHAPES)}.")


def _ground(texture: str, rng: np.random.Generator) -> NDArray[np.float64]:
    columns, rows = _grid()
    base, contrast = rng.uniform(105, 165), rng.uniform(26, 40)
    dx, dy = rng.uniform(0, 8, 2)
    if texture == "striped":
        tone = np.sign(np.sin((rows + dy) * (2 * np.pi / 6)))
    elif texture == "checked":
        tone = np.where((((columns + dx) // 5) + ((rows + dy) // 5)) % 2 == 0, 1.0, -1.0)
    elif texture == "dotted":
        u, v = (columns + dx) % 7 - 3.5, (rows + dy) % 7 - 3.5
        tone = np.where(np.hypot(u, v) < 2.0, 1.6, -0.4)
    else:
        tone = np.zeros((SIZE, SIZE))
    return np.repeat((base + contrast * tone)[..., None], 3, axis=2)
