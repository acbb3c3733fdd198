"""What are the layers of the language model about to say, and how sure are they of it?

P2, Figure 6 (the likeliest words of an image token and of the last text token, layer by layer)
and Figure 7 with Table 9 (entropy at image and text tokens, by domain). By default on questions
about the testbed's scenes, beside its untrained copy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import neuronlens as nl


def main() -> None:
    given = arguments()
    if given.model is None:
        bed = nl.testbed.load()
        questions = nl.testbed.questions(given.number, seed=1)
        vlms = {
            "testbed": nl.adapt(bed.model, bed.processor),
            "testbed, untrained": nl.adapt(nl.testbed.untrained(), bed.processor),
        }
    else:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        load = AutoModelForImageTextToText.from_pretrained
        model = load(given.model, dtype="auto", device_map="auto")
        vlms = {given.model: nl.adapt(model, AutoProcessor.from_pretrained(given.model))}
        files = (each.split("=", 1) for each in given.questions)
        questions = [
            question
            for layout, path in files
            for question in nl.read_questions(path, layout)[: given.number]
        ]
    given.out.mkdir(parents=True, exist_ok=True)
    lens = nl.LogitLens(next(iter(vlms.values())))
    asked = questions[0].sample("chat" if given.model is None else given.prompt)
    for name, position in (("image", ("visual", given.image_token)), ("text", -1)):
        reading = lens.show(asked, position=position)
        path = given.out / f"figure-6-{name}.png"
        figure = nl.figures.lens_heat_map(reading)
        figure.suptitle(f"{next(iter(vlms))}: {questions[0].text}", parse_math=False)
        figure.savefig(path, dpi=200)
        print(f"\n{questions[0].text}  The likeliest next words at token {reading.label(0)}:")
        for layer in reading.layers:
            words = "  ".join(f"{word.strip()} {p:.2f}" for word, p in reading.candidates(layer, 0))
            print(f"  layer {layer:>2}  {words}")
    samples = [question.identification() for question in questions]
    curves = {
        name: nl.LogitLens(vlm).entropy(samples, template=False, progress=True)
        for name, vlm in vlms.items()
    }
    nl.figures.entropy_curves(curves).savefig(given.out / "figure-7.png", dpi=200)
    print(f"\nMean entropy in nats by layer ({', '.join(map(str, lens.layers))}):")
    for name, each in curves.items():
        for group in each.groups:
            for kind in ("visual", "text"):
                values = " ".join(f"{value:5.2f}" for value in each.curve(kind, group))
                print(f"  {name:<18} {group[:12]:<12} {kind:<7} {values}")
    print(f"Figures: {', '.join(sorted(str(p) for p in given.out.glob('*.png')))}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("p2-figures-6-and-7"))
    parser.add_argument("--number", type=int, default=200, help="questions (of each data set)")
    parser.add_argument("--image-token", type=int, default=1, help="from 0; the paper's is 1")
    parser.add_argument("--model", help="a vision-language model; the testbed if not given")
    parser.add_argument("--prompt", default="short", help="of the question in Figure 6")
    parser.add_argument(
        "--questions", nargs="+", metavar="LAYOUT=PATH", help="such as vqav2=questions.json"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
