"""Does a domain suffer when its own neurons are deactivated, more than from random ones?

P2, Table 2: answers to each domain's questions with that domain's neurons set to 0, in one module
and in all. By default on the testbed, where a domain is a scene's background.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import neuronlens as nl

METRICS = {
    "vqav2": nl.metrics.VQAAccuracy, "docvqa": nl.metrics.ANLS,
    "pmc-vqa": nl.metrics.OptionLetter, "lingoqa": nl.metrics.LingoJudge,
    "rsvqa": nl.metrics.ExactMatch, "jsonl": nl.metrics.ExactMatch,
}  # fmt: skip


def main() -> None:
    given = arguments()
    if given.model is None:
        bed = nl.testbed.load()
        vlm = nl.adapt(bed.model, bed.processor)
        known, asked = (nl.testbed.questions(given.number, seed=seed) for seed in (1, 2))
        prompt, generation = "chat", nl.GREEDY
        metrics = dict.fromkeys(nl.testbed.TEXTURES, nl.metrics.ExactMatch())
    else:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        load = AutoModelForImageTextToText.from_pretrained
        model = load(given.model, dtype="auto", device_map="auto")
        vlm = nl.adapt(model, AutoProcessor.from_pretrained(given.model))
        files = [each.split("=", 1) for each in given.questions]
        read = {layout: nl.read_questions(path, layout) for layout, path in files}
        # The last ones are asked, the others only looked at.
        known = [q for each in read.values() for q in each[: -given.number]]
        asked = [q for each in read.values() for q in each[-given.number :]]
        prompt, generation = given.prompt, nl.BEAMS
        metrics = {each[0].domain: METRICS[layout]() for layout, each in read.items()}
    share = given.share or (0.05 if given.model is None else 0.01)
    atlas = nl.scan(
        vlm, [question.identification() for question in known], out=given.out / "atlas",
        template=False, text_roles=("prompt",), progress=True,
    )  # fmt: skip
    found = nl.domain_neurons(atlas, share=share, inert=False)
    print(f"\n{vlm.name}, neurons: the lowest {share:.0%} of DAPE in each module")
    head = ("domain", "deactivated", "neurons", "measure", "difference", "beside random")
    print("{:<12} {:<12} {:>7}  {:<23} {:<26} {}".format(*head))
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
        result = nl.evaluate(
            vlm, [q for q in asked if q.domain == domain], metrics[domain], prompt=prompt,
            interventions=interventions, generation=generation, out=given.out / domain,
        )  # fmt: skip
        print(f"{domain:<12} {'none':<12} {'':>7}  {result.mean('none')}")
        for name, neurons in chosen.items():
            differences = [result.compare(name), result.compare(name, f"random {name}")]
            cells = f"{result.mean(name)!s:<23} {differences[0]!s:<26} {differences[1]}"
            print(f"{'':<12} {name:<12} {len(neurons):>7}  {cells}")
    print("Differences to the whole model, and to as many random neurons of the same layers; 95 %")
    print(f"intervals over images and {given.seeds} draws.")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("p2-table-2"))
    parser.add_argument("--number", type=int, default=160, help="questions (of each data set)")
    parser.add_argument("--share", type=float, help="of neurons; 0.05 on the testbed, else 0.01")
    parser.add_argument("--seeds", type=int, default=3, help="random draws")
    parser.add_argument("--model", help="a vision-language model; the testbed if not given")
    parser.add_argument("--prompt", default="llava-next", help="how questions are put")
    parser.add_argument(
        "--questions", nargs="+", metavar="LAYOUT=PATH", help="such as vqav2=questions.json"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
