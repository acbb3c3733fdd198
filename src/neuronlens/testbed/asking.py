"""Questions about scenes, each with its one answer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Final, Literal, NamedTuple

import numpy as np
from PIL import Image

from neuronlens.errors import UnknownNameError
from neuronlens.questions import Question
from neuronlens.testbed.world import COLOURS, NUMBERS, SHAPES, Scene, draw

KINDS: Final = ("colour", "shape", "size", "count", "background")
"""What questions about a scene ask for."""


class Asked(NamedTuple):
    """A question about a scene."""

    kind: str
    text: str
    answer: str
    colour: str | None
    """The colour that is asked for, or by which the object is called."""


def questions(
    n: int,
    seed: int = 0,
    kinds: str | Sequence[str] | None = None,
    *,
    domain: Literal["background", "colour"] = "background",
) -> list[Question]:
    """`n` questions, each about a scene of its own, in the words the testbed was trained with.

    Kinds take turns. A scene in which a kind cannot be asked, because two answers would be
    right, is passed over; so scenes differ between questions, and which they are does not
    depend on `n`. Put them to the model with the prompt `"chat"`; it answers one word and a
    full stop, as the reference has it.

    Args:
        n: How many.
        seed: Of the scenes; those of `scenes(seed=...)` with the same seed are the same.
        kinds: One or more of `colour`, `shape`, `size`, `count` and `background`; None for all.
        domain: What the domain is: the scene's background texture, or the colour that is asked
            for or about (None in a question without one).

    Raises:
        UnknownNameError: If there is no such kind or domain.
    """
    chosen = (kinds,) if isinstance(kinds, str) else KINDS if kinds is None else tuple(kinds)
    for each in chosen:
        if each not in KINDS:
            raise UnknownNameError("kind of question", each, KINDS)
    if domain not in ("background", "colour"):
        raise UnknownNameError("domain of questions", domain, ("background", "colour"))
    made: list[Question] = []
    scenes = count()
    while chosen and len(made) < n:
        index = next(scenes)
        scene = draw(seed, index)
        kind = chosen[len(made) % len(chosen)]
        able = [each for each in asked(scene) if each.kind == kind]
        if not able:
            continue
        # A stream of its own: the scene itself is drawn from [seed, index].
        one = able[np.random.default_rng([seed, index, 1]).integers(len(able))]
        made.append(
            Question(
                id=f"scene-{seed}-{index}-{kind}",
                images=(Image.fromarray(scene.image),),
                text=one.text,
                references=(one.answer,),
                domain=scene.texture if domain == "background" else one.colour,
                kind=kind,
            )
        )
    return made


def asked(scene: Scene) -> list[Asked]:
    """Every question about a scene that has exactly one answer."""
    found = []
    for shape in SHAPES:
        same = [each for each in scene.objects if each.shape == shape]
        colours, sizes = {each.colour for each in same}, {each.size for each in same}
        if len(colours) == 1:
            colour = colours.pop()
            found.append(Asked("colour", f"what colour is the {shape} ?", f"{colour} .", colour))
        if len(sizes) == 1:
            found.append(Asked("size", f"what size is the {shape} ?", f"{sizes.pop()} .", None))
    for colour in COLOURS:
        shapes = {each.shape for each in scene.objects if each.colour == colour}
        if len(shapes) == 1:
            found.append(
                Asked("shape", f"what shape is the {colour} object ?", f"{shapes.pop()} .", colour)
            )
    number = NUMBERS[len(scene.objects) - 1]
    found.append(Asked("count", "how many objects are there ?", f"{number} .", None))
    found.append(Asked("background", "what is the background ?", f"{scene.texture} .", None))
    return found
