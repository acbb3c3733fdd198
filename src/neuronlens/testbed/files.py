"""Scenes as samples, in memory or as the files a user would have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from neuronlens.errors import OutputError
from neuronlens.samples import Annotation, Sample
from neuronlens.testbed.world import PROMPT, draw


def scenes(n: int, seed: int = 0) -> list[Sample]:
    """The first `n` scenes of a stream, as samples with exact masks.

    Each object's annotation is named by its colour, shape and size; the ground's by its
    texture. The domain is the texture.
    """
    samples = []
    for index in range(n):
        scene = draw(seed, index)
        labels = scene.labels
        samples.append(
            Sample(
                id=f"scene-{seed}-{index}",
                images=(Image.fromarray(scene.image),),
                prompt=PROMPT,
                response=scene.caption,
                domain=scene.texture,
                annotations=tuple(
                    Annotation(names, labels, number) for number, names in scene.names.items()
                ),
            )
        )
    return samples


def write(folder: str | Path, n: int, seed: int = 0) -> Path:
    """Write scenes as PNG images, PNG label maps and a JSONL, as a user's data would lie.

    Returns:
        The JSONL, for `read_samples`.

    Raises:
        OutputError: If the folder cannot be written.
    """
    folder = Path(folder)
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / "masks").mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror}.") from error
    lines = []
    for index in range(n):
        scene = draw(seed, index)
        image, mask = f"images/{index:05}.png", f"masks/{index:05}.png"
        Image.fromarray(scene.image).save(folder / image)
        Image.fromarray(scene.labels).save(folder / mask)
        lines.append(
            json.dumps(
                {
                    "id": f"scene-{seed}-{index}",
                    "image": image,
                    "prompt": PROMPT,
                    "response": scene.caption,
                    "domain": scene.texture,
                    "annotations": [{"labels": mask, "names": scene.names}],
                }
            )
        )
    path = folder / "samples.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def shuffled(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """The samples with each one's annotations taken from another: a control.

    What is named "red" is then red in some other image. Captions stay, since they are what
    the model reads.
    """
    order = np.random.default_rng(seed).permutation(len(samples))
    # Along one cycle through all samples, none keeps its own.
    given = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    return [
        replace(sample, annotations=samples[given[i]].annotations)
        for i, sample in enumerate(samples)
    ]
