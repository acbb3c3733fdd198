"""Worked examples: neurons of the testbed with their exemplars, and what is to be said of them."""

from neuronlens.worked.examples import (
    KINDS,
    WORKED_VERSION,
    Kind,
    WorkedExample,
    WorkedExemplar,
    read_worked,
    worked_examples,
)

__all__ = [
    "KINDS",
    "WORKED_VERSION",
    "Kind",
    "WorkedExample",
    "WorkedExemplar",
    "read_worked",
    "worked_examples",
]
