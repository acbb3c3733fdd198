"""One answer for each job: what was asked for, in its order, and one failure stops nothing."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from neuronlens.errors import (
    AdapterError,
    AtlasError,
    BudgetError,
    ChatError,
    DataError,
    MissingExtraError,
    OutputError,
)
from neuronlens.explanation import Failure

Job = TypeVar("Job")
Answer = TypeVar("Answer")
Name = TypeVar("Name")

_MANY = 100
"""So many jobs that all raise are not the jobs' fault."""

_PATIENCE = 5.0
"""Seconds to wait, when interrupted, for calls that were told to stop."""


class _MiscountError(DataError):
    """Answers that cannot be told whose they are."""


_ENDS_ALL = (
    *(AdapterError, AtlasError, BudgetError, ChatError, MissingExtraError, OutputError),
    *(_MiscountError, sqlite3.Error),
)
"""What every further job would meet as well."""


def one_each(
    who: object,
    call: Callable[[Sequence[Job]], list[Answer]],
    jobs: Sequence[Job],
    *,
    has_worked: bool = False,
) -> list[Answer | Failure]:
    """An answer for each job, from one call for all of them.

    If the call raises for a reason that need not concern every job, each job is tried by
    itself, and those that raise become failures. If all of them raise, the error is the
    caller's, unless they are few and others have gone well before.

    Args:
        who: Is asked.
        call: Asks it.
        jobs: What for.
        has_worked: Whether it has answered other jobs.

    Raises:
        ValueError: If there are not as many answers as jobs.
    """
    if not jobs:
        return []
    try:
        return list(_counted(who, call(jobs), jobs))
    except _ENDS_ALL:
        raise
    except Exception as error:
        if len(jobs) == 1:
            if not has_worked:
                raise
            return [_failure(error)]
        alone: list[Answer | Failure] = []
        raised = 0
        for job in jobs:
            try:
                alone += _counted(who, call([job]), [job])
            except _ENDS_ALL:
                raise
            except Exception as own:  # noqa: BLE001 - whatever a third party's code raises
                alone.append(_failure(own))
                raised += 1
        if raised == len(jobs) and (not has_worked or len(jobs) > _MANY):
            raise error
        return alone


def _failure(error: Exception) -> Failure:
    return Failure(f"{type(error).__name__}: {error}")


def _counted(who: object, answers: Sequence[Answer], jobs: Sequence[object]) -> Sequence[Answer]:
    if len(answers) != len(jobs):
        raise _MiscountError(
            f"{type(who).__name__} gave {len(answers)} replies to {len(jobs)} jobs. It must give "
            "one for each, in their order; a Failure for what it could not do."
        )
    return answers


def together(
    calls: Mapping[Name, Callable[[], Answer]], stop: Callable[[], None]
) -> dict[Name, Answer]:
    """Results of several calls that run at the same time, the first in this thread.

    Args:
        calls: What to run.
        stop: Makes the others end soon. If one of them raises, it is called until they have
            ended, for it does nothing to what has not begun to ask.
    """
    names = list(calls)
    results: dict[Name, Answer] = {}
    errors: list[BaseException] = []
    running = set(names)

    def run(name: Name) -> None:
        try:
            results[name] = calls[name]()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)
        finally:
            running.discard(name)
        if errors:
            end_others()

    def end_others(patience: float = float("inf")) -> None:
        until = time.monotonic() + patience
        stop()
        while running and time.monotonic() < until:
            time.sleep(0.02)
            stop()

    others = [threading.Thread(target=run, args=(name,), daemon=True) for name in names[1:]]
    for thread in others:
        thread.start()
    try:
        for name in names[:1]:
            run(name)
        for thread in others:
            thread.join()
    except BaseException:
        end_others(_PATIENCE)
        raise
    if errors:
        raise errors[0]
    return results
