"""What share of a model's neurons is visual, text, multi-modal or unknown, and in which layers?

P1, Figures 5 to 7, and 21 to 23 for another model: histograms of the four probabilities, category
shares, neurons by layer. By default on the testbed, beside its untrained copy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import neuronlens as nl


def main() -> None:
    given = arguments()
    if given.model is None:
        bed = nl.testbed.load()
        samples = nl.testbed.scenes(given.scenes, seed=1)
        vlms = {
            "testbed": nl.adapt(bed.model, bed.processor),
            "testbed, untrained": nl.adapt(nl.testbed.untrained(), bed.processor),
        }
        classifier = nl.NeuronClassifier(**nl.testbed.READINGS)
    else:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        load = AutoModelForImageTextToText.from_pretrained
        model = load(given.model, dtype="auto", device_map="auto")
        vlms = {given.model: nl.adapt(model, AutoProcessor.from_pretrained(given.model))}
        samples = nl.read_samples(given.samples, images=given.images)
        classifier = nl.NeuronClassifier()
    runs = {}
    for number, (name, vlm) in enumerate(vlms.items()):
        folder = given.out / f"atlas-{number}"
        atlas = nl.scan(vlm, samples, out=folder, sites="language", progress=True)
        runs[name] = classifier.classify(atlas)
    first = next(iter(runs))

    figures = {
        "figure-5.png": nl.figures.category_histograms(runs),
        "figure-6.png": nl.figures.category_shares(runs),
        "figure-7.png": nl.figures.category_layers(runs[first]),
    }
    for name, figure in figures.items():
        figure.suptitle(first)
        figure.savefig(given.out / name, dpi=200)

    print(f"\n{'':<20} {'visual':>13} {'text':>13} {'multi-modal':>13} {'unknown':>13}")
    for name, kinds in runs.items():
        share, sure = kinds.shares(), kinds.above(0.8)
        cells = [f"{share[c]:6.1%} ({sure[c]:.1%})".rjust(13) for c in share]
        print(f"{name[-20:]:<20} {' '.join(cells)}")
    print("Share of language neurons by category (in brackets: with a probability above 0.8).")
    print(f"{first}: the 3 % most probable of each category, by layer")
    for category, layers in runs[first].layers().items():
        print(f"  {category:<11} {' '.join(f'{n:5.1f}' for n in layers.values())}")
    print(f"Figures: {', '.join(str(given.out / name) for name in figures)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("p1-figures-5-to-7"))
    parser.add_argument("--scenes", type=int, default=200, help="of the testbed")
    parser.add_argument("--model", help="a vision-language model; the testbed if not given")
    parser.add_argument("--samples", type=Path, help="JSONL or LLaVA's conversations")
    parser.add_argument("--images", type=Path, help="folder of the samples' images")
    return parser.parse_args()


if __name__ == "__main__":
    main()
