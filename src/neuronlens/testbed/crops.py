"""Crops of real photographs and scans: small data with domains, without a download.

The pictures ship inside scikit-image and scikit-learn. Only files that are there are opened;
nothing is fetched, and neither package is imported.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from neuronlens.errors import DataError, MissingExtraError, UnknownNameError
from neuronlens.running import BLOCKS, block_of
from neuronlens.samples import Sample
from neuronlens.testbed.world import PROMPT

_SKIMAGE: Final = ("skimage", "scikit-image", "data")
_SKLEARN: Final = ("sklearn", "scikit-learn", "datasets/images")

_FILES: Final = {
    "common": {
        **dict.fromkeys(
            ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png"), _SKIMAGE
        ),
        **dict.fromkeys(("motorcycle_left.png", "rocket.jpg"), _SKIMAGE),
        **dict.fromkeys(("china.jpg", "flower.jpg"), _SKLEARN),
    },
    "medical": dict.fromkeys(("cell.png", "ihc.png", "microaneurysms.png", "retina.jpg"), _SKIMAGE),
    "document": dict.fromkeys(("page.png", "text.png"), _SKIMAGE),
    "texture": dict.fromkeys(("brick.png", "grass.png", "gravel.png", "moon.png"), _SKIMAGE),
}

_STRETCHES: Final = 12
"""The digits of scikit-learn are one data set, in the order of collection; each stretch of it
counts as one source, since neighbours are often by one writer."""

DOMAINS: Final = (*_FILES, "handwriting")
"""Domains of `photographs`, with 9, 4, 2, 4 and 12 sources."""

SMALLEST: Final = 96
LARGEST: Final = 224
_FLAT: Final = 4.0
_NAME = re.compile(r"photograph-([a-z0-9_]+)-\d+-\d+")


def photographs(
    n: int,
    seed: int = 0,
    domains: str | Sequence[str] | None = None,
    *,
    prompt: str = PROMPT,
    response: str | None = None,
    blocks: Literal["source", "sample"] = "source",
) -> list[Sample]:
    """`n` crops of real pictures for each domain, in memory.

    The domains are `common` (everyday scenes), `medical` (microscopy and retina), `document`
    (a printed and a hand-written page), `texture` (surfaces from above: bricks, grass, gravel,
    the moon) and `handwriting` (sheets of nine digits). A crop is a random square, from 96
    pixels wide to the whole shorter side, and made smaller to 224 pixels where it is larger.
    Crops of scenes may be mirrored, those of medical pictures and textures also turned, pages
    neither. A crop that is nearly one grey is drawn again.

    Crops of one photograph are not independent samples, and there are few photographs: a
    domain has 2 to 12 sources (`source_of` names a crop's). So by default all crops of one
    source are a group, and groups of a domain lie in different blocks of a scan: intervals and
    permutations over blocks then treat the photograph as the unit. Such a test knows little of
    a domain with two sources, and that is true. With so few sources, a neuron of a "domain" may
    as well be one of a photograph.

    Args:
        n: Crops per domain; source and crop of each do not depend on `n`.
        seed: Of the crops.
        domains: One or more of `DOMAINS`; None for all.
        prompt: The text beside each image; the default is what the testbed was trained with.
        response: The text said about each image; None for identification.
        blocks: `"source"`, or `"sample"` to let every crop fall into a block by itself, as if
            all were independent.

    Raises:
        MissingExtraError: If a package is not installed: the extra `photographs` brings both.
        UnknownNameError: If there is no such domain, or no such way to deal blocks.
        DataError: If an installed package does not hold a picture that is needed.
    """
    several = (domains,) if isinstance(domains, str) else domains
    chosen = DOMAINS if several is None else tuple(several)
    for each in chosen:
        if each not in DOMAINS:
            raise UnknownNameError("domain of photographs", each, DOMAINS)
    if blocks not in ("source", "sample"):
        raise UnknownNameError("way to deal blocks", blocks, ("source", "sample"))
    samples = []
    for domain in chosen:
        sources = _sources(domain)
        for number in range(n):
            place = number % len(sources)
            rng = np.random.default_rng([seed, DOMAINS.index(domain), number])
            name = f"photograph-{sources[place]}-{seed}-{number}"
            samples.append(
                Sample(
                    id=name,
                    images=(_drawn(domain, sources[place], rng),),
                    prompt=prompt,
                    response=response,
                    domain=domain,
                    group=_group(sources[place], place) if blocks == "source" else None,
                )
            )
    return samples


def source_of(sample: Sample) -> str:
    """Name of the picture a crop of `photographs` is from, such as `"chelsea"`.

    Raises:
        DataError: If the sample is not one of `photographs`.
    """
    found = _NAME.fullmatch(sample.id)
    if found is None:
        raise DataError(
            f"Sample {sample.id!r} is not of nl.testbed.photographs, so it has no source there."
        )
    return found[1]


def _sources(domain: str) -> list[str]:
    if domain == "handwriting":
        return [f"digits_{stretch:02}" for stretch in range(_STRETCHES)]
    return [name.split(".")[0] for name in _FILES[domain]]


def _group(source: str, place: int) -> str:
    """A group's name, with the smallest number that puts it into the block of its source.

    Sources of one domain have different blocks, as long as there are enough.
    """
    salt = 0
    while block_of(Sample("", (), "", group=f"{source}-{salt}").unit()) != place % BLOCKS:
        salt += 1
    return f"{source}-{salt}"


def _drawn(domain: str, source: str, rng: np.random.Generator) -> Image.Image:
    if domain == "handwriting":
        return _sheet(int(source.removeprefix("digits_")), rng)
    file = next(file for file in _FILES[domain] if file.split(".")[0] == source)
    picture = _picture(file, *_FILES[domain][file])
    for _ in range(100):
        crop = _crop(picture, rng)
        if np.asarray(crop.convert("L")).std() > _FLAT:
            break
    if domain != "document" and rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if domain in ("medical", "texture"):
        crop = crop.rotate(90 * int(rng.integers(4)))
    return crop


def _crop(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    side = int(rng.integers(SMALLEST, min(picture.size) + 1))
    left, top = (int(rng.integers(0, extent - side + 1)) for extent in picture.size)
    crop = picture.crop((left, top, left + side, top + side))
    return crop if side <= LARGEST else crop.resize((LARGEST, LARGEST), Image.Resampling.LANCZOS)


def _sheet(stretch: int, rng: np.random.Generator) -> Image.Image:
    """Nine digits of one stretch, three in a row, dark on white."""
    digits = np.array_split(_digits(), _STRETCHES)[stretch]
    chosen = digits[rng.choice(len(digits), 9, replace=False)].reshape(3, 3, 8, 8)
    ink = chosen.transpose(0, 2, 1, 3).reshape(24, 24) * (255 / 16)
    side = int(rng.integers(SMALLEST, LARGEST + 1))
    sheet = Image.fromarray(np.rint(255 - ink).astype(np.uint8)).convert("RGB")
    return sheet.resize((side, side), Image.Resampling.BICUBIC)


@lru_cache(maxsize=32)
def _picture(file: str, module: str, package: str, folder: str) -> Image.Image:
    path = _shipped(file, module, package, folder)
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{path} of {package} cannot be read: {error}.") from error


@lru_cache(maxsize=1)
def _digits() -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """1,797 digits of 8 x 8 pixels, from 0 (paper) to 16 (ink)."""
    path = _shipped("digits.csv.gz", "sklearn", "scikit-learn", "datasets/data")
    with gzip.open(path, "rt") as file:
        return np.loadtxt(file, delimiter=",")[:, :64]


def _shipped(file: str, module: str, package: str, folder: str) -> Path:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise MissingExtraError(package, "photographs", "Photographs of the testbed")
    path = Path(spec.origin).parent / folder / file
    if not path.is_file():
        raise DataError(
            f"The installed {package} does not ship {file}: there is no {path}. Install another "
            "release, or choose other domains."
        )
    return path
