"""How far do a domain's neurons move the last hidden states, beside as many random ones?

P2, Table 3: the deviation of the last layer's output over the prompt when neurons of the samples'
own domain are set to 0. By default on the testbed and photographs of five domains.
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
        samples = nl.testbed.photographs(given.number, seed=1)
        others = nl.testbed.photographs(given.number, seed=2)
    else:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        load = AutoModelForImageTextToText.from_pretrained
        model = load(given.model, dtype="auto", device_map="auto")
        vlm = nl.adapt(model, AutoProcessor.from_pretrained(given.model))
        files = [each.split("=", 1) for each in given.questions]
        read = [nl.read_questions(path, layout) for layout, path in files]
        # The last ones are measured, the others only looked at.
        samples = [q.identification() for each in read for q in each[: -given.number]]
        others = [q.identification() for each in read for q in each[-given.number :]]
    share = given.share or (0.05 if given.model is None else 0.01)
    atlas = nl.scan(
        vlm, samples, out=given.out / "atlas", template=False, text_roles=("prompt",), progress=True
    )
    found = nl.domain_neurons(atlas, share=share, inert=False)
    cells: dict[str, list[str]] = {}
    for domain in found.domains:
        own = {module: found.select(domain, module) for module in found.modules}
        own["all"] = found.select(domain)
        chosen = {name: neurons for name, neurons in own.items() if neurons}
        interventions = {}
        for name, neurons in chosen.items():
            interventions[name] = nl.deactivate(vlm, neurons)
            interventions[f"random {name}"] = [
                nl.deactivate(vlm, nl.random_control(vlm, neurons, seed=seed))
                for seed in range(given.seeds)
            ]
        mine = [sample for sample in others if sample.domain == domain]
        if interventions:
            deviation = nl.hidden_state_deviation(vlm, mine, interventions, template=False)
        for row in [each for name in own for each in (name, f"random {name}")]:
            told = percent(deviation.mean(row)) if row in interventions else "-"
            cells.setdefault(row, []).append(told)
    print(f"\n{vlm.name}, deviation of the last hidden states in %")
    print(f"{'deactivated':<18} " + " ".join(f"{domain[:18]:<19}" for domain in found.domains))
    for name, row in cells.items():
        print(f"{name:<18} " + " ".join(f"{cell:<19}" for cell in row))
    print(f"Neurons: the lowest {share:.0%} of DAPE in each module, those of the column's domain.")
    print(f"Random: as many of the same layers, {given.seeds} draws. 95 % intervals over images.")


def percent(mean) -> str:
    low, high = mean.interval or (mean.value, mean.value)
    return f"{100 * mean.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("p2-table-3"))
    parser.add_argument("--number", type=int, default=40, help="samples (of each domain)")
    parser.add_argument("--share", type=float, help="of neurons; 0.05 on the testbed, else 0.01")
    parser.add_argument("--seeds", type=int, default=3, help="random draws")
    parser.add_argument("--model", help="a vision-language model; the testbed if not given")
    parser.add_argument(
        "--questions", nargs="+", metavar="LAYOUT=PATH", help="such as vqav2=questions.json"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
