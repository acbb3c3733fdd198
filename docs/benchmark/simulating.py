"""Text tokens simulated by one forward, beside generating an answer for each text."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import neuronlens as nl
from benchmark.models import MIDDLE, SEVEN_BILLION
from benchmark.spread import Spread, table

SPECIAL = ("<pad>", "<s>", "</s>")
SPARSE = '{"activations": {"10": 7, "24": 7}}'
"""What a usual reply of ours looks like; generating is measured for as many tokens."""

LISTED = "the\t0\n"
"""A line of P1's reply, which has one for each token."""

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


@dataclass(frozen=True)
class Simulating:
    """One measurement.

    Attributes:
        device: Where.
        parameters: Of the language model.
        texts: How many were simulated.
        tokens: Of each text.
        sparse, listed: Tokens that are generated for a reply that names some tokens, and for one
            that names all.
        batch_size: Texts together, of both.
        expected: Simulated tokens a second, by round.
        by_sparse, by_listed: The same by generating, by round.
        to_sparse, to_listed: How many times as fast the first is, by round.
    """

    device: str
    parameters: int
    texts: int
    tokens: int
    sparse: int
    listed: int
    batch_size: int
    expected: Spread
    by_sparse: Spread
    by_listed: Spread
    to_sparse: Spread
    to_listed: Spread


def measure(texts: int, tokens: int, rounds: int, batch_size: int = 8) -> Simulating:
    """Both simulators in turn, on the same texts, several times over."""
    on_gpu = torch.cuda.is_available()
    device, size = ("cuda", SEVEN_BILLION) if on_gpu else ("cpu", MIDDLE)
    tokenizer = _tokenizer()
    model = _model(size["text"], device, torch.bfloat16 if on_gpu else torch.float32)
    jobs = _jobs(texts, tokens)
    sparse = len(tokenizer.encode(SPARSE, add_special_tokens=False))
    listed = tokens * len(tokenizer.encode(LISTED, add_special_tokens=False))
    simulator = nl.ExpectedValueSimulator(model, tokenizer, batch_size=batch_size)
    chat = nl.chat.TransformersChat(model, tokenizer, attempts=1, batch_size=batch_size)
    generating = nl.ChatSimulator(chat)
    simulator.simulate(jobs[:batch_size])
    speeds: dict[str, list[float]] = {"expected": [], "sparse": [], "listed": []}
    some = [generating.request(job) for job in jobs[:batch_size]]
    for _ in range(rounds):
        speeds["expected"].append(texts * tokens / _seconds(lambda: simulator.simulate(jobs)))
        for name, most in (("sparse", sparse), ("listed", listed)):
            asked = [_bounded(request, most) for request in some]
            took = _seconds(lambda asked=asked: chat.ask(asked))
            speeds[name].append(len(some) * tokens / took)

    def faster(name: str) -> Spread:
        pairs = zip(speeds["expected"], speeds[name], strict=True)
        return Spread.of(one / other for one, other in pairs)

    return Simulating(
        torch.cuda.get_device_name() if on_gpu else "CPU",
        sum(each.numel() for each in model.parameters()),
        texts,
        tokens,
        sparse,
        listed,
        batch_size,
        *(Spread.of(speeds[name]) for name in ("expected", "sparse", "listed")),
        faster("sparse"),
        faster("listed"),
    )


def _bounded(request: nl.chat.Request, most: int) -> nl.chat.Request:
    """The request with room for a usual answer, which random weights would not end with."""
    return nl.chat.Request(request.messages, request.answer, max_tokens=most)


def _seconds(call: Any) -> float:
    start = perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - start


def _model(size: dict[str, Any], device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **size, max_position_embeddings=32768, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    # The likeliest token of random weights must not be the end of the answer.
    model.generation_config.eos_token_id = None
    return model.eval()


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs learned from the prompts themselves: words are tokens, as in usual ones."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    request = nl.ChatSimulator(_Silent()).request(_jobs(1, 50)[0])
    made.train_from_iterator(
        [message.text for message in request.messages],
        trainers.BpeTrainer(
            vocab_size=1000,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class _Silent:
    """A chat model that is never asked."""

    def ask(self, requests: object) -> list[Any]:
        raise NotImplementedError


def _jobs(texts: int, tokens: int) -> list[nl.SimulationJob]:
    rng = np.random.default_rng(0)
    said = ["the ", "red ", "circle ", "is ", "left ", "of ", "a ", "small ", "square ", ". "]
    jobs = []
    for number in range(texts):
        pieces = tuple(said[i] for i in rng.integers(len(said), size=tokens))
        count = torch.zeros(tokens, dtype=torch.long)
        jobs.append(
            nl.SimulationJob(
                nl.Explanation(sentence=f"the word “{said[number % len(said)].strip()}”"),
                nl.Sample(f"{number}", (), "", "".join(pieces)),
                nl.TokenMap(
                    role=count.to(torch.int8) + int(nl.Role.RESPONSE),
                    sample=count,
                    image=count - 1,
                    box=torch.full((tokens, 4), float("nan")),
                    pieces=pieces,
                ),
            )
        )
    return jobs


def told(found: Simulating) -> str:
    """The section of the page."""
    rows = [
        ("expected value, one forward", f"{found.expected.median:,.0f}", ""),
        (
            f"generating {found.sparse} tokens: some tokens by number",
            f"{found.by_sparse.median:,.0f}",
            found.to_sparse,
        ),
        (
            f"generating {found.listed} tokens: a line for each, as P1",
            f"{found.by_listed.median:,.0f}",
            found.to_listed,
        ),
    ]
    return "\n\n".join(
        [
            f"{found.device}; a Llama of {found.parameters / 1e6:,.0f} million random parameters "
            f"for all, {found.texts:,} texts of {found.tokens} tokens, eight worked neurons "
            f"before each, batches of {found.batch_size}.",
            table(["simulator", "simulated tokens a second", "expected value is faster by"], rows),
        ]
    )
