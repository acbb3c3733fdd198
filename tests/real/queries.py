"""None yet."""

from real import Real

REAL: tuple[Real, ...] = ()
