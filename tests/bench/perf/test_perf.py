"""Measuring: what is printed, and that the two sides of every duel on data do the same work. No time is asserted."""

from __future__ import annotations

import math
import re
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.errors import UserError
from bench.perf import data as perf_data
from bench.perf import overhead as perf_overhead
from bench.perf import perf
from bench.perf.perf import Duel
from datamodules.cache import LatentCache


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Whatever is made up lies in the test's own folder, and is small."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(perf_data, "BATCH", 8)
    monkeypatch.setattr(perf_overhead, "WARM_UP", 1)


def results(duel):
    return duel.difference(duel.ours(), duel.theirs())


# --- the machinery --------------------------------------------------------------------------------------------------


def test_a_duel_takes_turns_and_is_printed_as_one_line(monkeypatch, capsys):
    turns = []

    def side(name, value):
        return lambda: turns.append(name) or value

    duel = Duel("addition", "a peer", side("ours", 2.5), side("theirs", 2.0), lambda a, b: a - b, "difference", ", n=3")
    monkeypatch.setattr(perf, "AREAS", {"sums": {"add": lambda: [duel], "none": lambda: []}})
    perf.run("sums", rounds=2)
    assert turns == ["theirs", "ours", "ours", "theirs", "theirs", "ours"]  # one round warms up
    head, columns, *lines = capsys.readouterr().out.splitlines()
    assert head.endswith("2 rounds") and columns.split() == ["ours", "peer", "ratio", "memory"]
    time, note = r"[\d.]+ (ms|s) +", r"peer: a peer; difference 5\.0e-01, n=3"
    (line,) = lines
    assert re.fullmatch(rf"addition +{time}{time}[\d.]+x +\([\d.]+-[\d.]+\) +\d+ MB  {note}", line)


def test_only_one_maker_is_run_if_one_is_asked_for(monkeypatch, capsys):
    made = []
    monkeypatch.setattr(perf, "AREAS", {"sums": {name: lambda name=name: made.append(name) or [] for name in "ab"}})
    perf.run("sums", rounds=1, only="b")
    assert made == ["b"]


def test_what_cannot_be_measured_is_refused_with_what_can():
    with pytest.raises(UserError, match=r"'evaluater' is nothing to measure.*evaluator"):
        perf.run("evaluater", rounds=1)
    with pytest.raises(UserError, match=r"'frechet_' is not measured in evaluator.*frechet"):
        perf.run("evaluator", rounds=1, only="frechet_")


# --- overhead -------------------------------------------------------------------------------------------------------


def test_the_bare_loop_trains_as_a_run_does():
    (duel,) = perf_overhead.loop(images=2, steps=2)
    ours, theirs = duel.ours(), duel.theirs()
    assert duel.difference(ours.result, theirs.result) == 0
    assert perf._timed(lambda: theirs) == theirs  # its own clock, not the microseconds of handing it over
    untrained = perf_overhead._weights(perf_overhead.build_module(perf_overhead.load_run("digits"), perf_overhead.SPEC))
    assert (ours.result - untrained).abs().max() > 0


def test_checkpointing_is_measured_against_the_same_gradients():
    (duel,) = perf_overhead.checkpointing(images=1)
    assert results(duel) == 0
    kept, else_kept = map(int, re.findall(r"(\d+) MB", duel.note))
    assert kept < else_kept / 3


# --- data -----------------------------------------------------------------------------------------------------------


def test_the_gather_gives_the_bytes_of_the_memory_map():
    duels = perf_data.gather(count=40)
    assert [results(duel) for duel in duels] == [0, 0, 0]


def test_an_epoch_is_the_same_out_of_single_files():
    moments, batches = perf_data.npy(count=40)
    assert results(moments) == 0
    assert results(batches) < 1e-5  # two draws of a posterior of 3e-7 around means of about 1
    latents = torch.cat([values for _, values in batches.ours()])
    assert latents.shape == (40, 4, 32, 32) and latents.std() == pytest.approx(1, abs=0.05)


def test_epochs_of_other_rows_are_infinitely_apart():
    (moments, _), short = perf_data.npy(count=40), perf_data.npy(count=32)[0]
    epoch = moments.ours()
    assert moments.difference(epoch[::-1], epoch) == 0
    assert moments.difference(epoch[:-1] + epoch[:1], epoch) == math.inf
    assert moments.difference(epoch, short.ours()) == math.inf
    changed = [(rows, moments + 1) for rows, moments in epoch]
    assert moments.difference(changed, epoch) == pytest.approx(1, abs=1e-5)


def test_litdata_is_left_out_with_a_sentence_where_it_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(perf_data.importlib.util, "find_spec", lambda name: None)
    assert perf_data.litdata(count=40) == []
    assert "litdata is not installed" in capsys.readouterr().out


def test_litdata_reads_what_the_cache_holds(capsys):
    pytest.importorskip("litdata", reason="a peer for measuring, which developers may install")
    for duel in perf_data.litdata(count=40):
        assert results(duel) < 1e-5


def test_the_first_batch_comes_out_of_a_cache_as_it_is_written():
    (duel,) = perf_data.first_batch(shards=2)
    assert results(duel) == 0
    module, batch = duel.ours()
    assert len(batch.labels) == 8 and module.cache.count == 2048
    assert "2,048 images" in duel.note
    mapped = LatentCache(module.cache.path, read_whole=0)  # the files are checked against their hashes, or mapped
    assert all((part == 0).all() for part in mapped.moments(np.array([0, 2047])))


def test_squares_are_those_of_pillow():
    (duel,) = perf_data.crops(count=2)
    assert results(duel) == 0
    assert duel.ours().shape == (2, 256, 256, 3)


def test_the_encoder_is_given_as_many_pictures_as_are_read():
    seen = []
    coder = SimpleNamespace(moments=lambda images: seen.append(images) or (images.float(), None))
    (duel,) = perf_data.feeding(count=2, coder=coder)
    assert results(duel) == 0
    assert torch.equal(seen[0].movedim(1, -1), duel.ours())
