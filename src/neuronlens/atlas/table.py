"""An atlas as tables: a row per neuron, or a row per top sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuronlens.errors import MissingExtraError, UnknownNameError
from neuronlens.neurons import NeuronSite
from neuronlens.running import ABSENT, COUNTED, FIXED_POINT

if TYPE_CHECKING:
    from neuronlens.atlas.atlas import Atlas

Rows = Mapping[str, Sequence[int] | None]
Columns = dict[str, NDArray[Any]]

_FEW = 64
"""Up to so many neurons of a site are read one by one, not the site as a whole."""


def made_by(library: str) -> Callable[[Columns], Any]:
    """What makes a library's table of columns.

    Raises:
        UnknownNameError: If there is no such library.
        MissingExtraError: If it is not installed.
    """
    if library not in ("pandas", "pyarrow"):
        raise UnknownNameError("library of tables", library, ["pandas", "pyarrow"])
    try:
        if library == "pandas":
            import pandas as pd

            return lambda columns: pd.DataFrame(columns)
        import pyarrow as pa

        return lambda columns: pa.table(columns)
    except ImportError:
        raise MissingExtraError(library, "table", "A table") from None


def per_neuron(atlas: Atlas, rows: Rows) -> Columns:
    """Maximum, and by role maximum, mean and firing rate, of each neuron.

    A neuron that never ran on a token of a role has NaN there; so has the maximum of a role that
    never occurred.
    """
    parts = []
    eligible = [COUNTED.index(role) for role in atlas.eligible]
    for name, chosen in rows.items():
        site = atlas.site(name)
        with atlas.read(name) as file:
            maximum, total = (_read(file, f"role.{n}", chosen) for n in ("maximum", "total"))
            fired = _read(file, "fired", chosen).sum((1, 2)).double()
            ids = _read(file, "top.ids", chosen)
            tokens = file.get_tensor("tokens").sum((0, 1)).double()
            routed = file.get_tensor("routed").sum((1, 2)).double()
        at = _rows(site, chosen)
        ran = routed[at // site.width] if site.experts else tokens.expand(len(at), -1)
        largest = maximum.double()
        columns = _named(site, at) | {
            "samples": (ids != ABSENT).sum(1).numpy(),
            "maximum": _absent(largest[:, eligible].amax(1)),
        }
        for place, role in enumerate(COUNTED):
            of_role = role.name.lower()
            columns[f"maximum_{of_role}"] = _absent(largest[:, place])
            mean = total[:, place].double() / FIXED_POINT / ran[:, place]
            columns[f"mean_{of_role}"] = mean.numpy()
            columns[f"firing_rate_{of_role}"] = (fired[:, place] / tokens[place]).numpy()
            columns[f"routed_share_{of_role}"] = (ran[:, place] / tokens[place]).numpy()
        parts.append(columns)
    return _joined(parts)


def per_sample(atlas: Atlas, rows: Rows) -> Columns:
    """Rank, sample, value and the kept activations of each neuron's top samples."""
    parts = []
    ids_of = {position: record.id for position, record in atlas.samples.items()}
    for name, chosen in rows.items():
        site = atlas.site(name)
        with atlas.read(name) as file:
            ids, visual, text = (_read(file, f"top.{n}", chosen) for n in ("ids", "visual", "text"))
        at = _rows(site, chosen)
        neuron, rank = (ids != ABSENT).nonzero(as_tuple=True)
        positions = ids[neuron, rank].numpy()
        seen, said = visual[neuron, rank].double(), text[neuron, rank].double()
        columns = _named(site, at[neuron]) | {
            "rank": rank.numpy() + 1,
            "position": positions,
            "sample": np.array([ids_of[int(each)] for each in positions], dtype=object),
            "value": torch.maximum(seen[:, 0], said[:, 0]).numpy(),
        }
        for side, kept in (("visual", seen), ("text", said)):
            for place in range(kept.shape[1]):
                columns[f"{side}_{place + 1}"] = _absent(kept[:, place])
        parts.append(columns)
    return _joined(parts)


def _read(file: Any, name: str, rows: Sequence[int] | None) -> Tensor:
    """Some neurons' rows of a tensor; all of them for None."""
    whole: Tensor
    if rows is None or len(rows) > _FEW:
        whole = file.get_tensor(name)
        return whole if rows is None else whole[list(rows)]
    part = file.get_slice(name)
    return torch.stack([part[row] for row in rows]) if rows else part[:0]


def _rows(site: NeuronSite, chosen: Sequence[int] | None) -> Tensor:
    """The chosen rows of a site; all of them for None."""
    return torch.arange(site.neurons) if chosen is None else torch.tensor(chosen, dtype=torch.long)


def _named(site: NeuronSite, at: Tensor) -> Columns:
    rows = at.numpy()
    return {
        "site": np.full(len(rows), site.name, dtype=object),
        "module": np.full(len(rows), site.module, dtype=object),
        "layer": np.full(len(rows), site.layer),
        "expert": rows // site.width if site.experts else np.full(len(rows), -1),
        "index": rows % site.width,
    }


def _absent(values: Tensor) -> NDArray[np.float64]:
    """-inf stands for nothing at all, which a table says as NaN."""
    return np.asarray(values.masked_fill(values == float("-inf"), float("nan")).numpy())


def _joined(parts: Sequence[Columns]) -> Columns:
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if (joined["expert"] < 0).all():
        del joined["expert"]
        joined = {name: c for name, c in joined.items() if not name.startswith("routed_share")}
    return joined
