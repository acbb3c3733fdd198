"""The scan against what would be written instead: same model, samples, batches, machine, run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import neuronlens as nl
from benchmark.apart import apart, peak
from benchmark.models import MIDDLE, photographs, random_llava
from benchmark.scanning import Beside, seconds_of_forward
from benchmark.spread import amount, table
from neuronlens.samples import Batch
from neuronlens.scan import batch_plan

BATCH = 4


@dataclass(frozen=True)
class Seen:
    """One site's act_fn output over a batch.

    Attributes:
        ids: The samples' positions.
        output: `[sample, token, neuron]`; it belongs to the model.
        visual, text: Positions of the visual and the response's tokens, the same in each sample.
    """

    ids: Tensor
    output: Tensor
    visual: Tensor
    text: Tensor

    @property
    def value(self) -> Tensor:
        """Largest activation over visual tokens and response, `[sample, neuron]`."""
        return self.output[:, torch.cat([self.visual, self.text])].amax(1)


class Way(Protocol):
    """A way to find the top samples of a site."""

    def __init__(self, n: int) -> None: ...

    def take(self, seen: Seen) -> None:
        """Take in a batch."""
        ...

    def found(self) -> dict[str, Tensor]:
        """The top samples' `ids`, `[rank, neuron]`, and whatever else was kept of them."""
        ...

    @property
    def state(self) -> int:
        """Bytes that would have to be saved to go on after an interruption."""
        ...


class KeepEverything:
    """Every activation stays in memory; top samples are looked for at the end."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._seen: list[Seen] = []

    def take(self, seen: Seen) -> None:
        self._seen.append(seen)

    def found(self) -> dict[str, Tensor]:
        value = torch.cat([each.value for each in self._seen])
        order = value.sort(dim=0, descending=True, stable=True).indices[: self._n]
        return {"ids": torch.cat([each.ids for each in self._seen])[order]}

    @property
    def state(self) -> int:
        return sum(each.output.nbytes for each in self._seen)


class Running:
    """The running top of whatever is kept of a sample and neuron."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._kept: dict[str, Tensor] = {}

    def _update(self, ids: Tensor, value: Tensor, **kept: Tensor) -> None:
        new = {"ids": ids[:, None].expand(value.shape), "value": value, **kept}
        both = {
            name: torch.cat([self._kept[name], each]) if self._kept else each
            for name, each in new.items()
        }
        order = both["value"].sort(dim=0, descending=True, stable=True).indices[: self._n]
        for name, each in both.items():
            at = order if each.ndim == 2 else order[:, None].expand(-1, each.shape[1], -1)
            self._kept[name] = each.gather(0, at)

    def found(self) -> dict[str, Tensor]:
        return self._kept

    @property
    def state(self) -> int:
        return sum(each.nbytes for each in self._kept.values())


class LargestOfEverything(Running):
    """The five and three largest activations of every sample and neuron, then a running top."""

    def take(self, seen: Seen) -> None:
        visual = seen.output[:, seen.visual].topk(5, dim=1).values
        value, kept = visual[:, 0], {"visual": visual}
        if len(seen.text):
            kept["text"] = seen.output[:, seen.text].topk(3, dim=1).values
            value = torch.maximum(value, kept["text"][:, 0])
        self._update(seen.ids, value, **kept)


class WholeRows(Running):
    """The activations of all tokens of each neuron's top samples."""

    def take(self, seen: Seen) -> None:
        self._update(seen.ids, seen.value, rows=seen.output)


WAYS: dict[str, type[Way]] = {
    "everything": KeepEverything,
    "largest": LargestOfEverything,
    "rows": WholeRows,
}


@dataclass(frozen=True)
class Cost:
    """What one way took.

    Attributes:
        ratio: Seconds over those of one bare forward per batch, in the same process.
        seconds: Of each sample.
        memory: The most memory it held, above that of the model and a bare forward, in bytes.
        disk: Bytes to be saved to go on after an interruption; of the scan, those of the atlas.
        same: Whether every neuron has the top samples that the scan found, in their order.
    """

    ratio: float
    seconds: float
    memory: int
    disk: int
    same: bool


@dataclass(frozen=True)
class Alternatives:
    """The costs of all ways."""

    samples: int
    n: int
    scan: Cost
    everything: Cost
    largest: Cost
    rows: Cost


def measure(samples: int, n: int) -> Alternatives:
    """Each way in a process of its own, so that their memory does not mix.

    Raises:
        RuntimeError: If keeping everything finds other top samples than the scan.
    """
    threads = torch.get_num_threads()
    costs: dict[str, Cost] = {}
    with TemporaryDirectory() as folder:
        for way in ("scan", *WAYS):
            given = {"samples": samples, "n": n, "out": f"{folder}/{way}.safetensors"}
            one = "scanned" if way == "scan" else "hooked"
            extra = {} if way == "scan" else {"way": way}
            taken = apart(f"alternatives:{one}", threads=threads, **given, **extra)
            same = _are_equal(Path(folder) / "scan.safetensors", Path(given["out"]))
            costs[way] = Cost(**taken, same=same)
    if not costs["everything"].same:
        raise RuntimeError("The scan's top samples are not those of all activations kept.")
    return Alternatives(samples, n, **costs)


def _are_equal(first: Path, second: Path) -> bool:
    one, other = load_file(first), load_file(second)
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def scanned(samples: int, n: int, out: str) -> dict[str, float]:
    """The scan."""
    with TemporaryDirectory() as folder:
        adapter, given = _begin(Path(folder), samples)
        before, beside = peak(), Beside(adapter, given, BATCH)
        since = time.perf_counter()
        atlas = nl.scan(
            adapter,
            beside,
            out=Path(folder) / "atlas",
            n=n,
            batch_size=BATCH,
            window=BATCH,
            workers=0,
        )
        took = time.perf_counter() - since - beside.apart
        memory = peak() - before
        save_file({name: atlas.statistics(name).top.ids.long() for name in atlas.sites}, out)
        disk = sum(path.stat().st_size for path in atlas.path.rglob("*") if path.is_file())
    bare = sum(pair.bare for pair in beside.pairs)
    return {"ratio": took / bare, "seconds": took / samples, "memory": memory, "disk": disk}


def hooked(way: str, samples: int, n: int, out: str) -> dict[str, float]:
    """What would be written instead."""
    with TemporaryDirectory() as folder:
        adapter, given = _begin(Path(folder), samples)
        before, took, bare, disk = peak(), 0.0, 0.0, 0
        ids: dict[str, Tensor] = {}
        sites = list(adapter.sites.values())
        for together in [[site] for site in sites] if way == "rows" else [sites]:
            found = {site.name: WAYS[way](n) for site in together}
            for placed in batch_plan(given, BATCH, BATCH):
                since = time.perf_counter()
                batch = nl.encode(adapter, [sample for _, sample in placed])
                positions = torch.tensor([position for position, _ in placed])
                _run(adapter, batch, together, positions, found)
                took += time.perf_counter() - since
                if together[0] is sites[0]:
                    bare += seconds_of_forward(adapter.model, batch.inputs)
            since = time.perf_counter()
            for name, each in found.items():
                kept = {key: value.contiguous() for key, value in each.found().items()}
                save_file(kept, f"{folder}/{name}.safetensors")
                ids[name] = kept["ids"].T.contiguous()
                disk += each.state
            took += time.perf_counter() - since
        memory = peak() - before
    save_file(ids, out)
    return {"ratio": took / bare, "seconds": took / samples, "memory": memory, "disk": disk}


def _begin(folder: Path, samples: int) -> tuple[nl.ModelAdapter, list[nl.Sample]]:
    adapter, given = random_llava(MIDDLE), photographs(folder, samples)
    seconds_of_forward(adapter.model, nl.encode(adapter, given[:BATCH]).inputs)
    return adapter, given


def _run(
    adapter: nl.ModelAdapter,
    batch: Batch,
    sites: Sequence[nl.NeuronSite],
    ids: Tensor,
    ways: Mapping[str, Way],
) -> None:
    def looking(site: nl.NeuronSite) -> Callable[..., None]:
        role = batch.tokens[site.stream].role[0]
        visual, text = (
            (role == each).nonzero().squeeze(1) for each in (nl.Role.VISUAL, nl.Role.RESPONSE)
        )

        def hook(_module: object, _args: object, output: Tensor) -> None:
            ways[site.name].take(Seen(ids, output, visual, text))

        return hook

    hooks = {site.path: looking(site) for site in sites}
    with _hooks(adapter.model, hooks), torch.inference_mode():
        adapter.forward(batch.inputs, logits=False)


@contextmanager
def _hooks(model: torch.nn.Module, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for path, hook in hooks.items():
            stack.callback(model.get_submodule(path).register_forward_hook(hook).remove)
        yield


def told(found: Alternatives) -> str:
    """The section of the page."""
    names = {
        "scan": "`nl.scan`",
        "everything": "hooks that keep every activation, top samples at the end",
        "largest": "hooks with `topk` over tokens of everything, then a running top",
        "rows": "one forward per site, whole token rows of the top samples",
    }
    rows = []
    for key, name in names.items():
        cost: Cost = getattr(found, key)
        rows.append(
            (
                name,
                f"{cost.ratio:.2f}",
                f"{cost.seconds:.2f} s",
                amount(cost.memory),
                amount(cost.disk),
                "–" if key == "scan" else ("yes" if cost.same else "no"),
            )
        )
    head = [
        "", "time / bare forward", "a sample", "memory above the model", "on disk",
        "same top samples",
    ]  # fmt: skip
    return "\n\n".join(
        [
            f"{found.samples} samples, N = {found.n}, in batches of {BATCH}; loading and encoding "
            "are part of the time everywhere, and so is writing what was found.",
            table(head, rows),
        ]
    )
