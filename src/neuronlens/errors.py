"""Every error neuronlens raises; each is also the builtin a caller would expect."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

WRITE_ONE = "Write an adapter that says it: see docs/adapters.md."
"""What to do about a model of which something cannot be established."""


class NeuronLensError(Exception):
    """Base of all errors raised by neuronlens."""


class AdapterError(NeuronLensError, ValueError):
    """The model, its processor or its inputs are not what the adapter describes."""


class UnknownNameError(NeuronLensError, LookupError):
    """A name that is not in the table it was looked up in; the message lists near ones."""

    def __init__(self, kind: str, name: object, known: Iterable[object], advice: str = "") -> None:
        names = [str(each) for each in known]
        near = difflib.get_close_matches(str(name), names, n=5, cutoff=0.4)
        if len(names) <= 5:
            near = []  # all of them are as short
        shown = ", ".join(near or names[:12]) + (", ..." if not near and len(names) > 12 else "")
        label = "Closest" if near else "Known"
        super().__init__(
            f"No {kind} {str(name)!r}. {label}: {shown or '(none)'}. {advice}".rstrip()
        )


class CaptureError(NeuronLensError, RuntimeError):
    """Activations could not be read as promised: a hook did not fire, or fired out of turn."""


class InterventionError(NeuronLensError, ValueError):
    """An intervention that makes no sense, or not for the batch it is used on."""


class SampleError(NeuronLensError, ValueError):
    """One sample cannot be used.

    Attributes:
        sample_id: The sample's id.
        reason: A short kind of failure, such as `"missing image"`; scans count by it.
    """

    def __init__(self, sample_id: str, reason: str, detail: str) -> None:
        super().__init__(f"Sample {sample_id!r}, {reason}: {detail}")
        self.sample_id = sample_id
        self.reason = reason


class DataError(NeuronLensError, ValueError):
    """A file of samples or annotations does not have the form it should have."""


class SkippedError(NeuronLensError, RuntimeError):
    """More samples had to be skipped than the caller allows."""


class AtlasError(NeuronLensError, ValueError):
    """A folder is not a whole, readable atlas, or not one of this model."""


class OutputError(NeuronLensError, OSError):
    """A folder cannot be written, or holds something that must not be overwritten."""


class RescanError(NeuronLensError, ValueError):
    """A reading was asked for that the scan did not keep the numbers for."""


class ChatError(NeuronLensError, RuntimeError):
    """A chat model cannot be asked at all: no key, no server, or a request it always refuses."""


class BudgetError(NeuronLensError, RuntimeError):
    """The next request could cost more than the budget allows; everything answered is kept."""


class SegmenterError(NeuronLensError, ValueError):
    """A segmenter is put together wrongly, or its model answered with something unusable."""


class MissingSegmenterError(SegmenterError, ImportError):
    """A package is needed that no extra of neuronlens brings; the message says where it is."""


class MissingExtraError(NeuronLensError, ImportError):
    """An optional package is needed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install neuronlens from its checkout with the extra: pip install '.[{extra}]'."
        )
