"""How the worked examples were made: `python -m neuronlens.testbed.worked --out folder`.

Neurons were chosen and the answers written by someone who looked at the pictures and the lists.
Each answer says only what its two exemplars show; tests/test_worked.py tries them on other scenes.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from neuronlens.adapters import adapt
from neuronlens.errors import OutputError
from neuronlens.exemplars import Exemplar, exemplars
from neuronlens.neurons import NeuronId
from neuronlens.scan import scan
from neuronlens.testbed import load, scenes
from neuronlens.worked import WORKED_VERSION, Kind

SCENE_SEED: Final = 97
SCENES: Final = 300
QUALITY: Final = 85


@dataclass(frozen=True)
class Answer:
    """What was seen of a neuron at two of its ranks, and what is to be said of it."""

    kind: Kind
    ranks: tuple[int, int]
    sentence: str
    phrases: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    predicts: bool = False
    confidence: float = 0.9


# Phrases are names that the scenes' annotations know, so that every answer can be scored.
ANSWERS: Final = {
    "projector.0/72": Answer(
        "visual",
        (3, 4),
        "shapes in warm, bright hues, both yellow and orange, whatever their outline",
        phrases=("yellow", "orange"),
    ),
    "vision.0/57": Answer(
        "visual",
        (1, 4),
        "areas filled with blue and, more faintly, those filled with purple",
        phrases=("blue", "purple"),
        confidence=0.8,
    ),
    "language.1/153": Answer(
        "visual",
        (1, 6),
        "green things of any outline and size",
        phrases=("green",),
        confidence=0.95,
    ),
    "language.3/333": Answer(
        "visual",
        (4, 9),
        "discs of any size and colour, but neither rings nor shapes with corners",
        phrases=("circle",),
    ),
    "projector.0/62": Answer(
        "visual",
        (5, 7),
        "round outlines with a hole in the middle, whatever their colour",
        phrases=("ring",),
    ),
    "vision.2/231": Answer(
        "visual",
        (1, 6),
        "the smooth, plain ground where nothing is drawn",
        phrases=("plain",),
        confidence=0.75,
    ),
    "projector.0/29": Answer(
        "visual",
        (1, 7),
        "a ground of dark and light stripes, where no shape covers it",
        phrases=("striped",),
        confidence=0.85,
    ),
    "projector.0/14": Answer(
        "visual",
        (1, 9),
        "the inner part of large filled shapes of any colour, and small ones hardly at all",
        phrases=("large",),
        confidence=0.6,
    ),
    "language.0/178": Answer(
        "text",
        (1, 5),
        "the marks that separate the members of a listing",
        words=(",", "and"),
    ),
    "language.0/377": Answer(
        "text",
        (1, 3),
        "the last word of an expression for where one thing lies as seen from another",
        words=("above", "below", "of"),
        confidence=0.75,
    ),
    "language.0/159": Answer(
        "text",
        (1, 2),
        "the number of things, if more than one, right where it is stated",
        words=("two", "three"),
        confidence=0.65,
    ),
    "language.0/354": Answer(
        "text",
        (1, 2),
        "full stops, most of all the one that ends the whole text",
        words=(".",),
        confidence=0.85,
    ),
    "language.2/31": Answer(
        "text",
        (1, 2),
        "the token after which an indefinite article comes, because something new is mentioned",
        words=("a",),
        predicts=True,
    ),
    "language.3/30": Answer(
        "text",
        (1, 17),
        "the token after which something is called small",
        words=("small",),
        predicts=True,
    ),
    "language.3/40": Answer(
        "text",
        (1, 2),
        "the token right ahead of a colour, most of all of reddish ones",
        words=("red", "orange", "green", "purple"),
        predicts=True,
        confidence=0.75,
    ),
    "language.1/294": Answer(
        "text",
        (3, 4),
        "the token right ahead of a triangle's name and, less strongly, ahead of a mention of "
        "stripes",
        words=("triangle", "striped"),
        predicts=True,
        confidence=0.6,
    ),
    "language.0/393": Answer(
        "multimodal",
        (3, 6),
        "blue things in the picture, and the word for this colour",
        phrases=("blue",),
        words=("blue",),
        confidence=0.95,
    ),
    "language.0/327": Answer(
        "multimodal",
        (2, 5),
        "filled round shapes in the picture, and the word for them in the text",
        phrases=("circle",),
        words=("circle",),
        confidence=0.85,
    ),
    "language.0/361": Answer(
        "multimodal",
        (1, 3),
        "crosses, both where they are drawn and where the text names them",
        phrases=("cross",),
        words=("cross",),
    ),
    "language.3/329": Answer(
        "multimodal",
        (1, 6),
        "squares in the picture, and in the text the token right ahead of their name",
        phrases=("square",),
        words=("square",),
        predicts=True,
        confidence=0.85,
    ),
    "language.3/312": Answer(
        "multimodal",
        (2, 5),
        "purple things in the picture, and the token after which the text calls something purple",
        phrases=("purple",),
        words=("purple",),
        predicts=True,
        confidence=0.8,
    ),
    "language.2/371": Answer(
        "multimodal",
        (1, 4),
        "diamonds in the picture, and in the text the token that leads up to their name",
        phrases=("diamond",),
        words=("diamond",),
        predicts=True,
        confidence=0.8,
    ),
    "language.3/129": Answer(
        "multimodal",
        (3, 6),
        "red things and, less strongly, blue ones, and the token right ahead of these colours",
        phrases=("red", "blue"),
        words=("red", "blue"),
        predicts=True,
        confidence=0.65,
    ),
    "language.3/339": Answer(
        "multimodal",
        (1, 6),
        "triangles in the picture, and in the text the token right ahead of their name as well as "
        "the opening words",
        phrases=("triangle",),
        words=("triangle",),
        predicts=True,
        confidence=0.5,
    ),
}


def record() -> dict[str, tuple[Exemplar, ...]]:
    """The exemplars of every neuron that has an answer, from a scan of `SCENES` scenes."""
    bed = load(planted=True)
    vlm = adapt(bed.model, bed.processor)
    shown = scenes(SCENES, seed=SCENE_SEED)
    neurons = {name: NeuronId.parse(name) for name in ANSWERS}
    ranks = sorted({rank for answer in ANSWERS.values() for rank in answer.ranks})
    with tempfile.TemporaryDirectory() as folder:
        atlas = scan(
            vlm,
            shown,
            out=Path(folder) / "atlas",
            sites=sorted({neuron.site for neuron in neurons.values()}),
            n=ranks[-1],
        )
        found = exemplars(vlm, atlas, neurons.values(), explain=ranks, held_out=(), samples=shown)
    return {
        name: tuple(each for each in found[neuron].explain if each.rank in ANSWERS[name].ranks)
        for name, neuron in neurons.items()
    }


def integers(exemplar: Exemplar) -> list[tuple[str, int]]:
    """The response's tokens with their levels, rounded down (docs/methods.md, row 3)."""
    # The maximum itself, recorded again in another batch, may fall short of 10 by rounding.
    level = np.floor(exemplar.level + 1e-4).astype(int)
    pieces = exemplar.tokens.pieces or ()
    return [
        (piece, int(value))
        for piece, value, counts in zip(pieces, level, exemplar.text, strict=True)
        if counts
    ]


def write(out: Path, found: dict[str, tuple[Exemplar, ...]]) -> None:
    """Write `worked.json` and its pictures into a folder.

    Raises:
        OutputError: If the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(_neuron(out, name, found[name])) for name in ANSWERS]
        (out / "worked.json").write_text(
            f'{{"version": "{WORKED_VERSION}", "model": "neuronlens-testbed, planted", '
            f'"scenes_seed": {SCENE_SEED}, "neurons": [\n' + ",\n".join(lines) + "\n]}\n",
            encoding="utf-8",
        )
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error}.") from error


def _neuron(out: Path, name: str, shown: tuple[Exemplar, ...]) -> dict[str, object]:
    answer = ANSWERS[name]
    return {
        "neuron": name,
        "kind": answer.kind,
        "sentence": answer.sentence,
        "phrases": answer.phrases,
        "words": answer.words,
        "predicts": answer.predicts,
        "confidence": answer.confidence,
        "exemplars": [_exemplar(out, answer.kind, each) for each in shown],
    }


def _exemplar(out: Path, kind: Kind, exemplar: Exemplar) -> dict[str, object]:
    raw = modulated = None
    if kind != "text":
        painted = exemplar.pictures()[0]
        scene = exemplar.sample.id
        raw = _save(out, scene, painted.image)
        neuron = str(exemplar.neuron).replace("/", "-")
        modulated = _save(out, f"{neuron}-{scene}", painted.modulated)
    return {
        "scene": exemplar.sample.id,
        "rank": exemplar.rank,
        "raw": raw,
        "modulated": modulated,
        "tokens": [] if kind == "visual" else integers(exemplar),
    }


def _save(out: Path, name: str, picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    (out / f"{name}.jpg").write_bytes(buffer.getvalue())
    return f"{name}.jpg"


def main() -> None:
    """Make the folder that ships."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    write(given.out, record())


if __name__ == "__main__":
    main()
