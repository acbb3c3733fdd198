"""Changing neurons while a model runs: everything is as before when the block ends."""

from neuronlens.intervene.control import Match, random_control
from neuronlens.intervene.intervention import Intervention
from neuronlens.intervene.make import amplify, by_sample, deactivate, set_to
from neuronlens.intervene.part import Positions, Roles

__all__ = [
    "Intervention",
    "Match",
    "Positions",
    "Roles",
    "amplify",
    "by_sample",
    "deactivate",
    "random_control",
    "set_to",
]
