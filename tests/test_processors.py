"""Real processors end to end: from an original photograph to the box of every token."""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor

import neuronlens as nl
from real import Real, reals

REAL = reals()
SIZES = [(150, 100), (90, 160)]


def photo(number: int) -> Image.Image:
    """A real photograph, not square."""
    picture = (data.astronaut, data.chelsea, data.coffee)[number % 3]()
    return Image.fromarray(picture).resize(SIZES[number % 2])


def changed(image: Image.Image, region: tuple[int, int, int, int]) -> Image.Image:
    """The photograph with the pixels of one region turned to their negative."""
    pixels = np.array(image)
    left, top, right, bottom = region
    pixels[top:bottom, left:right] = 255 - pixels[top:bottom, left:right]
    return Image.fromarray(pixels)


def sample(real: Real, *images: Image.Image, id: str = "one") -> nl.Sample:
    return nl.Sample(id, images, real.prompt, real.response)


def first_input(real: Real, model: Any, batch: Any, unmixed: bool = False) -> Tensor:
    """What goes into the first layer of the language stack."""
    kept: list[Tensor] = []

    def keep(_m: Any, args: Any, kwargs: Any) -> None:
        if not kept:
            kept.append((args[0] if args else kwargs["hidden_states"]).clone())

    def silence(_m: Any, _args: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (torch.zeros_like(out[0]), *out[1:])
        return torch.zeros_like(out)

    with ExitStack() as stack:
        first = model.get_submodule(real.first)
        stack.callback(first.register_forward_pre_hook(keep, with_kwargs=True).remove)
        for name, module in model.named_modules():
            if unmixed and any(re.fullmatch(pattern, name) for pattern in real.mixers):
                stack.callback(module.register_forward_hook(silence).remove)
        with torch.no_grad():
            model(**batch.inputs)
    return kept[0]


def moved_between(before: Tensor, after: Tensor) -> Tensor:
    """Which tokens differ by more than rounding: experts in a tower are shared by all images."""
    return (before - after).abs().amax(-1) > 1e-4


@pytest.fixture(scope="module", params=sorted(REAL))
def real(request: Any) -> Real:
    return REAL[request.param]


@pytest.fixture(scope="module")
def vlm(real: Real) -> nl.ModelAdapter:
    model, processor = real.build()
    return nl.adapt(model, processor)


def test_text_roles_are_those_of_the_sample(real: Real, vlm: nl.ModelAdapter) -> None:
    samples = [sample(real, photo(0)), sample(real, photo(1), id="two")]
    batch = nl.encode(vlm, samples, template=real.template)
    for row in range(2):
        tokens, answer = batch.map_of(row), batch.map_of(row, vlm.answer_stream)
        said = {
            role: "".join(
                piece
                for piece, mine in zip(where.pieces or (), where.role.tolist(), strict=True)
                if mine == role
            )
            for role, where in ((nl.Role.PROMPT, tokens), (nl.Role.RESPONSE, answer))
        }
        assert said[nl.Role.RESPONSE].split() == real.response.split()
        assert said[nl.Role.PROMPT].split() == real.prompt.split()
        assert answer.role[-1] in (nl.Role.RESPONSE, nl.Role.SPECIAL)


def test_visual_tokens_are_those_that_depend_on_the_photo(real: Real, vlm: nl.ModelAdapter) -> None:
    images = [photo(0), photo(1)]
    negatives = [changed(image, (0, 0, *image.size)) for image in images]
    batches = [
        nl.encode(
            vlm,
            [sample(real, *row, id=str(i)) for i, row in enumerate(pictures)],
            template=real.template,
        )
        for pictures in ([[i] for i in images], [[i] for i in negatives])
    ]
    before, after = (first_input(real, vlm.model, batch) for batch in batches)
    visual = batches[0].tokens["language"].role == nl.Role.VISUAL
    assert torch.equal(moved_between(before, after).reshape(visual.shape), visual)
    assert bool(visual.any()) == (real.spatial != "none")
    if real.spatial == "none":
        return
    box = batches[0].tokens["language"].box[visual]
    assert bool((~box.isnan()).any()) == (real.spatial == "region")


def overlaps(box: Tensor, grow: float, region: tuple[int, int, int, int]) -> Tensor:
    left, top, right, bottom = region
    return (
        (box[:, 0] < right + grow)
        & (box[:, 2] > left - grow)
        & (box[:, 1] < bottom + grow)
        & (box[:, 3] > top - grow)
    )


def reach_of(real: Real, box: Tensor) -> float:
    """How far resampling and convolutions reach, in original pixels, by the smallest token."""
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    return real.margin * float(area.min()) ** 0.5 / 8


@pytest.mark.parametrize("number", [0, 1])
def test_boxes_are_where_the_photo_moves_tokens(
    real: Real, vlm: nl.ModelAdapter, number: int
) -> None:
    if real.spatial != "region":
        box = nl.encode(vlm, [sample(real, photo(number))], template=real.template)
        assert box.tokens["language"].box.isnan().all()
        return
    image = photo(number)
    width, height = image.size
    batch = nl.encode(vlm, [sample(real, image)], template=real.template)
    plain = first_input(real, vlm.model, batch, unmixed=True)
    tokens = batch.tokens["language"]
    box, role = tokens.box.reshape(-1, 4), tokens.role.flatten()
    seen = (role == nl.Role.VISUAL) & ~box.isnan().any(-1)
    assert box[seen].min() >= 0
    assert box[seen][:, 2].max() <= width
    assert box[seen][:, 3].max() <= height
    reach = reach_of(real, box[seen])
    checked = 0
    for region in [
        (0, 0, width // 3, height // 3),
        (width // 3, height // 4, 4 * width // 5, 2 * height // 3),
        (width // 2, height // 2, width, height),
    ]:
        other = nl.encode(vlm, [sample(real, changed(image, region))], template=real.template)
        after = first_input(real, vlm.model, other, unmixed=True)
        moved = moved_between(after, plain).flatten()

        surely = overlaps(box, -reach, region) & seen
        surely_not = ~overlaps(box, reach, region) & seen
        checked += int(surely.any()) + int(surely_not.any())
        assert moved[surely].all(), (region, box[surely & ~moved])
        assert not moved[surely_not].any(), (region, box[surely_not & moved])
    assert checked >= 4


def test_two_photos_in_one_sample_are_numbered(real: Real, vlm: nl.ModelAdapter) -> None:
    if not real.several:
        return
    images = [photo(0), photo(1)]
    batch = nl.encode(vlm, [sample(real, *images)], template=real.template)
    plain = first_input(real, vlm.model, batch)
    tokens = batch.tokens["language"]
    if real.spatial != "none":
        assert set(tokens.image[tokens.role == nl.Role.VISUAL].tolist()) == {0, 1}
    for which in (0, 1):
        pictures = list(images)
        pictures[which] = changed(images[which], (0, 0, *images[which].size))
        other = nl.encode(vlm, [sample(real, *pictures)], template=real.template)
        moved = moved_between(first_input(real, vlm.model, other), plain)
        assert torch.equal(moved.flatten(), (tokens.image == which).flatten())


def test_boxes_of_a_second_photo_and_of_a_second_sample_are_its_own(
    real: Real, vlm: nl.ModelAdapter
) -> None:
    if real.spatial != "region":
        return
    one, two = photo(0), photo(1)
    region = (two.width // 2, two.height // 2, two.width, two.height)

    def batch(second: Image.Image) -> Any:
        rows = [sample(real, one, id="a"), sample(real, second, id="b")]
        if real.several:
            rows = [sample(real, one, second, id="a"), sample(real, second, id="b")]
        return nl.encode(vlm, rows, template=real.template)

    made = batch(two)
    plain = first_input(real, vlm.model, made, unmixed=True)
    after = first_input(real, vlm.model, batch(changed(two, region)), unmixed=True)
    moved = moved_between(after, plain).flatten()
    tokens = made.tokens["language"]
    box, image, row = tokens.box.reshape(-1, 4), tokens.image.flatten(), tokens.sample.flatten()
    seen = (tokens.role.flatten() == nl.Role.VISUAL) & ~box.isnan().any(-1)
    is_two = (row == 1) | (image == 1)
    reach = reach_of(real, box[seen])
    surely = overlaps(box, -reach, region) & seen & is_two
    surely_not = seen & ~(overlaps(box, reach, region) & is_two)
    assert surely.any()
    assert surely_not.any()
    assert moved[surely].all()
    assert not moved[surely_not].any()
