"""What does recording cost? Every language neuron's maximum, against the bare forward.

The two are run in turn in one process, and the ratio is the median over the pairs. On the
testbed by default; `--size middle` builds a random LLaVA of about 0.3 billion parameters.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import neuronlens as nl
from neuronlens import testbed


class Maxima:
    """A sink that keeps each neuron's largest activation over all tokens but padding."""

    def __init__(self, tokens: nl.TokenMap) -> None:
        real = (tokens.role != nl.Role.PAD).flatten()
        self.at = None if real.all() else real.nonzero().squeeze(1)
        self.largest: dict[str, torch.Tensor] = {}

    def take(self, site: nl.NeuronSite, activation: torch.Tensor, tokens: nl.TokenMap) -> None:
        rows = activation.flatten(0, -2)
        now = (rows if self.at is None else rows[self.at]).amax(0)
        before = self.largest.get(site.name)
        self.largest[site.name] = now if before is None else torch.maximum(before, now)


def middle() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A random LLaVA: 12 layers of 1,024, 4,096 neurons each, 256 image tokens of 320."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
            image_size=224, patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=8000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12,
            num_attention_heads=16,
        ),
        image_token_index=7,
    )  # fmt: skip
    torch.manual_seed(0)
    ids = torch.cat([torch.randint(10, 8000, (1, 32)), torch.full((1, 256), 7)], 1)
    ids = torch.cat([ids, torch.randint(10, 8000, (1, 32))], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return LlavaForConditionalGeneration(config).eval(), inputs | {
        "pixel_values": torch.rand(1, 3, 224, 224)
    }


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--size", choices=["testbed", "middle"], default="testbed")
    arguments.add_argument("--pairs", type=int, default=10)
    arguments.add_argument("--out", help="not used: nothing is written")
    given = arguments.parse_args()

    if given.size == "middle":
        model, inputs = middle()
        vlm = nl.adapt(model)
    else:
        bed = testbed.load()
        vlm = nl.adapt(bed.model, bed.processor)
        inputs = nl.encode(vlm, testbed.scenes(8)).inputs
    tokens = vlm.tokens(inputs)
    sink = Maxima(tokens["language"])

    def bare() -> None:
        vlm.model(**inputs, use_cache=False)

    def recorded() -> None:
        with nl.record(vlm, "language", sink, tokens):
            vlm.model(**inputs, use_cache=False)

    with torch.inference_mode():
        bare(), recorded()
        pairs = [(seconds(bare), seconds(recorded)) for _ in range(given.pairs)]
    ratios = sorted(second / first for first, second in pairs)
    neurons = sum(site.neurons for site in vlm.select("language"))
    print(f"{neurons:,} language neurons, {torch.get_num_threads()} threads")
    print(f"bare forward {statistics.median(first for first, _ in pairs) * 1e3:.1f} ms")
    print(
        f"recorded / bare: median {statistics.median(ratios):.3f}, "
        f"from {ratios[0]:.3f} to {ratios[-1]:.3f} over {given.pairs} pairs"
    )


if __name__ == "__main__":
    main()
