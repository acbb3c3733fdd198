"""One pass over the samples: every neuron's top samples, maxima, means and firing counts."""

from neuronlens.scan.plan import Plan, batch_plan
from neuronlens.scan.run import scan
from neuronlens.scan.size import ScanSize, scan_size

__all__ = ["Plan", "ScanSize", "batch_plan", "scan", "scan_size"]
