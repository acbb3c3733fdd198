"""The whole pipeline in one go: from images and captions to explained, scored neurons.

Runs on the embedded testbed, beside its controls. The README has the same job for a model
and data of your own.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import neuronlens as nl

LABELLED = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--scenes", type=int, default=500)
    given = parser.parse_args()
    started = time.perf_counter()
    shutil.rmtree(given.out, ignore_errors=True)

    bed = nl.testbed.load()
    vlm = nl.adapt(bed.model, bed.processor)
    untrained = nl.adapt(nl.testbed.untrained(), bed.processor)
    classifier = nl.NeuronClassifier(**nl.testbed.READINGS)

    print(f"Writing {given.scenes} scenes as images, masks and a JSONL, and reading them back ...")
    samples = nl.read_samples(nl.testbed.write(given.out / "data", given.scenes, seed=1))

    print("Scanning the trained model, and its untrained copy ...")
    atlas = nl.scan(vlm, samples, out=given.out / "atlas", progress=True)
    control_atlas = nl.scan(untrained, samples, out=given.out / "atlas-untrained", progress=True)
    kinds, control_kinds = classifier.classify(atlas), classifier.classify(control_atlas)

    print("Explaining neurons, simulating them from the explanation, scoring the simulation ...")
    study = nl.explain_neurons(vlm, atlas, chosen(kinds), kinds=kinds, out=given.out / "study")
    control = nl.explain_neurons(
        untrained,
        control_atlas,
        chosen(control_kinds),
        kinds=control_kinds,
        out=given.out / "study-untrained",
    )
    wrong = nl.explain_neurons(
        vlm,
        atlas,
        chosen(kinds),
        kinds=kinds,
        samples=nl.testbed.shuffled(samples),
        out=given.out / "study-shuffled",
    )
    page = nl.report(
        atlas,
        study,
        kinds=kinds,
        out=given.out,
        controls={
            "untrained copy": nl.Control(control_kinds, control),
            "annotations shuffled": nl.Control(kinds, wrong),
        },
        title="What the testbed's neurons find",
        note="A small model trained on synthetic scenes: figures made on it say “testbed”.",
    )
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Open {page.resolve()}")
    print(f"The records behind it: {', '.join(sorted(p.name for p in given.out.iterdir()))}")


def chosen(kinds: nl.Classification) -> list[nl.NeuronId]:
    """Up to 40 neurons of each category that says what to look at, drawn at random."""
    categories = ("visual", "text", "multimodal")
    return [n for c in categories for n in kinds.select(c, n=LABELLED, seed=0)]


if __name__ == "__main__":
    main()
