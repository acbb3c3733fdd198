"""Things made by hand, for tests that compute by hand: token maps, exemplars, atlases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import neuronlens as nl
from neuronlens import atlas as atlases
from neuronlens.neurons import NeuronId, NeuronSite
from neuronlens.running import ABSENT, COUNTED, SiteStatistics, TopSamples
from neuronlens.tokens import Role

LETTERS = {"_": Role.PAD, "s": Role.SPECIAL, "p": Role.PROMPT, "r": Role.RESPONSE, "v": Role.VISUAL}
CELL = 8
"""Side in pixels of what a visual token sees."""

NEURON = NeuronId("language.0", 0)


def token_map(roles: str, pieces: Sequence[str] | None = None) -> nl.TokenMap:
    """The tokens of one sample, a letter each; the k-th visual one sees the k-th cell of a row."""
    role = torch.tensor([int(LETTERS[each]) for each in roles], dtype=torch.int8)
    visual = role == Role.VISUAL
    left = (visual.cumsum(0) - 1).float() * CELL
    box = torch.stack([left, left * 0, left + CELL, left * 0 + CELL], 1)
    box[~visual] = float("nan")
    return nl.TokenMap(
        role=role,
        sample=torch.zeros(len(role), dtype=torch.long),
        image=torch.where(visual, 0, -1),
        box=box,
        pieces=None if pieces is None else tuple(pieces),
    )


def scene(
    cells: int, named: Mapping[str, Iterable[int]] = {}, id: str = "made", response: str = "said"
) -> nl.Sample:
    """A sample whose image is a row of cells, some of which are named."""
    annotations = []
    for name, where in named.items():
        labels = np.zeros((CELL, CELL * cells), np.uint8)
        for cell in where:
            labels[:, cell * CELL : (cell + 1) * CELL] = 1
        annotations.append(nl.Annotation((name,), labels))
    picture = Image.new("RGB", (CELL * cells, CELL), (200, 100, 50))
    return nl.Sample(id, (picture,), "asked", response, annotations=tuple(annotations))


def exemplar(
    roles: str,
    values: Sequence[float],
    named: Mapping[str, Iterable[int]] = {},
    pieces: Sequence[str] | None = None,
    **more: Any,
) -> nl.Exemplar:
    """A neuron that has these activations on tokens of these roles."""
    return nl.Exemplar(
        NEURON,
        more.pop("sample", None) or scene(max(1, roles.count("v")), named),
        token_map(roles, pieces),
        np.array(values, dtype=np.float32),
        maximum=more.pop("maximum", float(max(values))),
        text_roles=(Role.RESPONSE,),
        **more,
    )


Seen = Mapping[int, tuple[Sequence[float], Sequence[float]]]
"""By sample position, one neuron's visual and its response activations."""


def statistics(
    neurons: Sequence[Seen],
    n: int = 4,
    keep_visual: int = 5,
    keep_text: int = 3,
    dtype: torch.dtype = torch.float32,
) -> SiteStatistics:
    """What a scan keeps of neurons with these activations, made without the scan's code."""
    made = SiteStatistics(len(neurons), n, keep_visual, keep_text, dtype)
    made.firing.open("")
    ids = torch.full((len(neurons), n), ABSENT, dtype=torch.int32)
    visual, text = (
        torch.full((len(neurons), n, keep), float("-inf"), dtype=dtype)
        for keep in (keep_visual, keep_text)
    )
    for row, seen in enumerate(neurons):
        best = sorted((-max([*v, *t]), position) for position, (v, t) in seen.items() if [*v, *t])
        for rank, (_, position) in enumerate(best[:n]):
            ids[row, rank] = position
            kept = (visual, keep_visual), (text, keep_text)
            for values, (target, keep) in zip(seen[position], kept, strict=True):
                largest = sorted(values, reverse=True)[:keep]
                target[row, rank, : len(largest)] = torch.tensor(largest, dtype=dtype)
        for side, role in enumerate((Role.VISUAL, Role.RESPONSE)):
            values = [value for both in seen.values() for value in both[side]]
            if values:
                made.roles.maximum[COUNTED.index(role), row] = max(values)
    made.top = TopSamples.of(ids, visual, text)
    return made


def site(name: str, width: int, **more: Any) -> NeuronSite:
    """A site named `module.layer`."""
    module, layer = name.split(".")
    return NeuronSite(name, module, int(layer), width, f"model.{name}", module, **more)


def open_atlas(
    folder: Path,
    sites: Mapping[str, SiteStatistics],
    text_roles: tuple[Role, ...] = (Role.RESPONSE,),
    domain: str | None = None,
    fingerprint: str = "made by hand",
) -> nl.Atlas:
    """An atlas on disk that holds these statistics."""
    first = next(iter(sites.values())).top
    used = {int(i) for each in sites.values() for i in each.top.ids.flatten() if i != ABSENT}
    with atlases.new_folder(folder) as working:
        atlases.write(
            working,
            model=atlases.ModelInfo(
                name="made", model_type="llava", fingerprint=fingerprint, dtype="float32"
            ),
            choices=atlases.Choices(
                n=first.n,
                keep_visual=first.visual.shape[2],
                keep_text=first.text.shape[2],
                text_roles=text_roles,
                template=True,
                batch_size=1,
                window=1,
            ),
            sites=[site(name, len(each.top.ids)) for name, each in sites.items()],
            statistics=sites,
            samples=[
                atlases.SampleRecord.of(
                    nl.Sample(f"s{i}", (Image.new("RGB", (1, 1)),), "asked", "said", domain), i
                )
                for i in sorted(used | {0})
            ],
            skipped=[],
            versions={},
        )
    return nl.Atlas.open(folder)
