"""Tests of data.py: probes, the scripted searcher, collected trajectories, files in and out, the command.

Statistics are taken over fixed seeds, most of them over layouts without pictures, so they never flake.

Lines worth flipping, each with the test that then fails:
    _scene         _other(...) -> the wanted name             -> exactly_one_plate_fits_the_question
    _scene         no shuffle of the answers                  -> nothing_but_the_plate_gives_the_answer_away
    _lay_out       sample -> the first cells                  -> targets_lie_everywhere_alike
    _sprite        no correction of the ink                   -> the two tests of the overview
    cell_box       x + 1 -> x + 0.9                           -> the_gold_box_contains_the_plate_...
    search_script  pop(0) -> choice(order)                    -> the_searcher_never_returns_to_a_plate
    search_script  misses stays 0                             -> guesses_grow_with_impatience_and_with_misses
    cold_start     yield all                                  -> every_kept_trajectory_ends_right
    collect        ended episodes stay in the conversation    -> a_conversation_that_ended_is_none
    _tuples        lists stay lists                           -> saved_probes_come_back_as_they_were
    _image_file    no look at ".."                            -> an_image_outside_the_set_is_refused
    load_probes    enumerate from 0                           -> errors_name_the_file_and_the_row
"""
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import matplotlib.cbook
import numpy as np
import pytest
from PIL import Image

import bench_probes
import data
from data import COLORS, DIFFICULTIES, DIGITS, LETTERS, PROBE_KINDS, SHAPES, Probe, UserError, load_probes, save_probes
from env import Answer, Crop, CropEnv, ImageError, crop_pixels, fit_pixels, grade, load_image, parse_action

PHOTO = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)  # 512 x 600
ROOT = Path(data.__file__).parent
ALL = list(itertools.product(PROBE_KINDS, DIFFICULTIES))


def layouts(kind, difficulty, count):
    """Probes that are not drawn."""
    return [data._lay_out(kind, difficulty, seed) for seed in range(count)]


def chi_square(table):
    """(statistic, a bound that chance exceeds about once in 30,000) for counts against rows and columns independent.
    One row: against all columns alike."""
    table = np.array(table, float)
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    if len(table) == 1:
        expected[:] = table.mean()
    freedom = max(len(table) - 1, 1) * (table.shape[1] - 1)
    return ((table - expected) ** 2 / expected).sum(), freedom + 5.5 * (2 * freedom) ** 0.5


# ------------------------------------------------------------------------------------------------ probes

def fits(question, parts):
    """Does a plate fit the question? Read from its words, not from what the generator noted down."""
    names = [name for name, _ in parts]
    for pattern, wanted in ((r"What color is the (\w+)\?", lambda m: names[0] == m[1]),
                            (r"What number is on sign (\w)\?", lambda m: names[0] == m[1]),
                            (r"What color is the (\w+) with number (\d)\?", lambda m: names == [m[1], m[2]]),
                            (r"What color is the shape left of the (\w+)\?", lambda m: names[1] == m[1])):
        if match := re.fullmatch(pattern, question):
            return wanted(match)
    raise AssertionError(question)


@pytest.mark.parametrize("kind, difficulty", ALL)
def test_exactly_one_plate_fits_the_question(kind, difficulty):
    for probe in layouts(kind, difficulty, 150):
        items = probe.meta["items"]
        target, = [item for item in items if fits(probe.question, item["parts"])]
        assert [item["target"] for item in items] == [item is target for item in items]
        shown = target["parts"][1][0] if kind == "sign" else target["parts"][0][1]
        assert probe.answer == target["answer"] == shown
        assert probe.boxes == [data.cell_box(target["cell"], 6)]
        assert len({item["cell"] for item in items}) == len(items) == probe.meta["k"] in DIFFICULTIES[difficulty][0]


@pytest.mark.parametrize("kind, difficulty", ALL)
def test_answers_are_balanced_exactly_within_a_probe(kind, difficulty):
    for probe in layouts(kind, difficulty, 50):
        counts = Counter(item["answer"] for item in probe.meta["items"])
        assert set(counts) == set(DIGITS if kind == "sign" else COLORS)
        assert len(set(counts.values())) == 1


@pytest.mark.parametrize("kind", ("conjunction", "relation"))
def test_look_alikes_share_a_part_with_the_target(kind):
    for probe in layouts(kind, "hard", 20):
        target, *others = [[name for name, _ in item["parts"]] for item in probe.meta["items"]]
        if kind == "conjunction":
            assert all((o[0] == target[0]) != (o[1] == target[1]) for o in others)
        else:
            assert any(o[0] == target[1] for o in others)             # the named shape, on the wrong side


@pytest.mark.parametrize("kind", PROBE_KINDS)
def test_nothing_but_the_plate_gives_the_answer_away(kind):
    probes = layouts(kind, "hard", 3000)
    answers = sorted({p.answer for p in probes})
    for feature in (lambda p: 0, lambda p: p.question, lambda p: p.meta["k"], lambda p: p.boxes[0][:2]):
        counts = Counter((feature(p), p.answer) for p in probes)
        table = [[counts[value, answer] for answer in answers] for value in sorted({value for value, _ in counts})]
        statistic, bound = chi_square(table)
        assert statistic < bound


def test_targets_lie_everywhere_alike():
    probes = [p for kind in PROBE_KINDS for p in layouts(kind, "hard", 1500)]
    for which in (lambda p: [p.boxes[0]], lambda p: [data.cell_box(i["cell"], 6) for i in p.meta["items"]]):
        counts = Counter(box for p in probes for box in which(p))
        statistic, bound = chi_square([list(counts.values())])
        assert len(counts) == 36 and statistic < bound
    for k, share in Counter(p.meta["k"] for p in probes).items():
        assert k in (12, 16, 20, 24) and abs(share / len(probes) - 0.25) < 0.03


@pytest.mark.parametrize("kind, difficulty", ALL)
def test_every_kind_and_difficulty_draws(kind, difficulty):
    probe = data.make_probe(kind, difficulty, 7)
    assert probe.open().size == (288, 288) and probe.open().mode == "RGB"
    assert (probe.source, probe.difficulty, probe.options) == (kind, difficulty, None)
    assert "<" not in probe.question and probe.prompt() == probe.question
    assert np.asarray(probe.open()).std() > 10
    larger = data.make_probe(kind, difficulty, 7, cell=64, grid=5)
    assert larger.open().size == (320, 320)


def fingerprint(seed):
    probe = data.make_probe("relation", "hard", seed)
    return [probe.question, probe.answer, str(probe.meta), hash(probe.open().tobytes()) if False else
            __import__("hashlib").sha256(probe.open().tobytes()).hexdigest()]
