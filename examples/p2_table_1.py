"""How many neurons are specific to each domain, in which layers, and how many never fire?

P2, Table 1, Figure 5 and Figure 9. By default on the testbed and photographs of five domains that
ship with scikit-image and scikit-learn. The lowest share of DAPE exists in any data, so the last
column says how many neurons are more specific than with the domains' names dealt out at random.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import neuronlens as nl


def main() -> None:
    given = arguments()
    if given.model is None:
        bed = nl.testbed.load()
        vlm = nl.adapt(bed.model, bed.processor)
        samples = nl.testbed.photographs(given.photographs, seed=1)
    else:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        load = AutoModelForImageTextToText.from_pretrained
        model = load(given.model, dtype="auto", device_map="auto")
        vlm, share = (
            nl.adapt(model, AutoProcessor.from_pretrained(given.model)),
            given.share or 0.01,
        )
        files = (each.split("=", 1) for each in given.questions)
        samples = [
            question.identification()
            for layout, path in files
            for question in nl.read_questions(path, layout)
        ]
    share = given.share or (0.05 if given.model is None else 0.01)
    atlas = nl.scan(
        vlm, samples, out=given.out / "atlas", template=False, text_roles=("prompt",), progress=True
    )
    found = nl.domain_neurons(atlas, share=share, inert=False)
    chance = found.chance(given.draws)
    figures = {
        "figure-5.png": nl.figures.domain_layers(found),
        "figure-9.png": nl.figures.silent_neurons(found),
    }
    for name, figure in figures.items():
        figure.suptitle(vlm.name)
        figure.savefig(given.out / name, dpi=200)

    print(f"\n{vlm.name}: {len(samples)} samples, the lowest {share:.0%} of DAPE in each module")
    head = " ".join(f"{domain[:11]:>11}" for domain in found.domains)
    print(f"{'':<10} {head}  chosen  beyond chance")
    for module, counts in found.counts().items():
        each = found.module(module)
        cells = " ".join(f"{counts[domain]:>11}" for domain in found.domains)
        beyond = f"{chance.modules[module].specific.sum()} of {len(each.chosen)}"
        print(f"{module:<10} {cells}  {each.chosen.sum():>6}  {beyond}")
    for module in found.modules:
        layers = found.silent(module).values()
        shares = " ".join(f"{silent / of_layer:.0%}" for silent, of_layer in layers)
        print(f"silent, {module}, by layer: {shares}")
    print("A neuron counts in each domain in which it fires often. Beyond chance: of all neurons")
    print(f"of the module, by {given.draws} permutations of blocks, false discoveries below 5 %.")
    print(f"Figures: {', '.join(str(given.out / name) for name in figures)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("p2-table-1"))
    parser.add_argument("--photographs", type=int, default=60, help="of each domain")
    parser.add_argument("--share", type=float, help="of neurons; 0.05 on the testbed, else 0.01")
    parser.add_argument("--draws", type=int, default=2000, help="permutations")
    parser.add_argument("--model", help="a vision-language model; the testbed if not given")
    parser.add_argument(
        "--questions", nargs="+", metavar="LAYOUT=PATH", help="such as vqav2=questions.json"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
