"""A scan that several processes share is the scan of one."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch

import neuronlens as nl
from neuronlens import testbed
from neuronlens.errors import AtlasError, OutputError
from programs import rank_scans

pytestmark = pytest.mark.xdist_group("ranks")  # its processes are started once

HERE = {"sites": ("vision.1", "language.2"), "n": 4, "batch_size": 3, "window": 6}
"""Ten samples are four batches."""


def content(atlas: Path) -> dict[str, bytes]:
    """Every file but the one that says how the scan went."""
    return {
        str(path.relative_to(atlas)): path.read_bytes()
        for path in atlas.rglob("*")
        if path.is_file() and path.name != "runs.jsonl"
    }


def assert_same(out: Path, expected: Path) -> None:
    found, wanted = content(out), content(expected)
    assert found.keys() == wanted.keys()
    assert [name for name in found if found[name] != wanted[name]] == []


@pytest.fixture(scope="module")
def some(scenes) -> list[nl.Sample]:
    """Ten, of which one cannot be used."""
    return [
        replace(each, images=() if i == 4 else each.images) for i, each in enumerate(scenes[:10])
    ]


@pytest.fixture(scope="module")
def whole(vlm, some, tmp_path_factory) -> Path:
    with pytest.warns(UserWarning, match="1 of 10"):
        return nl.scan(vlm, some, out=tmp_path_factory.mktemp("whole") / "atlas", **HERE).path


@pytest.fixture(scope="module")
def shards(vlm, some, tmp_path_factory):
    """All shards of a scan, made once for each number of them."""
    made: dict[int, list[nl.Atlas]] = {}

    def of(count: int) -> list[nl.Atlas]:
        if count not in made:
            folder = tmp_path_factory.mktemp("shards")
            made[count] = []
            for index in range(count):
                with warnings.catch_warnings():
                    # One of them has the sample without an image.
                    warnings.filterwarnings("ignore", "1 of .* were skipped")
                    given = {"shard": (index, count), "out": folder / str(index)}
                    made[count].append(nl.scan(vlm, some, **HERE, **given))
        return made[count]

    return of


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_shards_of_a_scan_merge_to_the_whole_bit_for_bit(shards, whole, tmp_path, count):
    merged = nl.Atlas.merge(shards(count), tmp_path / "merged")
    assert_same(merged.path, whole)


def test_a_shard_beyond_the_last_batch_is_empty(shards):
    assert [each.manifest.samples > 0 for each in shards(5)] == [True] * 4 + [False]


def test_the_order_of_shards_does_not_matter(shards, whole, tmp_path):
    for number, order in enumerate(permutations(shards(3))):
        assert_same(nl.Atlas.merge(order, tmp_path / str(number)).path, whole)


def test_no_sample_is_in_two_shards(shards):
    for count in (2, 3, 5):
        taken = [position for each in shards(count) for position in each.samples]
        assert sorted(taken) == [0, 1, 2, 3, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("given", [[0], [0, 2], [0, 1, 1, 2]], ids=["one", "two", "one twice"])
def test_shards_do_not_merge_unless_each_is_there_once(shards, tmp_path, given):
    with pytest.raises(AtlasError):
        nl.Atlas.merge([shards(3)[i] for i in given], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_shard_goes_on_like_any_scan(vlm, some, shards, tmp_path):
    out, calls, expected = tmp_path / "atlas", [], shards(2)[0].path

    def halt(*_):
        calls.append(None)
        if len(calls) == 2:
            raise ArithmeticError("the power went off")

    module = vlm.model.get_submodule(vlm.site("vision.0").path)
    handle = module.register_forward_pre_hook(halt)
    try:
        with pytest.raises(ArithmeticError) as error:
            nl.scan(vlm, some, out=out, shard=(0, 2), **HERE)
        assert "samples had been scanned and are kept in" in error.value.__notes__[0]
        with pytest.raises(OutputError, match="another number of processes"):
            nl.scan(vlm, some, out=out, **HERE)
        # Whichever ended first would take the other's work away.
        with pytest.raises(OutputError, match=r"another shard \(part-0-of-2\).*folder of its own"):
            nl.scan(vlm, some, out=out, shard=(1, 2), **HERE)
        assert len(calls) == 2
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "1 of .* were skipped")
            nl.scan(vlm, some, out=out, shard=(0, 2), **HERE)
        assert len(calls) == 3
    finally:
        handle.remove()
    assert_same(out, expected)


def test_what_another_number_of_processes_left_is_not_gone_on_with(vlm, some, whole, tmp_path):
    out = tmp_path / "atlas"
    module = vlm.model.get_submodule(vlm.site("vision.0").path)
    calls = []

    def halt(*_):
        calls.append(None)
        if len(calls) == 2:
            raise ArithmeticError("the power went off")

    handle = module.register_forward_pre_hook(halt)
    try:
        with pytest.raises(ArithmeticError):
            nl.scan(vlm, some, out=out, shard=(0, 2), **HERE)
    finally:
        handle.remove()
    said = r"another number of processes.*\(part-0-of-2\). Run with that number.*resume=False"
    with pytest.raises(OutputError, match=said):
        nl.scan(vlm, some, out=out, **HERE)
    with pytest.warns(UserWarning, match="1 of 10"):
        nl.scan(vlm, some, out=out, resume=False, **HERE)
    assert_same(out, whole)
    assert [each.name for each in tmp_path.iterdir()] == ["atlas"]


def test_where_the_statistics_lie_changes_nothing(vlm, some, whole, tmp_path):
    with pytest.warns(UserWarning, match="1 of 10"):
        nl.scan(vlm, some, out=tmp_path / "atlas", state="cpu", **HERE)
    assert_same(tmp_path / "atlas", whole)


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_a_shard_that_is_none_is_refused(vlm, some, tmp_path, shard):
    with pytest.raises(ValueError, match=r"give \(i, n\) with i from 0 to n - 1"):
        nl.scan(vlm, some, out=tmp_path / "atlas", shard=shard, **HERE)


# Ranks.


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    """What two ranks left, of which one was killed once."""
    folder = tmp_path_factory.mktemp("ranks")
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node=2", "--max-restarts=1", "--monitor-interval=0.1"),
            *(rank_scans.__file__, str(folder)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def of_one(vlm, tmp_path_factory) -> Path:
    """The same scan by one process, with as many threads as each rank has."""
    samples = testbed.scenes(rank_scans.SAMPLES, seed=5)
    out, threads = tmp_path_factory.mktemp("one") / "atlas", torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return nl.scan(vlm, samples, out=out, **rank_scans.READINGS).path
    finally:
        torch.set_num_threads(threads)


def forwards(folder: Path, name: str, attempt: int) -> list[int]:
    """Of each rank."""
    paths = [folder / f"{name}-{attempt}-{rank}.forwards" for rank in (0, 1)]
    return [path.stat().st_size if path.exists() else 0 for path in paths]


@pytest.mark.parametrize("name", ["alone", "group"])
def test_two_ranks_find_what_one_process_finds(launched, of_one, name):
    # 17 samples in windows of 8 are 9 batches of 2.
    assert forwards(launched, name, 0) == [5, 4]
    assert forwards(launched, name, 1) == [0, 0]  # what is finished is opened
    assert_same(launched / name, of_one)
    runs = nl.Atlas.open(launched / name).runs
    assert sorted((each.shard.index, each.samples) for each in runs) == [(0, 9), (1, 8)]


def test_ranks_of_which_one_was_killed_go_on_from_the_checkpoints_of_both(launched, of_one):
    before, after = (forwards(launched, "killed", attempt) for attempt in (0, 1))
    assert before[1] == rank_scans.KILLED_IN
    assert before[0] >= 1
    assert after[1] == 4 - (rank_scans.KILLED_IN - 1)
    # The other one was stopped between two batches, or in one.
    assert 5 - before[0] <= after[0] <= 5 - before[0] + 1
    assert after[0] < 5
    assert_same(launched / "killed", of_one)


def test_ranks_leave_nothing_but_the_atlas(launched):
    assert [each.name for each in launched.iterdir() if each.name.endswith(".scan")] == []
