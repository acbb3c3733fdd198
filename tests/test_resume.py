"""A scan that was interrupted goes on, and ends as if nothing had happened."""

from __future__ import annotations

import copy
import gc
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import neuronlens as nl
from neuronlens.atlas import SampleRecord, folder, locked
from neuronlens.errors import DataError, OutputError, SkippedError
from neuronlens.running import SiteStatistics
from neuronlens.scan.checkpoint import Workplace
from programs.kill_scan import (
    READINGS,
    Fault,
    Job,
    content,
    kill,
    processes_of,
    serving,
    until,
)

pytestmark = pytest.mark.xdist_group("resume")  # its processes are started once

run = importlib.import_module("neuronlens.scan.run")
BATCHES = 6
HERE = {"sites": ("vision.1", "language.2"), "n": 4, "batch_size": 3, "window": 6}
"""Of scans in this process: 12 samples, 4 batches, 2 windows."""


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@dataclass(frozen=True)
class Whole:
    """An undisturbed scan, and how long one of its forwards takes."""

    out: Path
    pace: float


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory) -> Whole:
    job = Job(tmp_path_factory.mktemp("whole") / "atlas")
    start = time.perf_counter()
    assert server.run(job).forwards() == BATCHES
    return Whole(job.out, (time.perf_counter() - start) / BATCHES)


def assert_same(out: Path, expected: Path) -> None:
    found, wanted = content(out), content(expected)
    assert found.keys() == wanted.keys()
    assert {"manifest.json", "samples.jsonl"} < found.keys()
    assert [name for name in found if found[name] != wanted[name]] == []
    left = out.with_name(f".{out.name}.scan")
    assert not left.exists()


def checkpoint_of(out: Path, part: str = "part-0-of-1") -> dict:
    """What the newest checkpoint says."""
    folder = out.with_name(f".{out.name}.scan") / part
    return json.loads((sorted(folder.glob("checkpoint-*"))[-1] / "progress.json").read_text())


# Killed.


def test_a_scan_killed_at_any_moment_goes_on_and_gives_the_same_atlas(server, whole, tmp_path):
    seed = random.SystemRandom().randrange(1_000_000)
    sys.stdout.write(f"seed {seed}\n")  # shown when it fails
    moments = random.Random(seed)
    went_on = 0
    for number in range(3):
        out = tmp_path / str(number)
        # Never before a first checkpoint: so each of them has something to go on with.
        killed = kill(server, Job(out), moments.uniform(2, BATCHES), whole.pace, whole.out)
        assert killed.problems == []
        if killed.was_running:
            # What had been begun when it was killed is the only thing that may run again.
            assert BATCHES - killed.begun <= killed.again <= BATCHES - killed.begun + 1
            went_on += 1
        assert_same(out, whole.out)
    assert went_on


POINTS = {
    "half-way through the first checkpoint": (Fault("save_tensors", 2, "writing", "half"), 1, 6),
    "half-way through a checkpoint": (Fault("save_tensors", 5, "writing", "half"), 2, 5),
    "before the end of a checkpoint": (Fault("durable", 3, "progress.json", "half"), 3, 4),
    "before a checkpoint is put in place": (Fault("rename", 3, "checkpoint-"), 3, 4),
    "after a checkpoint is put in place": (Fault("rename", 3, "checkpoint-", "after"), 3, 3),
    "before the last checkpoint is gone": (Fault("rmtree", 2, "checkpoint-"), 3, 3),
    "while the atlas is put together": (Fault("save_tensors", 2, "/atlas/", "half"), 6, 0),
    "before the manifest": (Fault("durable", 1, "manifest.json", "half"), 6, 0),
    "before the atlas is put in place": (Fault("rename", 1, ".scan/atlas"), 6, 0),
    "before it is cleaned up": (Fault("rename", 1, ".scan/atlas", "after"), 6, 0),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_scan_killed_at_the_worst_moments_gives_the_same_atlas(server, whole, tmp_path, point):
    fault, before, after = POINTS[point]
    killed = server.start(Job(tmp_path / "atlas", fault=fault))
    assert server.wait(killed) == -signal.SIGKILL
    again = server.run(replace(killed, fault=None))
    assert (killed.forwards(), again.forwards()) == (before, after)
    assert_same(killed.out, whole.out)


# Asked to stop.

INTERRUPTED = [-signal.SIGINT, 1]
"""Python dies of the signal; what some libraries do at its exit turns that into a plain failure."""


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("number", "statuses"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, [128 + 15])]
)
def test_a_signal_stops_a_scan_after_its_batch_with_a_checkpoint(
    server, whole, tmp_path, workers, number, statuses
):
    readings = READINGS | {"workers": workers, "checkpoint_seconds": 300}
    job = server.start(Job(tmp_path / "atlas", readings=readings))
    until(lambda: job.forwards() >= 3, f"a forward; see {job.log}")
    os.killpg(job.pid, number)  # a terminal's Ctrl-C goes to the workers as well
    assert server.wait(job) in statuses
    said = job.log.read_text()
    assert "Stopping after this batch, with a checkpoint" in said
    if number == signal.SIGINT:  # Python shows no notes of a SystemExit
        assert "the same scan goes on from there" in said
    until(lambda: not processes_of(job.pid), "the end of the workers", 5)
    assert not job.out.exists()
    assert checkpoint_of(job.out)["next_batch"] == job.forwards()
    again = server.run(job)
    assert job.forwards() + again.forwards() == BATCHES
    assert_same(job.out, whole.out)


def test_a_second_signal_stops_at_once_and_loses_only_its_batch(server, whole, tmp_path):
    job = server.start(Job(tmp_path / "atlas", fault=Fault("forward", 3, act="stall")))
    until(lambda: job.forwards() == 3, f"a forward; see {job.log}")
    os.kill(job.pid, signal.SIGINT)
    until(lambda: "Once more to stop at once" in job.log.read_text(), "the first signal")
    assert processes_of(job.pid) == [job.pid]
    start = time.monotonic()
    os.kill(job.pid, signal.SIGINT)
    assert server.wait(job) in INTERRUPTED
    assert "KeyboardInterrupt" in job.log.read_text()
    assert time.monotonic() - start < 20  # the forward would have taken 60
    assert server.run(replace(job, fault=None)).forwards() == BATCHES - 2
    assert_same(job.out, whole.out)


# Two at once.


def test_a_folder_belongs_to_one_scan_until_it_is_killed_even_with_workers(server, whole, tmp_path):
    out = tmp_path / "atlas"
    readings = READINGS | {"workers": 2}
    stalled = Job(out, readings=readings, fault=Fault("forward", 4, act="stall"))
    first = server.start(stalled)
    until(lambda: first.forwards() == 4, f"a forward; see {first.log}")
    said = server.fail(Job(out), status=1)
    assert f"OutputError: {out.with_name('.atlas.scan')}/part-0-of-1 is being written" in said
    assert f"process {first.pid} on " in said
    assert len(processes_of(first.pid)) == 3
    os.kill(first.pid, signal.SIGKILL)
    server.wait(first)
    assert server.run(Job(out)).forwards() == BATCHES - 3
    assert_same(out, whole.out)
    until(lambda: not processes_of(first.pid), "the end of its workers", 10)


def test_a_folder_is_still_locked_after_its_own_process_tried_it_again(server, tmp_path):
    out = tmp_path / "atlas"
    place = out.with_name(".atlas.scan") / "part-0-of-1"
    place.mkdir(parents=True)
    with locked(place / "lock"):
        for _ in range(2):
            with (
                pytest.raises(OutputError, match=f"process {os.getpid()} on "),
                locked(place / "lock"),
            ):
                pass
        assert f"process {os.getpid()} on " in server.fail(Job(out), status=1)


# A full disk.


def test_a_disk_that_is_full_costs_no_more_than_what_came_after_the_last_checkpoint(
    server, whole, tmp_path
):
    job = Job(tmp_path / "atlas", fault=Fault("forward", 4, act="limit"))
    said = server.fail(job, status=1)
    kept = checkpoint_of(job.out)
    assert "OutputError: A checkpoint could not be written" in said
    assert "The last one is intact" in said
    assert "Free some space and run the same scan again" in said
    assert kept["next_batch"] == 3
    assert server.run(replace(job, fault=None)).forwards() == BATCHES - 3
    assert_same(job.out, whole.out)


def test_a_disk_that_is_full_in_the_end_costs_no_forward(server, whole, tmp_path):
    fault = Fault("durable", 1, "atlas/samples.jsonl", "after", "limit")
    job = Job(tmp_path / "atlas", fault=fault)
    said = server.fail(job, status=1)
    assert "OutputError: The atlas could not be written" in said
    assert "Free some space and run the same scan again" in said
    assert server.run(replace(job, fault=None)).forwards() == 0
    assert_same(job.out, whole.out)


def test_a_disk_without_the_room_is_refused_before_any_forward(
    vlm, scenes, tmp_path, monkeypatch, forwards
):
    size = nl.scan_size(vlm, HERE["sites"], n=4)
    disk = namedtuple("disk", "total used free")
    for missing, refused in ((1, True), (0, False)):
        monkeypatch.setattr(
            folder.shutil, "disk_usage", lambda _, m=missing: disk(0, 0, size.disk - m)
        )
        if refused:
            with pytest.raises(OutputError, match=r"needs .* GB in .*, where .* GB are free"):
                nl.scan(vlm, scenes[:12], out=tmp_path / "atlas", **HERE)
            assert forwards.count == 0
            assert list(tmp_path.iterdir()) == []
        else:
            nl.scan(vlm, scenes[:12], out=tmp_path / "atlas", **HERE)


# What raises.


class Forwards:
    """Counts forwards, and halts in one of them."""

    def __init__(self) -> None:
        self.count = 0
        self.halts_in = 0

    def __call__(self, *_given) -> None:
        self.count += 1
        if self.count == self.halts_in:
            raise ArithmeticError("the power went off")

    def reset(self) -> None:
        self.count = self.halts_in = 0


@pytest.fixture
def forwards(vlm):
    found = Forwards()
    module = vlm.model.get_submodule(vlm.site("vision.0").path)
    handle = module.register_forward_pre_hook(found)
    yield found
    handle.remove()


@pytest.fixture(scope="module")
def undisturbed(vlm, scenes, tmp_path_factory) -> Path:
    return nl.scan(vlm, scenes[:12], out=tmp_path_factory.mktemp("here") / "atlas", **HERE).path


@pytest.fixture
def unfinished(vlm, scenes, tmp_path, forwards) -> Path:
    """Where the atlas of a scan would be, which was interrupted in its third batch of four."""
    out = tmp_path / "atlas"
    forwards.halts_in = 3
    with pytest.raises(ArithmeticError):
        nl.scan(vlm, scenes[:12], out=out, **HERE)
    forwards.reset()
    return out


def test_a_forward_that_raises_keeps_what_came_before_and_says_where(
    vlm, scenes, tmp_path, forwards, undisturbed
):
    out = tmp_path / "atlas"
    forwards.halts_in = 3
    with pytest.raises(ArithmeticError) as error:
        nl.scan(vlm, scenes[:12], out=out, **HERE)
    (note,) = error.value.__notes__
    assert note.startswith(f"6 samples had been scanned and are kept in {tmp_path}/.atlas.scan")
    assert not out.exists()
    forwards.reset()
    nl.scan(vlm, scenes[:12], out=out, **HERE)
    assert forwards.count == 2
    assert_same(out, undisturbed)


def test_a_scan_of_one_shot_samples_goes_on_with_the_same_ones(
    vlm, scenes, unfinished, forwards, undisturbed
):
    nl.scan(vlm, iter(scenes[:12]), out=unfinished, **HERE)
    assert forwards.count == 2
    assert_same(unfinished, undisturbed)


def test_samples_that_raise_midway_keep_what_came_before(
    vlm, scenes, tmp_path, forwards, undisturbed
):
    def broken():
        yield from scenes[:8]
        raise ConnectionError("the server went away")

    out = tmp_path / "atlas"
    with pytest.raises(ConnectionError) as error:
        nl.scan(vlm, broken(), out=out, **HERE)
    assert "6 samples had been scanned" in error.value.__notes__[0]
    assert forwards.count == 2
    forwards.reset()
    nl.scan(vlm, scenes[:12], out=out, **HERE)
    assert forwards.count == 2
    assert_same(out, undisturbed)


@pytest.mark.parametrize("checkpoint_seconds", [0, 300])
def test_a_batch_that_was_taken_in_by_half_is_never_saved(
    vlm, scenes, tmp_path, forwards, undisturbed, monkeypatch, checkpoint_seconds
):
    out, plain, calls = tmp_path / "atlas", SiteStatistics.update, []

    def update(self, *given):
        calls.append(None)
        if len(calls) == 6:  # two sites: the second one of the third batch
            raise MemoryError("no memory left")
        plain(self, *given)

    monkeypatch.setattr(run, "_WORTH", 0)
    with monkeypatch.context() as patch:
        patch.setattr(SiteStatistics, "update", update)
        with pytest.raises(MemoryError) as error:
            nl.scan(vlm, scenes[:12], out=out, checkpoint_seconds=checkpoint_seconds, **HERE)
    assert not hasattr(error.value, "__notes__")
    forwards.reset()
    nl.scan(vlm, scenes[:12], out=out, **HERE)
    assert forwards.count == (2 if checkpoint_seconds == 0 else 4)
    assert_same(out, undisturbed)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("written", [0, 3])
def test_records_whose_writing_was_cut_short_are_not_lost(
    vlm, scenes, tmp_path, undisturbed, monkeypatch, error, written
):
    out, plain, calls = tmp_path / "atlas", Workplace.append, []

    def append(self, records):
        records = list(records)
        calls.append(len(records))
        if sum(calls) == 6 and records:  # a window is done
            plain(self, records[:written])
            raise error("in the middle")
        plain(self, records)

    with monkeypatch.context() as patch:
        patch.setattr(Workplace, "append", append)
        with pytest.raises(error):
            nl.scan(vlm, scenes[:12], out=out, **HERE)
    assert sum(calls) >= 6
    nl.scan(vlm, scenes[:12], out=out, **HERE)
    assert_same(out, undisturbed)


def test_a_scan_that_had_too_many_skips_goes_on_when_more_are_allowed(
    vlm, scenes, tmp_path, forwards
):
    samples = [*scenes[:6], *(replace(each, images=()) for each in scenes[6:8]), *scenes[8:12]]
    out = tmp_path / "atlas"
    with pytest.raises(SkippedError):
        nl.scan(vlm, samples, out=out, max_skips=1, **HERE)
    forwards.reset()
    with pytest.warns(UserWarning, match="2 of 12 samples were skipped"):
        nl.scan(vlm, samples, out=out, max_skips=2, **HERE)
    assert 0 < forwards.count < 4
    with pytest.warns(UserWarning, match="2 of 12 samples were skipped"):
        nl.scan(vlm, samples, out=tmp_path / "whole", **HERE)
    assert_same(out, tmp_path / "whole")


# Damage.


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    changed = {
        "cut short": data[:middle],
        "changed": data[:middle] + bytes([data[middle] ^ 0x80]) + data[middle + 1 :],
    }
    path.write_bytes(changed[how])


@pytest.mark.parametrize("how", ["cut short", "changed"])
@pytest.mark.parametrize("name", ["progress.json", "sites/language.2.safetensors"])
def test_a_damaged_checkpoint_is_an_error_that_says_how_to_begin_again(
    vlm, scenes, unfinished, forwards, undisturbed, name, how
):
    (newest,) = unfinished.with_name(".atlas.scan").glob("part-0-of-1/checkpoint-*")
    damage(newest / name, how)
    with pytest.raises(OutputError, match=r"(?s)No checkpoint in .* is whole.*resume=False"):
        nl.scan(vlm, scenes[:12], out=unfinished, **HERE)
    assert forwards.count == 0
    nl.scan(vlm, scenes[:12], out=unfinished, resume=False, **HERE)
    assert forwards.count == 4
    assert_same(unfinished, undisturbed)


@pytest.mark.parametrize("how", ["cut short", "changed"])
@pytest.mark.parametrize("name", ["progress.json", "sites/language.2.safetensors"])
def test_the_checkpoint_before_a_damaged_one_is_used(
    vlm, scenes, tmp_path, forwards, undisturbed, monkeypatch, name, how
):
    # As a machine leaves it that lost its power before the older one was deleted.
    out = tmp_path / "atlas"
    place = out.with_name(".atlas.scan") / "part-0-of-1"
    monkeypatch.setattr(run, "_WORTH", 0)
    forwards.halts_in = 4

    def keeping():
        for number, sample in enumerate(scenes[:12]):
            if number == 6:
                # The generator is asked for the second window before its first batch runs.
                (old,) = place.glob("checkpoint-*")
                shutil.copytree(old, tmp_path / "kept" / old.name)
            yield sample

    with pytest.raises(ArithmeticError):
        nl.scan(vlm, keeping(), out=out, checkpoint_seconds=0, **HERE)
    (old,) = (tmp_path / "kept").iterdir()
    shutil.copytree(old, place / old.name)
    newest = sorted(place.glob("checkpoint-*"))[-1]
    assert newest.name != old.name
    damage(newest / name, how)
    forwards.reset()
    with pytest.warns(UserWarning, match=f"A damaged checkpoint was left aside: .*{newest.name}"):
        nl.scan(vlm, scenes[:12], out=out, **HERE)
    assert forwards.count == 2
    assert_same(out, undisturbed)


# Something else.


OTHER = {
    "n": ({"n": 3}, "n=4, not 3"),
    "keep_visual": ({"keep_visual": 6}, "keep_visual=5, not 6"),
    "text_roles": ({"text_roles": ("prompt",)}, "text_roles="),
    "batch_size": ({"batch_size": 2}, "batch_size=3, not 2"),
    "window": ({"window": 12}, "window=6, not 12"),
    "template": ({"template": False}, "template=True, not False"),
    "sites": ({"sites": ("vision.1",)}, "2 sites, not these 1"),
}


@pytest.mark.parametrize("what", OTHER)
def test_an_unfinished_scan_with_other_arguments_is_refused(
    vlm, scenes, unfinished, forwards, undisturbed, what
):
    changed, said = OTHER[what]
    with pytest.raises(OutputError, match=f"that is another one: {said}.*resume=False"):
        nl.scan(vlm, scenes[:12], out=unfinished, **HERE | changed)
    assert forwards.count == 0
    nl.scan(vlm, scenes[:12], out=unfinished, **HERE)
    assert forwards.count == 2
    assert_same(unfinished, undisturbed)


@pytest.mark.parametrize("what", ["other weights", "dtype float32, not bfloat16"])
def test_an_unfinished_scan_of_another_model_is_refused(bed, scenes, unfinished, what):
    model = copy.deepcopy(bed.model)
    if what == "other weights":
        with torch.no_grad():
            next(model.parameters()).add_(1)
    else:
        model.bfloat16()
    other = nl.adapt(model, bed.processor)
    before = content(unfinished.with_name(".atlas.scan"))
    with pytest.raises(OutputError, match=f"that is another one: .*{what}"):
        nl.scan(other, scenes[:12], out=unfinished, **HERE)
    assert content(unfinished.with_name(".atlas.scan")) == before


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("what", ["order", "id", "text", "domain", "fewer"])
def test_an_unfinished_scan_of_other_samples_is_refused(
    vlm, scenes, unfinished, forwards, undisturbed, what, workers
):
    first, *rest = scenes[:12]
    others = {
        "order": [*rest[:1], first, *rest[1:]],
        "id": [replace(first, id="another"), *rest],
        "text": [replace(first, response=f"{first.response} red"), *rest],
        "domain": [replace(first, domain="another"), *rest],
        "fewer": scenes[:5],
    }
    with pytest.raises(DataError, match=r"an unfinished scan of other samples.*resume=False"):
        nl.scan(vlm, others[what], out=unfinished, workers=workers, **HERE)
    assert forwards.count == 0
    nl.scan(vlm, scenes[:12], out=unfinished, workers=workers, **HERE)
    assert forwards.count == 2
    assert_same(unfinished, undisturbed)


def test_a_scan_that_shall_not_go_on_begins_anew(vlm, scenes, unfinished, forwards, undisturbed):
    others = list(reversed(scenes[:12]))
    nl.scan(vlm, others, out=unfinished, resume=False, **HERE)
    assert forwards.count == 4
    nl.scan(vlm, others, out=unfinished.with_name("whole"), **HERE)
    assert_same(unfinished, unfinished.with_name("whole"))


def test_a_finished_scan_is_opened_and_not_repeated(vlm, scenes, undisturbed, forwards):
    before = content(undisturbed), (undisturbed / "runs.jsonl").read_bytes()
    again = nl.scan(vlm, scenes[:12], out=undisturbed, **HERE)
    assert forwards.count == 0
    assert again.path == undisturbed
    assert again.manifest.samples == 12
    assert (content(undisturbed), (undisturbed / "runs.jsonl").read_bytes()) == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"n": 3}, "n=4, not 3"),
        ({"sites": "vision.1"}, "2 sites, not these 1"),
        ({"shard": (0, 2)}, "shard none, not 0 of 2"),
    ],
)
def test_a_finished_scan_with_other_arguments_is_refused(
    vlm, scenes, undisturbed, forwards, changed, said
):
    before = content(undisturbed)
    with pytest.raises(OutputError, match=rf"another scan already \({said}\)"):
        nl.scan(vlm, scenes[:12], out=undisturbed, **HERE | changed)
    assert forwards.count == 0
    assert content(undisturbed) == before


@pytest.mark.parametrize("resume", [True, False])
def test_a_finished_scan_of_other_samples_is_refused(vlm, scenes, undisturbed, forwards, resume):
    with pytest.raises(OutputError, match=r"another scan already \(other samples\)"):
        nl.scan(vlm, scenes[1:13], out=undisturbed, resume=resume, **HERE)
    assert forwards.count == 0


# What a scan holds meanwhile.


def alive_records() -> int:
    gc.collect()
    return sum(issubclass(type(each), SampleRecord) for each in gc.get_objects())


def test_the_table_of_samples_is_written_as_the_scan_goes(vlm, scenes, tmp_path):
    out, lines, alive = tmp_path / "atlas", [], []

    def watched():
        for number, sample in enumerate(scenes[:20]):
            if number % 4 == 0:
                table = out.with_name(".atlas.scan") / "part-0-of-1" / "samples.jsonl"
                lines.append(len(table.read_text().splitlines()) if table.exists() else 0)
                alive.append(alive_records())
            yield sample

    before = alive_records()
    nl.scan(vlm, watched(), out=out, sites="vision.0", n=2, batch_size=2, window=4)
    # A window is written when the first batch of the next has been taken in.
    assert lines == [0, 0, 4, 8, 12]
    assert max(alive) - before <= 8
    assert [each.name for each in tmp_path.iterdir()] == ["atlas"]


def test_runs_say_how_often_it_was_begun(vlm, scenes, unfinished):
    atlas = nl.scan(vlm, scenes[:12], out=unfinished, **HERE)
    assert [each.samples for each in atlas.runs] == [6, 6]
    assert all(each.seconds > 0 for each in atlas.runs)
