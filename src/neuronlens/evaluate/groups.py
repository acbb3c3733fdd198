"""Groups of questions: by domain, by kind, or by what a function says of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Generic, Literal, TypeVar, cast

import numpy as np
from jaxtyping import Bool

from neuronlens.errors import DataError, UnknownNameError

Row = TypeVar("Row")

By = Literal["domain", "kind"] | Callable[[Row], str | None]
"""Names the group of a row: an attribute of it, or a function."""

Group = str | Callable[[Row], bool]
"""A group: its name, or a function that says which rows are in it."""

OTHERS: Final = "others"
"""As what a group is compared with: every row that is not in it."""


class Groups(Generic[Row]):
    """Which rows are in which group.

    Args:
        rows: Questions or samples.
        by: What names their groups. Rows without a name are in none.

    Raises:
        UnknownNameError: If rows have no such attribute.
    """

    def __init__(self, rows: Sequence[Row], by: By[Row] = "domain") -> None:
        self._rows = rows
        if isinstance(by, str):
            if by not in ("domain", "kind"):
                raise UnknownNameError("way to group", by, ("domain", "kind"), "Or a function.")
            self.names = [cast(str | None, getattr(row, by, None)) or None for row in rows]
        else:
            self.names = [by(row) for row in rows]

    @property
    def known(self) -> list[str]:
        """The groups that occur, in alphabetical order."""
        return sorted({str(name) for name in self.names if name is not None})

    def rows(self, group: Group[Row] | None) -> Bool[np.ndarray, " row"]:
        """True for the rows of a group; for all of them if it is None.

        Raises:
            UnknownNameError: If there is no group of that name.
            DataError: If no row is in it.
        """
        if group is None:
            return np.ones(len(self._rows), dtype=bool)
        if callable(group):
            found = np.array([bool(group(row)) for row in self._rows], dtype=bool)
            if not found.any():
                raise DataError("The function that says what is in the group says so of nothing.")
            return found
        if group not in self.known:
            raise UnknownNameError("group", group, self.known)
        return np.array([str(name) == group and name is not None for name in self.names])

    def others(
        self, group: Group[Row], versus: Group[Row]
    ) -> tuple[Bool[np.ndarray, " row"], Bool[np.ndarray, " row"]]:
        """The rows of a group, and of what it is compared with.

        Raises:
            DataError: If a row is in both, or nothing is in one.
        """
        inside = self.rows(group)
        is_rest = versus == OTHERS and OTHERS not in self.known
        outside = ~inside if is_rest else self.rows(versus)
        if not outside.any():
            raise DataError("Every row is in the group, so there are no others to compare with.")
        if (inside & outside).any():
            raise DataError(
                f"{int((inside & outside).sum())} rows are in both groups; give groups that have "
                "none in common."
            )
        return inside, outside
