"""The kernels beside what is done without them: `kernel_cases.py DEVICE FIRST LAST`.

Each number from FIRST up to LAST is a case: a stream of batches of one site. On the CPU kernels
are interpreted, for which TRITON_INTERPRET has to be set. One line says what differs, the last
one how many cases there were.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch

from neuronlens.running import (
    Incoming,
    Layout,
    Reduction,
    SiteStatistics,
    fused,
    reduce,
    reduce_everything,
    statistics,
)
from neuronlens.tokens import Role, TokenMap

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DOMAINS = ("", "road", "sea")
LAID = ("right", "left", "packed", "woven")
READINGS = ((Role.RESPONSE,), (Role.PROMPT,), (Role.PROMPT, Role.RESPONSE))
NAMES = ("maximum", "fired", "total", "visual", "text")

reducing = sys.modules["neuronlens.running.reduce"]


@dataclass(frozen=True)
class Sizes:
    """What stays the same over the batches of a case."""

    width: int
    n: int
    keep_visual: int
    keep_text: int
    dtype: torch.dtype
    text_roles: tuple[Role, ...]
    kind: str


@contextmanager
def ways(are_fused: bool) -> Iterator[None]:
    """Whether the kernels are used, on whichever device."""
    from neuronlens.running import kernels

    found = kernels if are_fused else None
    with (
        mock.patch.object(reducing, "kernels_for", return_value=found),
        mock.patch.object(statistics, "kernels_for", return_value=found),
    ):
        yield


def sizes(draw: random.Random) -> Sizes:
    # Few combinations: each is compiled.
    visual = draw.choice([*range(1, fused.KEPT), *[fused.KEPT] * 3])
    return Sizes(
        width=draw.choice([1, 2, 3, 31, 32, 33, 64, 65, 100]),
        n=draw.choice([1, 3, 3, 4, 33]),
        keep_visual=visual,
        keep_text=(visual + 5) % fused.KEPT + 1,
        dtype=draw.choice(DTYPES),
        text_roles=draw.choice(READINGS),
        kind=draw.choice(["few", "few", "fine", "large", "low"]),
    )


def tokens_of(draw: random.Random, samples: int) -> TokenMap:
    """Samples of any roles in any order; some without text, some without anything visual."""
    roles = []
    for _ in range(samples):
        of = draw.choice([(1, 2, 3, 4), (1, 4), (2, 3), (3, 4), (4,), (4,), (0, 3, 4, 4, 4)])
        length = draw.choice([1, 2, 5, 17, 40, 40])
        made = [draw.choice(of) for _ in range(length)]
        roles.append(sorted(made) if draw.random() < 0.5 else made)
    laid, longest = draw.choice(LAID), max(map(len, roles)) + 1
    if laid in ("right", "left"):
        role = torch.zeros(samples, longest, dtype=torch.int8)
        for row, mine in enumerate(roles):
            start = longest - len(mine) if laid == "left" else 0
            role[row, start : start + len(mine)] = torch.tensor(mine, dtype=torch.int8)
        sample = torch.arange(samples)[:, None].expand(samples, longest)
    else:
        if laid == "packed":
            flat = [(row, each) for row, mine in enumerate(roles) for each in mine]
        else:
            turns = range(longest)
            flat = [
                (row, m[turn]) for turn in turns for row, m in enumerate(roles) if turn < len(m)
            ]
        flat = [(-1, 0), *flat, (-1, 0)]
        sample = torch.tensor([row for row, _ in flat])
        role = torch.tensor([each for _, each in flat], dtype=torch.int8)
    nowhere = torch.full((*role.shape, 4), torch.nan)
    return TokenMap(role, sample, torch.full_like(sample, -1), nowhere)


def activations_of(draw: random.Random, tokens: TokenMap, of: Sizes) -> torch.Tensor:
    """Numbers whose sums are exact in double precision, and often lie between two steps."""
    made = torch.Generator().manual_seed(draw.getrandbits(32))
    shape = (*tokens.role.shape, of.width + 1)
    if of.kind == "few":  # ties, zeros, and both of them
        value = torch.randint(-3, 4, shape, generator=made) / 16.0
        value = torch.where(torch.rand(shape, generator=made) < 0.3, -0.0, value)
    else:
        value = torch.randint(-(2**20), 2**20, shape, generator=made) * 2.0**-25
        value = value * {"fine": 1.0, "large": 2.0**33, "low": 1.0}[of.kind]
        value = -value.abs() if of.kind == "low" else value
    if draw.random() < 0.5:  # the largest all come to the same thread
        value[..., ::4, :] += 1
    bad = torch.rand(shape, generator=made) < draw.choice([0.0, 0.0, 0.0, 0.5 / value.numel()])
    value[bad] = draw.choice([torch.nan, torch.inf, -torch.inf, 3e38])
    value[(tokens.role == Role.PAD)] = draw.choice([torch.nan, 1e30, torch.inf])
    value = value.to(of.dtype)
    return {
        "side by side": value[..., : of.width].contiguous(),
        "cut": value[..., 1:],
        "turned": value[..., : of.width].transpose(0, -1).contiguous().transpose(0, -1),
        "every other": value.repeat_interleave(2, -1)[..., : 2 * of.width : 2],
    }[draw.choice(["side by side", "side by side", "cut", "turned", "every other"])]


def differing(one: Reduction, other: Reduction) -> list[str]:
    """What of two reductions is not the same to the bit, of the samples that are finite."""
    if not torch.equal(one.finite, other.finite):
        return ["finite"]
    found = []
    for name in NAMES:
        a, b = (getattr(each, name)[each.finite] for each in (one, other))
        same = a.dtype == b.dtype and torch.equal(a, b)
        if not same or not torch.equal(torch.signbit(a), torch.signbit(b)):
            found.append(name)
    return found


def run(seed: int, device: torch.device) -> list[str]:
    """What differs in one case."""
    draw = random.Random(seed)
    of = sizes(draw)
    kept = (of.keep_visual, of.keep_text)
    first, second, third = (
        SiteStatistics(of.width, of.n, *kept, of.dtype, device=where)
        for where in (device, device, "cpu")
    )
    found = []
    batches = draw.randint(1, 5)
    positions = draw.sample(range(100), 4 * batches)
    for batch in range(batches):
        samples = draw.randint(1, 4)
        tokens = tokens_of(draw, samples)
        activation = activations_of(draw, tokens, of)
        layout = Layout.of(tokens, samples, of.text_roles, device)
        with ways(True):
            fast = reduce_everything(activation.to(device), layout, *kept)
        with ways(False):
            slow = reduce_everything(activation.to(device), layout, *kept)
        found += differing(fast, slow)
        here = positions[4 * batch : 4 * batch + samples]
        skipped = torch.tensor([draw.random() < 0.15 for _ in range(samples)])
        incoming = Incoming(
            here,
            [f"id-{position}" for position in here],
            [draw.choice(DOMAINS) for _ in here],
            fast.finite.cpu() & ~skipped,
        )
        with ways(True):
            first.update(fast, incoming)
        with ways(False):
            second.update(slow, incoming)
            of_cpu = Layout.of(tokens, samples, of.text_roles, torch.device("cpu"))
            third.update(reduce(activation, of_cpu, *kept), incoming)
        if draw.random() < 0.4:  # a look puts the lists in order
            seen = first.state_dict(DOMAINS)
            if draw.random() < 0.5:
                first = SiteStatistics.from_state_dict(seen, DOMAINS, device)
    states = [each.state_dict(DOMAINS) for each in (first, second, third)]
    for name, value in states[0].items():
        for what, other in zip(("state", "state on the CPU"), states[1:], strict=True):
            if not torch.equal(value, other[name]):
                found.append(f"{what} {name}")
            elif not torch.equal(torch.signbit(value), torch.signbit(other[name])):
                found.append(f"{what} sign of {name}")
    return [f"{each} ({of})" for each in found]


def main() -> None:
    device, seeds = torch.device(sys.argv[1]), range(int(sys.argv[2]), int(sys.argv[3]))
    for seed in seeds:
        for each in run(seed, device):
            sys.stdout.write(f"seed {seed}: {each}\n")
    sys.stdout.write(f"{len(seeds)} cases\n")


if __name__ == "__main__":
    main()
