"""Do images of different domains lie apart already in the vision encoder?

P2, Figure 2: one embedding per image from the vision encoder, in the plane in which they differ
most. By default the testbed, photographs of five domains, and its own scenes as a sixth.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

import neuronlens as nl


def main() -> None:
    given = arguments()
    if given.model is None:
        bed = nl.testbed.load()
        vlm = nl.adapt(bed.model, bed.processor)
        scenes = nl.testbed.scenes(given.images, seed=1)
        samples = [
            *nl.testbed.photographs(given.images, seed=1),
            *(replace(each, response=None, domain="testbed scene") for each in scenes),
        ]
    else:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        load = AutoModelForImageTextToText.from_pretrained
        model = load(given.model, dtype="auto", device_map="auto")
        vlm = nl.adapt(model, AutoProcessor.from_pretrained(given.model))
        files = (each.split("=", 1) for each in given.questions)
        samples = [
            question.identification()
            for layout, path in files
            for question in nl.read_questions(path, layout)[: given.images]
        ]
    embeddings = nl.image_embeddings(vlm, samples, template=False)
    plane = nl.principal_components(embeddings)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "figure-2.png"
    figure = nl.figures.embedding_plane(embeddings, plane)
    figure.suptitle(vlm.name)
    figure.savefig(path, dpi=200)

    names = np.array(embeddings.domains)
    domains = sorted(set(embeddings.domains))
    centres = {domain: embeddings.values[names == domain].mean(0) for domain in domains}
    print(f"{vlm.name}: {len(embeddings)} images, the output of {embeddings.taken}")
    print(f"Variance in the plane: {plane.explained.sum():.0%}")
    chance = f"{1 / len(domains):.0%}"
    print(f"{'':<14} images  nearest to the centre of its own domain (chance {chance})")
    for domain in domains:
        mine = embeddings.values[names == domain]
        far = [np.linalg.norm(mine - centre, axis=1) for centre in centres.values()]
        own = (np.argmin(far, axis=0) == domains.index(domain)).mean()
        print(f"{domain:<14} {len(mine):>6}  {own:.0%}")
    print("An image counts in its own centre, so this is a little too high for few images.")
    print(f"Figure: {path}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("p2-figure-2"))
    parser.add_argument("--images", type=int, default=40, help="of each domain")
    parser.add_argument("--model", help="a vision-language model; the testbed if not given")
    parser.add_argument(
        "--questions", nargs="+", metavar="LAYOUT=PATH", help="such as vqav2=questions.json"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
