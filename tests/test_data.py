"""Tests of data.py: probes, the scripted searcher, collected trajectories, files in and out, the command.

Statistics are taken over fixed seeds, most of them over layouts without pictures, so they never flake.

Lines worth flipping, each with the test that then fails:
    _scene         _other(...) -> the wanted name             -> exactly_one_plate_fits_the_question
    _scene         no shuffle of the answers                  -> nothing_but_the_plate_gives_the_answer_away
    _lay_out       sample -> the first cells                  -> targets_lie_everywhere_alike
    _sprite        no correction of the ink                   -> the two tests that name the overview
    cell_box       x + 1 -> x + 0.9                           -> the_gold_box_contains_the_plate_...
    search_script  pop(0) -> choice(order)                    -> the_searcher_never_returns_to_a_plate
    search_script  misses stays 0                             -> guesses_grow_with_impatience_and_with_misses
    cold_start     yield all                                  -> every_kept_trajectory_ends_right
    play           ended episodes stay in the conversation    -> a_conversation_that_ended_makes_room
    play           talk is not what the world said            -> the_collector_keeps_what_ends_right_...
    _table         place of the row after                     -> hr_bench_has_four_orders_...
    _vstar_row     options as they are listed                 -> vstar_folders_shuffle_...
    Endpoint       break is left out                          -> attempts_are_bounded_...
    gather         rejected ones are played again             -> a_collection_that_stopped_goes_on_...
    _tuples        lists stay lists                           -> saved_probes_come_back_as_they_were
    _image_file    no look at ".."                            -> an_image_outside_the_set_is_refused
    load_probes    enumerate from 0                           -> errors_name_the_file_and_the_row
"""
import ast
import base64
import csv
import io
import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import matplotlib.cbook
import numpy as np
import pytest
from PIL import Image

import bench_probes
import data
from data import (COLORS, DIFFICULTIES, DIGITS, LETTERS, PROBE_KINDS, SHAPES, Probe, UserError, load_probes,
                  save_probes)
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
    for pattern, wanted in ((r"What color is the tag with the (\w+)\?", lambda m: m[1] in parts),
                            (r"What number is on sign (\w)\?", lambda m: m[1] in parts),
                            (r"What color is the tag with (\w+) and (\d)\?", lambda m: {m[1], m[2]} < set(parts)),
                            (r"What number is left of the (\w+)\?", lambda m: parts[1] == m[1])):
        if match := re.fullmatch(pattern, question):
            return wanted(match)
    raise AssertionError(question)


@pytest.mark.parametrize("kind, difficulty", ALL)
def test_exactly_one_plate_fits_the_question(kind, difficulty):
    for probe in layouts(kind, difficulty, 150):
        items = probe.meta["items"]
        target, = [item for item in items if fits(probe.question, item["parts"])]
        assert [item["target"] for item in items] == [item is target for item in items]
        shown = target["parts"][{"attribute": 2, "sign": 1, "conjunction": 2, "relation": 0}[kind]]
        assert probe.answer == target["answer"] == shown
        assert probe.boxes == [data.cell_box(target["cell"], 6)]
        assert len({item["cell"] for item in items}) == len(items) == probe.meta["k"] in DIFFICULTIES[difficulty][0]


@pytest.mark.parametrize("kind, difficulty", ALL)
def test_answers_are_balanced_exactly_within_a_probe(kind, difficulty):
    for probe in layouts(kind, difficulty, 50):
        counts = Counter(item["answer"] for item in probe.meta["items"])
        assert set(counts) == set(DIGITS if kind in ("sign", "relation") else COLORS)
        assert len(set(counts.values())) == 1


@pytest.mark.parametrize("kind", ("conjunction", "relation"))
def test_look_alikes_share_a_part_with_the_target(kind):
    for probe in layouts(kind, "hard", 20):
        target, *others = [item["parts"] for item in probe.meta["items"]]
        if kind == "conjunction":
            assert all((o[0] == target[0]) != (o[1] == target[1]) for o in others)
        else:
            assert any(o[0] == target[1] for o in others)             # the named shape, on the wrong side


@pytest.mark.parametrize("kind", PROBE_KINDS)
def test_nothing_but_the_plate_gives_the_answer_away(kind):
    probes = layouts(kind, "hard", 1500)
    answers = sorted({p.answer for p in probes})
    for feature in (lambda p: 0, lambda p: p.question, lambda p: p.meta["k"], lambda p: p.boxes[0][:2]):
        counts = Counter((feature(p), p.answer) for p in probes)
        table = [[counts[value, answer] for answer in answers] for value in sorted({value for value, _ in counts})]
        statistic, bound = chi_square(table)
        assert statistic < bound


def test_targets_lie_everywhere_alike():
    probes = [p for kind in PROBE_KINDS for p in layouts(kind, "hard", 700)]
    for which in (lambda p: [p.boxes[0]], lambda p: [data.cell_box(i["cell"], 6) for i in p.meta["items"]]):
        counts = Counter(box for p in probes for box in which(p))
        statistic, bound = chi_square([list(counts.values())])
        assert len(counts) == 36 and statistic < bound
    for k, share in Counter(p.meta["k"] for p in probes).items():
        assert k in (12, 16, 20, 24) and abs(share / len(probes) - 0.25) < 0.035


@pytest.mark.parametrize("kind, difficulty", ALL)
def test_every_kind_and_difficulty_draws(kind, difficulty):
    probe = data.make_probe(kind, difficulty, 7)
    assert probe.open().size == (288, 288) and probe.open().mode == "RGB"
    assert (probe.source, probe.difficulty, probe.options) == (kind, difficulty, None)
    assert "<" not in probe.question and probe.prompt() == probe.question
    assert np.asarray(probe.open()).std() > 10
    larger = data.make_probe(kind, difficulty, 7, cell=64, grid=5)
    assert larger.open().size == (320, 320)


FINGERPRINT = """
import zlib, data
probe = data.make_probe("relation", "hard", {seed})
print(probe.question, probe.answer, probe.meta["items"], zlib.crc32(probe.open().tobytes()))
"""


def test_the_same_seed_gives_the_same_probe_in_every_process(capsys):
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        out = subprocess.check_output([sys.executable, "-c", FINGERPRINT.format(seed=5)], text=True, env=env)
        exec(FINGERPRINT.format(seed=5))
        assert out == capsys.readouterr().out != ""
    exec(FINGERPRINT.format(seed=6))
    assert out != capsys.readouterr().out


def test_the_same_seed_gives_the_same_stream():
    def first(seed):
        return [(p.question, p.meta) for p in itertools.islice(data.probe_stream(PROBE_KINDS, ("hard",), seed), 5)]

    assert first(1) == first(1) != first(2)


def test_a_probe_of_a_stream_is_drawn_when_it_is_opened_and_once():
    probe = next(data.probe_stream(PROBE_KINDS, ("easy",), 3))
    assert callable(probe.image)
    assert probe.open() is probe.open() is probe.image


@pytest.mark.parametrize("wrong", [
    ("colour", "hard", {}), ("sign", "brutal", {}), ("sign", "hard", {"candidates": 5}),
    ("sign", "hard", {"candidates": 40}), ("sign", "hard", {"candidates": 0}), ("sign", "easy", {"grid": 1}),
])
def test_a_probe_that_cannot_be_is_refused(wrong):
    kind, difficulty, size = wrong
    with pytest.raises(ValueError, match="choose from|look-alikes"):
        data.make_probe(kind, difficulty, 0, **size)


def test_the_gold_box_contains_the_plate_wherever_it_lies():
    for (x, y), dx, dy in itertools.product(itertools.product(range(6), repeat=2), (-0.96, 0.96), (-0.96, 0.96)):
        canvas = Image.new("RGB", (288, 288))
        data._draw_plate(canvas, ("square", "ring", "red"), (x + 0.5) * 48 + dx, (y + 0.5) * 48 + dy, 48, 20, 220)
        left, top, right, bottom = canvas.getbbox()
        x0, y0, x1, y1 = crop_pixels(canvas.size, data.cell_box((x, y), 6))
        assert x0 <= left < right <= x1 and y0 <= top < bottom <= y1
        assert max(x1 - x0, y1 - y0) <= 50                            # and little else


def test_photographs_lie_under_the_plates(tmp_path):
    probe = data.make_probe("sign", "easy", 1, backgrounds=[PHOTO])
    again, drawn = data.make_probe("sign", "easy", 1, backgrounds=[PHOTO]), data.make_probe("sign", "easy", 1)
    assert probe.open().tobytes() == again.open().tobytes() != drawn.open().tobytes()
    assert probe.meta == drawn.meta
    (tmp_path / "broken.jpg").write_bytes(Path(PHOTO).read_bytes()[:2000])
    with pytest.raises(ImageError, match="broken.jpg"):
        data.make_probe("sign", "easy", 1, backgrounds=[str(tmp_path / "broken.jpg")])


def test_nothing_tells_two_glyphs_apart_in_the_overview():
    near, far = [], []
    for name in SHAPES + LETTERS + DIGITS:
        canvas = Image.new("RGB", (48, 48), (220,) * 3)
        sprite = data._sprite(name, 20, 48 / 16)
        canvas.paste(sprite, (14, 14), sprite)
        near.append(np.asarray(canvas, float))
        far.append(np.asarray(fit_pixels(canvas, 64, 64), float))
    for i, j in itertools.combinations(range(len(near)), 2):
        assert abs(near[i] - near[j]).max() > 60                      # grey levels
        assert abs(far[i] - far[j]).max() < 8


def plain_sprite(name, size, blur_pixels):
    sprite = Image.new("RGBA", (size, size), data.INK)
    sprite.putalpha(Image.fromarray(np.uint8(255 * data._ink(name, size))))
    return sprite


@pytest.mark.parametrize("sprite, least, most", [(data._sprite, 0, 20), (plain_sprite, 38, 40)])
def test_a_strong_reader_of_the_overview_fails_unless_glyphs_are_plain(monkeypatch, sprite, least, most):
    monkeypatch.setattr(data, "_sprite", sprite)
    train, probes = ([data.make_probe("sign", "hard", s) for s in seeds] for seeds in (range(900, 930), range(40)))
    read = bench_probes.readers("sign", "hard", train)
    assert least <= sum(read["overview"](p) == p.answer for p in probes) <= most               # 10 by chance
    assert sum(read["all crops"](p) == p.answer for p in probes) >= 39


def test_options_are_shown_below_the_question():
    probe = Probe(PHOTO, "What is it?", "B", {"A": "a car", "B": "a rear admiral"})
    assert probe.prompt() == "What is it?\nA. a car\nB. a rear admiral"
    assert probe.open().size == (512, 600)
    with pytest.raises(ImageError, match="nowhere.jpg"):
        Probe("nowhere.jpg", "?", "").open()


# ------------------------------------------------------------------------------------------------ the searcher

def crops_and_answer(texts):
    *looks, last = [parse_action(text) for text in texts]
    assert all(isinstance(look, Crop) for look in looks) and isinstance(last, Answer)
    return [look.box for look in looks], last.text


@pytest.mark.parametrize("kind, pattern", itertools.product(PROBE_KINDS, data.PATTERNS))
def test_the_searcher_never_returns_to_a_plate_and_ends_at_the_target(kind, pattern):
    for seed, probe in enumerate(layouts(kind, "hard", 40)):
        boxes, answer = crops_and_answer(data.search_script(probe, random.Random(seed), pattern=pattern))
        plates = [data.cell_box(item["cell"], 6) for item in probe.meta["items"]]
        assert len(set(boxes)) == len(boxes) and set(boxes) <= set(plates)
        assert boxes[-1] == probe.boxes[0] and answer == probe.answer


def test_the_expected_number_of_looks_is_half_of_the_plates():
    for pattern in data.PATTERNS:
        probes = [data._lay_out("sign", "hard", seed, candidates=20) for seed in range(400)]
        looks = [len(data.search_script(p, random.Random(s), pattern=pattern)) - 1 for s, p in enumerate(probes)]
        assert abs(np.mean(looks) - 10.5) < 4 * (20 ** 2 / 12 / 400) ** 0.5


def test_depth_first_follows_one_plan_round_its_end_from_any_start_and_trial_and_error_has_no_plan():
    probe = data._lay_out("sign", "hard", 1)
    scripts = [data.search_script(probe, random.Random(seed), pattern="depth_first") for seed in range(20)]
    plan, = {script[0].split(", next ")[0].removeprefix("<think>plates ") for script in scripts}
    plan = plan.split()
    assert sorted(plan) == sorted(data.cell_name(item["cell"]) for item in probe.meta["items"])
    box_of = {data.cell_name(item["cell"]): data.cell_box(item["cell"], 6) for item in probe.meta["items"]}
    starts = set()
    for script in scripts:
        first = plan.index(script[0].split(", next ")[1].split("</think>")[0])
        boxes, _ = crops_and_answer(script)
        assert boxes == [box_of[name] for name in (plan + plan)[first:first + len(boxes)]]
        assert all(f"after {name} " in text for name, text in zip((plan + plan)[first:], script[1:-1]))
        starts.add(first)
    assert len(starts) > 5
    tried = {str(data.search_script(probe, random.Random(seed), pattern="trial_and_error")) for seed in range(9)}
    assert len(tried) > 4 and not any("plates" in script for script in tried)


def test_a_slip_looks_at_an_empty_place_and_is_noticed():
    probe = data._lay_out("sign", "hard", 2)
    at = {data.cell_box(item["cell"], 6) for item in probe.meta["items"]}
    texts = data.search_script(probe, random.Random(0), pattern="depth_first", slip=0.5)
    boxes, answer = crops_and_answer(texts)
    slips = [i for i, box in enumerate(boxes) if box not in at]
    assert slips and answer == probe.answer
    assert all(("see nothing, no" in texts[i + 1]) == (i in slips) for i in range(len(boxes)))


def test_guesses_grow_with_impatience_and_with_misses():
    probes = layouts("sign", "hard", 400)
    shares = []
    for impatience in (0.0, 0.02, 0.06, 0.3):
        guesses = Counter()
        for seed, probe in enumerate(probes):
            texts = data.search_script(probe, random.Random(seed), pattern="depth_first", impatience=impatience)
            if ", guess</think>" in texts[-1]:
                guesses[len(texts) - 1] += 1
        shares.append(sum(guesses.values()) / len(probes))
        if impatience == 0.02:                                        # 2 % after one miss, 8 % after four
            assert guesses[1] < guesses[4]
    assert shares[0] == 0 and shares == sorted(shares) and shares[-1] > 0.7


def test_the_thoughts_hold_the_goal_beside_what_is_seen():
    probe = data._lay_out("conjunction", "hard", 4)
    (_, shape), (_, digit) = probe.meta["checks"]
    texts = data.search_script(probe, random.Random(0), pattern="depth_first")
    assert all(f"want {shape}: see " in text for text in texts[1:])
    assert f"want {shape}: see {shape}, yes, want {digit}: see {digit}, yes, read {probe.answer}" in texts[-1]


def test_scripts_play_without_an_error():
    for kind in PROBE_KINDS:
        probe = data.make_probe(kind, "easy", 11)
        env = CropEnv(probe.open(), probe.prompt(), max_turns=99)
        env.reset()
        for text in data.search_script(probe, random.Random(1), pattern="trial_and_error", slip=0.2):
            env.step(text)
        assert env.stop == "answer" and not env.errors and grade(env.answer, probe.answer) == 1.0


def test_a_single_plate_is_looked_at_once_and_is_the_target_as_often_as_not():
    answered = 0
    for seed in range(300):
        probe = data._lay_out("sign", "hard", seed, grid=1, candidates=1)
        item, = probe.meta["items"]
        look, last = data.look_script(probe)
        assert parse_action(look).box == (0.0, 0.0, 1.0, 1.0)
        assert isinstance(parse_action(last), Answer) == item["target"] == (", yes, read " in last)
        assert f"see {item['parts'][0]}, " in last
        answered += item["target"]
    assert 110 < answered < 190


def test_the_world_of_the_warm_up_shows_the_picture_only_as_an_observation():
    probe = data.make_probe("sign", "hard", 3, grid=1, candidates=1)
    world = data.Unseen(probe.open(), probe.prompt())
    system, user = world.reset()
    assert system["content"][0]["text"] and [part["type"] for part in user["content"]] == ["text"]
    assert user["content"][0]["text"] == probe.question
    reply, stop = world.step(data.look_script(probe)[0])
    assert stop is None and reply["content"][-1]["image"].tobytes() == fit_pixels(probe.open(), 40_000, 2_000_000).tobytes()


SETTINGS = dict(trial_share=0.3, impatience=(0.03, 0.12), patient_share=0.3, slip=0.04, max_turns=16)


def kept(count, seed=0, **changes):
    probes = data.probe_stream(PROBE_KINDS, ("easy", "hard"), seed)
    return list(itertools.islice(data.cold_start(probes, seed, **{**SETTINGS, **changes}), count))


def test_every_kept_trajectory_ends_right_and_a_share_is_long():
    trajectories = kept(80)
    for t in trajectories:
        assert (t.stop, t.reward) == ("answer", 1.0) and t.pattern in data.PATTERNS
        assert crops_and_answer(t.texts)[1] == t.probe.answer
        assert len(t.texts) <= 16
    hurried, patient = (np.mean([len(t.texts) > 6 for t in kept(80, patient_share=share)]) for share in (0.0, 1.0))
    assert patient > 0.2 and patient > 2 * hurried
    assert {t.pattern for t in trajectories} == set(data.PATTERNS)
    assert any("guess" in t.texts[-1] for t in trajectories)          # guesses that were right by chance stay


@pytest.mark.parametrize("impatience", [(0.0, 0.1), (0.2, 0.1), (-1.0, 1.0)])
def test_an_impatience_that_is_no_range_is_refused(impatience):
    with pytest.raises(UserError, match="impatience: .* is no range above 0"):
        kept(1, impatience=impatience)


def test_each_search_draws_its_own_impatience_from_the_range():
    """One miss ends in a guess with the impatience itself: 100 % at (1, 1); from (0.01, 1), log-uniform, 21.5 %."""
    def hurried(impatience):
        return np.mean(["guess" in t.texts[1] for t in kept(150, impatience=impatience, patient_share=0.0)
                        if len(t.texts) > 1 and "yes, read" not in t.texts[1]])
    assert hurried((1.0, 1.0)) == 1.0 > hurried((0.01, 1.0)) > hurried((0.01, 0.01))


def test_cold_start_is_reproducible_and_its_shares_are_obeyed():
    assert [t.texts for t in kept(5)] == [t.texts for t in kept(5)] != [t.texts for t in kept(5, seed=1)]
    assert {t.pattern for t in kept(8, trial_share=0.0)} == {"depth_first"}
    assert not any("guess" in t.texts[-1] for t in kept(30, impatience=(1.0, 1.0), patient_share=1.0))


# ------------------------------------------------------------------------------------------------ collecting

def test_collect_plays_a_right_a_wrong_a_void_and_an_endless_policy():
    probes = [data.make_probe("sign", "easy", seed) for seed in range(4)]
    script = data.search_script(probes[0], random.Random(0), pattern="depth_first")
    look = '<grounding>{"bbox_2d": [0, 0, 0.5, 0.5], "source": "original_image"}</grounding>'
    lines = [iter(script), iter(["<answer>never</answer>"]), iter([look, "I give up"]), itertools.repeat(look)]
    said = {probe.question + str(i): line for i, (probe, line) in enumerate(zip(probes, lines))}
    order = list(said.values())
    seats: dict[int, object] = {}

    def speak(talks):
        for talk in talks:
            seats.setdefault(id(talk), order[len(seats)] if len(seats) < len(order) else None)
        return [next(seats[id(talk)], "") for talk in talks]

    right, wrong, void, endless = data.collect(probes, speak, max_turns=7)
    assert (right.texts, right.stop, right.reward) == (script, "answer", 1.0)
    assert (wrong.texts, wrong.stop, wrong.reward) == (["<answer>never</answer>"], "answer", 0.0)
    assert (void.texts, void.stop, void.reward) == ([look, "I give up"], "void", 0.0)
    assert (len(endless.texts), endless.stop, endless.reward) == (7, "over_turn", 0.0)
    assert [t.probe for t in (right, wrong, void, endless)] == probes
    assert (right.answer, wrong.answer, void.answer) == (probes[0].answer, "never", None)
    assert len(right.crops) == len(script) - 1 and len(endless.crops) == 6 and not endless.errors


def test_a_conversation_that_ended_makes_room_for_the_next_and_the_others_grow():
    probes = [data.make_probe("sign", "easy", seed) for seed in range(3)]
    look = '<grounding>{"bbox_2d": [0, 0, 0.5, 0.5], "source": "original_image"}</grounding>'
    seen, said = [], iter([["<answer>2</answer>", look], [look, "<answer>2</answer>"], [None]])

    def speak(talks):
        seen.append([[message["role"] for message in talk] for talk in talks])
        return next(said)

    ended = list(data.play(iter(probes), speak, slots=2))
    start, turn = ["system", "user"], ["assistant", "user"]
    assert seen == [[start, start], [start + turn, start], [start + 2 * turn]]
    assert [(number, t.probe, t.stop, len(t.texts)) for number, t in ended] == [
        (0, probes[0], "answer", 1), (2, probes[2], "answer", 1), (1, probes[1], "over_context", 2)]


def test_collect_grades_options_and_refuses_a_missing_text():
    probe = Probe(Image.new("RGB", (60, 60)), "Which?", "B", {"A": "red", "B": "blue"})
    assert data.collect([probe], lambda _: ["<answer>(b) blue</answer>"])[0].reward == 1.0
    with pytest.raises(ValueError, match="0 texts for 1 conversations"):
        data.collect([probe], lambda _: [])


# ------------------------------------------------------------------------------------------------ files

def test_saved_probes_come_back_as_they_were(tmp_path):
    probes = [data.make_probe(kind, "medium", 5) for kind in PROBE_KINDS]
    options = {"A": "x", "B": "y", "C": "z"}
    probes.append(Probe(load_image(PHOTO), "Who\u2028is \u201cshe\u201d?", ["A", "C"], options))
    save_probes(iter(probes), tmp_path / "set")
    for path in (tmp_path / "set", str(tmp_path / "set" / "probes.jsonl")):
        loaded = load_probes(path)
        assert len(loaded) == len(probes)
        for before, after in zip(probes, loaded):
            for name in data.SAVED:
                assert getattr(after, name) == getattr(before, name)
            assert isinstance(after.image, str)                       # opened when it is needed
            assert after.open().tobytes() == before.open().tobytes()
    for before, after in zip(probes[:4], loaded):
        for pattern in data.PATTERNS:
            texts = [data.search_script(p, random.Random(1), pattern=pattern, slip=0.1) for p in (before, after)]
            assert texts[0] == texts[1]
    assert sorted(p.name for p in (tmp_path / "set").rglob("*") if p.is_file()) == sorted(
        ["probes.jsonl", *(f"{i:05d}.png" for i in range(5))])        # no temporary file left


def test_saving_refuses_a_directory_that_holds_something(tmp_path):
    probe = Probe(Image.new("RGB", (8, 8)), "?", "1")
    save_probes([probe], tmp_path / "new")
    with pytest.raises(UserError, match="new is not empty"):
        save_probes([probe], tmp_path / "new")
    with pytest.raises(UserError, match="cannot write .*probes.jsonl"):
        save_probes([probe], tmp_path / "new" / "probes.jsonl")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    data.write_atomic(tmp_path / "a", b"old")
    with pytest.raises(TypeError):
        data.write_atomic(tmp_path / "a", "no bytes")
    assert (tmp_path / "a").read_bytes() == b"old"


def write_rows(folder, rows, name="probes.jsonl"):
    """A set of our own, in a folder with one image a.png; rows that are text are written as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20), "red").save(folder / "a.png")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return folder / name


GOOD = {"image": "a.png", "question": "What color?", "answer": "red"}


def test_a_row_by_hand_needs_three_fields_only(tmp_path):
    other = {**GOOD, "question": "<image>\nWho?", "category": "x", "meta": {"k": [1]}}
    file = write_rows(tmp_path, [GOOD, "", other, "  "])
    first, second = load_probes(file)
    assert (first.question, first.answer) == ("What color?", "red")
    assert (first.options, first.boxes, first.meta) == (None, [], {})
    assert (second.question, second.meta) == ("Who?", {"category": "x", "k": (1,)})
    assert [len(load_probes(file, limit=n)) for n in (1, 2, 9)] == [1, 2, 2]
    (tmp_path / "probes.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    assert load_probes(file)[0].question == "What color?"             # as Windows saves it


def visual_probe(parent, folder="VisualProbe_Hard", rows=3, name="val.json"):
    """A set in the published format, with pictures of our own."""
    (parent / folder / "data").mkdir(parents=True)
    listed = []
    for i in range(rows):
        stem = f"visual_probe_hard_{i}"
        Image.new("RGB", (400 + i, 300), (40 * i, 90, 90)).save(parent / folder / "data" / f"{stem}.jpg")
        listed.append({"images": [f"VisualProbe_Hard/data/{stem}.jpg"], "doc_id": stem,
                       "problem": "<image>\nWhat\u2019s the color of the man\u2019s cap?", "solution": " White.",
                       "data_source": "visual_probe_hard"})
    (parent / folder / name).write_text(json.dumps(listed), encoding="utf-8")
    return parent / folder


@pytest.mark.parametrize("folder, name", [("VisualProbe_Hard", "val.json"), ("VisualProbe_Hard", "train.json"),
                                          ("5f3a9c0e", "val.json")])
def test_visual_probe_sets_load_wherever_they_lie(tmp_path, folder, name):
    directory = visual_probe(tmp_path, folder, name=name)
    for path in (directory, directory / name):
        probes = load_probes(path)
        assert [p.open().size for p in probes] == [(400, 300), (401, 300), (402, 300)]
        for i, probe in enumerate(probes):
            assert probe.question == "What\u2019s the color of the man\u2019s cap?"
            assert (probe.answer, grade("white", probe.answer)) == (" White.", 1.0)
            assert (probe.source, probe.difficulty) == ("visual_probe_hard", "hard")
            assert probe.meta == {"doc_id": f"visual_probe_hard_{i}"} and probe.options is None
    assert len(load_probes(directory, limit=2)) == 2


BAD_ROWS = [
    ("{'image': 1}", "not JSON"), ('{"image": "a.png"', "not JSON.*cut short"), ("[" * 100_000, "not JSON"),
    ("[1]", "should be an object"), ("null", "should be an object"),
    ({"image": "a.png", "question": "?"}, '"answer" is missing, the row has image, question'),
    ({"question": "?", "answer": "1"}, '"image" is missing'), ({}, '"question" is missing, the row has no keys'),
    ({**GOOD, "answer": 8}, '"answer" should be text or a list, not 8'),
    ({**GOOD, "answer": []}, "should be text"), ({**GOOD, "answer": ["a", 2]}, "should be text"),
    ({**GOOD, "answer": " "}, "no prediction can match"), ({**GOOD, "answer": "x" * 2000}, "no prediction can match"),
    ({**GOOD, "question": " <image> "}, "question is empty"),
    ({**GOOD, "question": None}, '"question" should be text'),
    ({**GOOD, "options": ["red"]}, '"options" should be an object or null'),
    ({**GOOD, "options": {"A": 1}, "answer": "A"}, "should be text"),
    ({**GOOD, "options": {"A": "red", "B": "blue"}, "answer": "C"}, "not one of the options"),
    ({**GOOD, "boxes": [[0, 0, 1]]}, "a box should be"), ({**GOOD, "boxes": [[0.5, 0, 0.5, 1]]}, "a box should be"),
    ({**GOOD, "boxes": [[0, 0, 200, 100]]}, "a box should be"),
    ({**GOOD, "boxes": [["0", 0, 1, 1]]}, "a box should be"), ({**GOOD, "boxes": [0, 0, 1, 1]}, "a box should be"),
    ({**GOOD, "boxes": [[[0], 0, 1, 1]]}, "a box should be"), ('{"image": NaN}', '"question" is missing'),
    ({**GOOD, "meta": []}, '"meta" should be an object'), ({**GOOD, "source": 3}, '"source" should be text'),
    ({**GOOD, "image": "b.png"}, "b.png is missing; is the set complete"), ({**GOOD, "image": ""}, "is missing"),
    ({**GOOD, "image": None}, '"image" should be text'), ({**GOOD, "image": "a\0.png"}, "is missing"),
]


@pytest.mark.survives("files", "rows with wrong types, missing keys, broken JSON, missing images",
                      "one line with the file and the row; no row is left out")
@pytest.mark.parametrize("row, message", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_errors_name_the_file_and_the_row(tmp_path, row, message):
    file = write_rows(tmp_path, [GOOD, "", row, GOOD])
    with pytest.raises(UserError, match=message) as caught:
        load_probes(file)
    assert str(caught.value).startswith(f"{file}, row 3: ") and len(str(caught.value)) < len(str(file)) * 2 + 250
    assert "\n" not in str(caught.value)
    assert len(load_probes(file, limit=1)) == 1                       # a row that is not asked for is not read


@pytest.mark.parametrize("change, message", [
    ({"images": []}, '"images" should be a list of one path'), ({"images": ["a", "b"]}, "list of one path"),
    ({"images": "a.jpg"}, '"images" should be a list, not'), ({"images": [3]}, "list of one path"),
    ({"images": ["VisualProbe_Hard/data/none.jpg"]}, "VisualProbe_Hard/data/none.jpg is missing"),
    ({"solution": 8}, '"solution" should be text, not 8'), ({"problem": "<image>\n"}, "question is empty"),
    ({"data_source": None}, '"data_source" should be text'),
    *[({key: ...}, f'"{key}" is missing, the row has ') for key in ("images", "problem", "solution", "data_source")],
])
def test_errors_name_the_row_of_a_visual_probe_set_too(tmp_path, change, message):
    directory = visual_probe(tmp_path)
    rows = json.loads((directory / "val.json").read_text())
    rows[1] = {key: value for key, value in {**rows[1], **change}.items() if value is not ...}
    (directory / "val.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=message) as caught:
        load_probes(directory)
    assert str(caught.value).startswith(f"{directory / 'val.json'}, row 2: ")


@pytest.mark.parametrize("escape", ["{root}/secret.png", "../secret.png", "sub/../../secret.png", "../{set}/a.png"])
def test_an_image_outside_the_set_is_refused(tmp_path, escape):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    name = escape.format(root=tmp_path, set="own")
    file = write_rows(tmp_path / "own", [{**GOOD, "image": name}])
    (tmp_path / "own" / "sub").mkdir()
    with pytest.raises(UserError, match="row 1: the image .* is not under"):
        load_probes(file)
    published = visual_probe(tmp_path / "deep")
    for name in (name, f"VisualProbe_Hard/../../{name}"):
        row = {"images": [name], "problem": "?", "solution": "1", "data_source": "x"}
        (published / "val.json").write_text(json.dumps([row]))
        with pytest.raises(UserError, match="row 1: the image .* is not under"):
            load_probes(published)


def test_a_wrong_path_says_what_to_do(tmp_path):
    for path, message in ((tmp_path / "none", "no such file or folder.*python data.py --out"),
                          (tmp_path, "holds no set of probes: give the path of one probes.jsonl")):
        with pytest.raises(UserError, match=message):
            load_probes(path)
    for name, content, message in (("a.txt", "x", "cannot read this kind of file, only .jsonl, .json"),
                                   ("b.jsonl", "\n \n", "holds no rows"), ("c.json", "[]", "holds no rows"),
                                   ("d.json", "{}", "should be a list of rows"), ("e.json", "[{", "not JSON"),
                                   ("f.json", "", "not JSON")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            load_probes(tmp_path / name)
        assert name in str(caught.value)
    (tmp_path / "g.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="g.jsonl: cannot be read as UTF-8"):
        load_probes(tmp_path / "g.jsonl")
    with pytest.raises(UserError, match="limit=0"):
        load_probes(write_rows(tmp_path / "own", [GOOD]), limit=0)
    write_rows(tmp_path / "own", ["[]"], name="val.json")
    with pytest.raises(UserError, match="holds probes.jsonl and val.json: give the path of one"):
        load_probes(tmp_path / "own")


# ------------------------------------------------------------------------------------------------ published sets

def encoded(width: int, height: int, color="red") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_table(file: Path, header: list[str], rows: list[list]) -> Path:
    with open(file, "w", newline="", encoding="utf-8") as f:
        csv.writer(f, delimiter="\t").writerows([header, *rows])
    return file


HR_COLUMNS = ["index", "question", "answer", "category", "A", "B", "C", "D", "cycle_category", "image"]


def hr_bench(folder: Path, questions: int = 2) -> Path:
    """Each question in the four cyclic orders of its options; "red" is right, and moves from A to D, C, B."""
    rows = []
    for i in range(questions):
        for k in range(4):
            options = ["red", "blue", "green", "grey"]
            rows.append([4 * i + k, 'Which "color"\nis it?', "ADCB"[k], ("single", "cross")[i % 2], *options[k:], *options[:k],
                         k, encoded(60 + i, 40)])
    return write_table(folder / "hr_bench_4k.tsv", HR_COLUMNS, rows)


def test_hr_bench_has_four_orders_of_each_question_and_its_images_stay_in_the_file(tmp_path):
    file = hr_bench(tmp_path)
    for path in (tmp_path, file):
        probes = load_probes(path)
        assert [p.answer for p in probes] == list("ADCB" * 2) and {p.options[p.answer] for p in probes} == {"red"}
        assert [p.open().size for p in reversed(probes)] == [(61, 40)] * 4 + [(60, 40)] * 4     # in any order
        assert [p.meta["category"] for p in probes] == ["single"] * 4 + ["cross"] * 4
        assert [p.meta["cycle_category"] for p in probes] == list("0123" * 2)
        groups = [p.meta["cycle_of"] for p in probes]
        assert len(set(groups)) == 2 and groups == sorted(groups, key=groups.index)
        assert all(isinstance(p.image, data.Embedded) and p.source == "hr_bench" for p in probes)
        assert probes[1].prompt() == 'Which "color"\nis it?\nA. blue\nB. green\nC. grey\nD. red'
    with open(file, "ab") as f:
        f.write(b"9\tcut")
    assert len(load_probes(file, limit=8)) == 8                       # streamed: what comes after is not read


def test_a_field_of_megabytes_is_read(tmp_path):
    noise = Image.effect_noise((1500, 1500), 90)
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    row = [0, "?", "A", "c", "1", "2", "", "", 0, base64.b64encode(buffer.getvalue()).decode()]
    assert len(row[-1]) > 20 * 131_072                                # csv stops at 131,072 by itself
    probe, = load_probes(write_table(tmp_path / "a.tsv", HR_COLUMNS, [row]))
    assert probe.open().size == (1500, 1500) and probe.options == {"A": "1", "B": "2"}


def test_mme_realworld_loads_from_a_table_and_from_json(tmp_path):
    options = ["(A) The red one", "(B) 5", "(C) (A) or (B)", "(E) The image does not feature it."]
    columns = ["index", "image", "question", "multi-choice options", "answer", "category", "l2-category"]
    file = write_table(tmp_path / "lite.tsv", columns, [
        [7, encoded(50, 30), "Q?", repr(options), "E", "Reasoning", "count"], [8, "7", "R?", json.dumps(options), "A", "x", "y"]])
    first, second = load_probes(file)
    assert first.options == {"A": "The red one", "B": "5", "C": "(A) or (B)", "E": "The image does not feature it."}
    assert (first.answer, first.source, first.meta["category"]) == ("E", "mme_realworld", "Reasoning")
    assert second.open().size == first.open().size == (50, 30)        # a short field is the index of the row with the image
    (tmp_path / "set" / "sub").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "set/sub/a.png")
    row = {"Question_id": "m/1", "Image": "sub/a.png", "Text": "Q?", "Question Type": "Multiple Choice", "Answer choices": options,
           "Ground truth": "B", "Category": "color", "Subtask": "Monitoring", "Task": "Perception"}
    (tmp_path / "set/mme.json").write_text(json.dumps([row]))
    probe, = load_probes(tmp_path / "set/mme.json")
    assert (probe.question, probe.answer, probe.options["B"], probe.open().size) == ("Q?", "B", "5", (9, 9))
    assert probe.meta == {"Question_id": "m/1", "Question Type": "Multiple Choice", "Subtask": "Monitoring", "Task": "Perception",
                          "category": "color"}


def test_rows_that_name_the_row_of_their_image_belong_to_the_same_question(tmp_path):
    """VLMEvalKit: the image once, its index in the other rows."""
    rows = [[i, "Which?", "A", "single", "red", "blue", "", "", i % 4, encoded(60, 40) if i % 4 == 0 else str(i - i % 4)]
            for i in range(8)]
    probes = load_probes(write_table(tmp_path / "hr_bench_4k.tsv", HR_COLUMNS, rows))
    assert len({p.meta["cycle_of"] for p in probes}) == 1 and {p.open().size for p in probes} == {(60, 40)}   # one picture
    rows[4][-1] = encoded(61, 40)
    probes = load_probes(write_table(tmp_path / "hr_bench_4k.tsv", HR_COLUMNS, rows))
    groups = [p.meta["cycle_of"] for p in probes]
    assert len(set(groups[:4])) == len(set(groups[4:])) == 1 and groups[0] != groups[4]


def test_options_that_are_not_recognised_are_an_error_and_not_an_open_question(tmp_path):
    folder = vstar(tmp_path / "V", 1)
    row = json.loads((folder / "test_questions.jsonl").read_text())
    (folder / "test_questions.jsonl").write_text(json.dumps({**row, "text": "What is it?\nA. rubber\nB. cotton"}))
    with pytest.raises(UserError, match="row 1: no options"):
        load_probes(folder / "test_questions.jsonl")


@pytest.mark.parametrize("change, message", [({"image": "x" * 300}, "too long"), ({"question": "q \ud800"}, "surrogate")])
def test_names_and_texts_that_no_system_takes_are_named_by_row(tmp_path, change, message):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "q?", "answer": "red", **change}
    (tmp_path / "probes.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=f"row 1: .*{message}"):
        load_probes(tmp_path)


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*file"):
        data.lock(tmp_path / "file")


def vstar(folder: Path, count: int = 12) -> Path:
    for kind, options in (("direct_attributes", ["red", "blue", "white", "black"]), ("relative_position", ["left", "right"])):
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (200, 100)).save(folder / kind / f"sa_{i}.jpg")
            (folder / kind / f"sa_{i}.json").write_text(json.dumps(
                {"target_object": ["cap"], "bbox": [[20, 10, 40, 20], [180, 90, 30, 10]], "question": "What?", "options": options}))
    rows = [{"image": "direct_attributes/sa_0.jpg", "category": "direct_attributes", "label": "B", "question_id": 3,
             "text": "What is it?\n(A) rubber\n(B) cotton\nAnswer with the option's letter from the given choices directly."}]
    (folder / "test_questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_vstar_folders_shuffle_the_options_by_id_and_keep_the_boxes(tmp_path):
    probes = load_probes(vstar(tmp_path / "V", 30))
    assert [p.meta["category"] for p in probes] == ["direct_attributes"] * 30 + ["relative_position"] * 30
    assert {p.options[p.answer] for p in probes} == {"red", "left"}   # listed first in the file
    letters = Counter(p.answer for p in probes)
    assert set(letters) == {"A", "B", "C", "D"} and max(letters.values()) < 40          # A is not always right
    assert [p.options for p in load_probes(tmp_path / "V")] == [p.options for p in probes]
    assert [p.options for p in load_probes(tmp_path / "V/direct_attributes")] == [p.options for p in probes[:30]]
    assert probes[0].boxes == [(0.1, 0.1, 0.3, 0.3), (0.9, 0.9, 1, 1.0)]                # pixels to shares, clamped
    probe, = load_probes(tmp_path / "V/test_questions.jsonl")
    assert (probe.question, probe.options, probe.answer) == ("What is it?", {"A": "rubber", "B": "cotton"}, "B")


def cold_start_row(texts: list[str], replies: list[str], question="<image>\nWhat color?", **more) -> dict:
    said = [{"from": "system", "value": "Search."}, {"from": "human", "value": question}]
    for text, reply in itertools.zip_longest(texts, replies):
        said += [{"from": "gpt", "value": text}] + ([{"from": "human", "value": reply}] if reply else [])
    return {"images": [encoded_bytes(40, 30), encoded_bytes(20, 15)], "image_names": ["../../etc/passwd", "/tmp/x.png"],
            "conversations": repr(said), "data_source": "visual_probe_train", "sample_index": 5, "rollout_index": 1, **more}


def encoded_bytes(width: int, height: int) -> bytes:
    return base64.b64decode(encoded(width, height))


CALL = '<think>Look.</think><grounding>{"bbox_2d": [0, 0, 0.5, 0.5], "source": "original_image"}</grounding>'
RED = "<think>Red.</think><answer>Red</answer>"


def write_parquet(file: Path, rows: list[dict]) -> Path:
    pyarrow = data.pyarrow()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=1)
    return file


@pytest.mark.parametrize("wrap", [lambda image: image, lambda image: {"bytes": image, "path": "../a.png"}])
def test_the_released_cold_start_is_read_as_searches(tmp_path, wrap):
    rows = [cold_start_row([CALL, RED], ["Observation 1:\n<image>.\n"]), cold_start_row([CALL, CALL], ["<image>"])]
    rows = [{**row, "images": [wrap(image) for image in row["images"]]} for row in rows]
    (tmp_path / "data").mkdir()
    for number, row in enumerate(rows):                               # two parts of one set
        write_parquet(tmp_path / f"data/train-0000{number}-of-00002.parquet", [row])
    finished, unfinished = data.load_trajectories(tmp_path)
    assert (finished.texts, finished.answer, finished.stop, finished.reward) == ([CALL, RED], "Red", "answer", 1.0)
    assert (finished.probe.question, finished.probe.source) == ("What color?", "visual_probe_train")
    assert finished.probe.open().size == (40, 30) and finished.probe.meta == {"images": 2, "sample_index": 5, "rollout_index": 1}
    assert (unfinished.answer, unfinished.stop, unfinished.reward) == (None, "over_turn", 0.0)
    with pytest.raises(UserError, match="00001-of-00002.parquet, row 1: no prediction can match"):
        load_probes(tmp_path)                                         # as a question it has no answer
    assert not list(tmp_path.glob("**/passwd"))


BAD_CONVERSATIONS = [
    ("__import__('os').system('touch hacked')", "not a list: .*ValueError"), ("[1, 2", "not a list: .*SyntaxError"),
    ("(" * 5000, "not a list"), ("[]", "take turns"), ("[1]", "should be a list of"), ("{'from': 'gpt'}", "should be a list of"),
    ("[{'from': 'human', 'value': 3}]", "should be a list of"), ("[{'from': 'gpt', 'value': 'x'}]", "take turns"),
    (repr([{"from": "human", "value": "?"}]), "take turns"),
    (repr([{"from": "human", "value": "<image>"}, {"from": "gpt", "value": RED}]), "question is empty"),
]


@pytest.mark.survives("files", "a cold-start row whose text is code, or no conversation, or which names files elsewhere",
                      "never run; one line with the row; names in a set are not used as paths")
@pytest.mark.parametrize("text, message", BAD_CONVERSATIONS, ids=range(len(BAD_CONVERSATIONS)))
def test_a_hostile_conversation_is_refused_and_never_run(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    file = write_parquet(tmp_path / "a.parquet", [cold_start_row([RED], []), cold_start_row([RED], [], conversations=text)])
    with pytest.raises(UserError, match=message) as caught:
        data.load_trajectories(file)
    assert str(caught.value).startswith(f"{file}, row 2: ") and not (tmp_path / "hacked").exists()


def test_parquet_without_pyarrow_says_how_to_install_it(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "a.parquet", [cold_start_row([RED], [])])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        load_probes(file)


def test_a_broken_parquet_file_and_a_row_without_an_image_are_one_line(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [cold_start_row([RED], [], images=[])])
    with pytest.raises(ImageError, match="a.parquet, row 1: the row has no image"):
        data.load_trajectories(file)[0].probe.open()
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(UserError, match="a.parquet, row 1: cannot be read"):
        load_probes(file)
    with pytest.raises(UserError, match="row 1 holds a question and no search"):
        data.load_trajectories(write_rows(tmp_path, [GOOD]))


BAD_TABLES = [
    ({"answer": "F"}, "not one of the options"), ({"question": " "}, "question is empty"), ({"image": ""}, "the image is missing"),
    ({"image": "99"}, "the image is missing"), ({"A": "", "B": "", "C": "", "D": ""}, "no options"),
]


@pytest.mark.parametrize("change, message", BAD_TABLES, ids=range(len(BAD_TABLES)))
def test_errors_name_the_row_of_a_table(tmp_path, change, message):
    good = dict(zip(HR_COLUMNS, [0, "?", "A", "c", "1", "2", "3", "4", 0, encoded(9, 9)]))
    file = write_table(tmp_path / "a.tsv", HR_COLUMNS, [list(good.values()), list((good | change).values())])
    with pytest.raises(UserError, match=message) as caught:
        load_probes(file)
    assert str(caught.value).startswith(f"{file}, row 2: ")


@pytest.mark.survives("files", "a table with columns missing, a broken row, or an image that is none",
                      "one line with the file and the row; no row is left out")
def test_broken_tables_are_one_line(tmp_path):
    image = encoded(9, 9)
    for content, message in ((f"question\tanswer\timage\n?\tA\n", "row 1: has 2 columns, the header has 3"),
                             (f'question\tanswer\timage\n?\tA\t"{image}\n', "row 1: cannot be read .*unexpected end"),
                             (f"question\tA\timage\n?\tred\t{image}\n", 'row 1: "answer" is missing'),
                             ("question\tanswer\timage\n", "holds no rows"), ("", "holds no rows")):
        (tmp_path / "a.tsv").write_text(content)
        with pytest.raises(UserError, match=message):
            load_probes(tmp_path / "a.tsv")
    (tmp_path / "a.tsv").write_bytes(b"question\tanswer\timage\n\xff\tA\tx\n")
    with pytest.raises(UserError, match="row 1: cannot be read"):
        load_probes(tmp_path / "a.tsv")
    for image in (image[:100], "x" * 100, "!" * 100):
        (tmp_path / "a.tsv").write_text(f"question\tanswer\timage\n?\tA\t{image}\n")
        probe, = load_probes(tmp_path / "a.tsv")
        with pytest.raises(ImageError, match="a.tsv, row 1: "):
            probe.open()


def test_a_question_of_vstar_without_its_picture_is_no_gap_but_an_error(tmp_path):
    folder = vstar(tmp_path / "V", 2)
    (folder / "relative_position/sa_1.jpg").unlink()
    with pytest.raises(UserError, match="relative_position/sa_1.json, row 1: the image .*sa_1.jpg is missing"):
        load_probes(folder)
    Image.new("RGB", (8, 8)).save(folder / "relative_position/sa_1.jpg")
    row = json.loads((folder / "relative_position/sa_1.json").read_text())
    for change, message in (({"options": []}, "not one of the options|should be text|no prediction"), ({"bbox": [[1, 2]]}, "x, y, width"),
                            ({"bbox": ...}, '"bbox" is missing'), ({"question": ...}, '"question" is missing')):
        changed = {key: value for key, value in {**row, **change}.items() if value is not ...}
        (folder / "relative_position/sa_1.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=f"sa_1.json, row 1: .*({message})"):
            load_probes(folder)


@pytest.mark.parametrize("make, lines", [
    (hr_bench, ["8 rows", "categories    single 4, cross 4", "options       4 8", "image sizes   60 x 40 4, 61 x 40 4"]),
    (lambda path: vstar(path / "V"), ["24 rows", "options       4 12, 2 12", "target sizes  14 to 28 pixels, median 28 (48 boxes"]),
    (lambda path: write_parquet(path / "a.parquet", [cold_start_row([CALL, RED], ["<image>"]), cold_start_row([CALL], [])]),
     ["2 rows", "turns         2 1, 1 1", "no answer     1 rows, in their last turn"])])
def test_the_check_prints_what_was_recognised(tmp_path, monkeypatch, capsys, make, lines):
    run(monkeypatch, "--check", make(tmp_path))
    said = capsys.readouterr().out
    for line in lines:
        assert line in said, said


# ------------------------------------------------------------------------------------------------ a policy elsewhere

def talk(text="Hi", image=None) -> list[dict]:
    parts = [{"type": "image", "image": image}] if image else []
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_an_endpoint_gets_text_images_options_and_the_key(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = serve(lambda body: "hello")
    picture = Image.new("RGB", (33, 22), (200, 30, 30))
    assert data.Endpoint(f"{server.url}/", "m")(talk(image=picture), temperature=0.5) == "hello"
    body, (path, headers) = server.bodies[0], server.headers[0]
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", "Bearer sk-secret")
    assert (body["model"], body["temperature"]) == ("m", 0.5)
    image, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "Hi"}
    head, content = image["image_url"]["url"].split(",")
    sent = Image.open(io.BytesIO(base64.b64decode(content)))
    assert head == "data:image/jpeg;base64" and sent.size == (33, 22)
    assert all(abs(a - b) < 6 for a, b in zip(sent.getpixel((9, 9)), (200, 30, 30)))
    monkeypatch.delenv("OPENAI_API_KEY")
    data.Endpoint(server.url, "m")(talk())
    assert "Authorization" not in server.headers[1][1]


def test_a_server_that_stumbles_is_asked_again_with_growing_pauses(serve, monkeypatch):
    replies = iter([(503, {}), (429, {}), (200, b"<html>"), (200, {"choices": []}), "at last"])
    server, pauses = serve(lambda body: next(replies)), []
    monkeypatch.setattr(data.time, "sleep", pauses.append)
    assert data.Endpoint(server.url, "m", backoff=0.5)(talk()) == "at last"
    assert pauses == [0, 0.5, 1.0, 2.0, 4.0] and len(server.bodies) == 5


@pytest.mark.survives("faults", "a server that is away, slow, broken, or refuses the key",
                      "bounded attempts, then one line; the key is never in it")
@pytest.mark.parametrize("reply, attempts, message", [
    ((500, {"error": "boom"}), 3, "HTTP 500, .*boom"), ((401, {"error": "bad key sk-secret"}), 1, "HTTP 401, .*bad key \\*\\*\\*"),
    ((404, {"error": "no model m"}), 1, "HTTP 404"), ((302, {}), 1, "HTTP 302"), ((200, b"\xff"), 3, "Decode|JSON"),
    ((200, {"choices": [{"message": {"content": None}}]}), 3, "no text"), ((200, []), 3, "TypeError"),
    ((400, {"error": "too long"}), 1, "HTTP 400, .*too long")])
def test_attempts_are_bounded_and_the_key_is_not_shown(serve, monkeypatch, reply, attempts, message):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = serve(lambda body: reply)
    with pytest.raises(UserError, match=message) as caught:
        data.Endpoint(server.url, "m", retries=3)(talk())
    assert len(server.bodies) == attempts and "sk-secret" not in str(caught.value) and server.url in str(caught.value)


@pytest.mark.parametrize("key", ["sk-first\nsk-second", "sk-\u00e9"])
def test_a_key_that_is_no_line_of_ascii_is_refused_and_not_shown(serve, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server = serve(lambda body: "x")
    with pytest.raises(UserError, match="one line of ASCII") as caught:
        data.Endpoint(server.url, "m")(talk())
    assert "sk-" not in str(caught.value) and not server.bodies


def test_a_long_key_is_masked_before_the_message_is_cut(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-" + "abc" * 60)
    server = serve(lambda body: (401, {"error": "Incorrect API key provided: sk-" + "abc" * 60}))
    with pytest.raises(UserError, match="provided: \\*\\*\\*") as caught:
        data.Endpoint(server.url, "m")(talk())
    assert "sk-" not in str(caught.value)


def test_a_reply_that_was_cut_before_its_text_is_void_and_half_a_character_is_replaced(serve):
    cut = {"choices": [{"message": {"content": None}, "finish_reason": "length"}]}
    assert data.Endpoint(serve(lambda body: (200, cut)).url, "m")(talk()) == ""
    assert data.Endpoint(serve(lambda body: "a\ud83db").url, "m")(talk()) == "a?b"


def test_one_refused_conversation_is_over_and_a_server_that_refuses_all_is_an_error(serve):
    server = serve(lambda body: (400, {"error": "no"}) if "bad" in json.dumps(body) else "hm")
    speak = data.speaker(data.Endpoint(server.url, "m"))
    with pytest.raises(data.Refusal):
        speak([talk("bad")])
    assert speak([talk("good")]) == ["hm"] and speak([talk("bad"), talk("good")]) == [None, "hm"]


def test_a_server_that_is_not_there_and_urls_that_are_none(serve):
    url = serve(lambda body: "x").url
    slow = serve(lambda body: threading.Event().wait(0.4) or "late")
    with pytest.raises(UserError, match="timed out|TimeoutError"):
        data.Endpoint(slow.url, "m", timeout=0.05, retries=2)(talk())
    with pytest.raises(UserError, match="URLError.*refused"):
        data.Endpoint(url.replace(url.split(":")[2], "9/v1"), "m", retries=2)(talk())
    for url in ("http://[::1/v1", "file:///etc/passwd", "localhost:8000/v1", "http://user:pass@host/v1", "ftp://host", "", "exakt"):
        with pytest.raises(UserError, match="a server is given as http"):
            data.Endpoint(url, "m")


def test_messages_end_with_their_action_and_a_cut_one_is_void(serve):
    cut = {"choices": [{"message": {"content": CALL}, "finish_reason": "length"}]}
    said = {"a": CALL.removesuffix("</grounding>"), "b": "<think>1 < 2</think><answer>red", "c": CALL, "d": (200, cut)}
    server = serve(lambda body: said[body["messages"][0]["content"][0]["text"]])
    speak = data.speaker(data.Endpoint(server.url, "m"), max_tokens=9)
    assert speak([talk(name) for name in "abcd"]) == [CALL, "<think>1 < 2</think><answer>red</answer>", CALL, ""]
    assert server.bodies[0]["stop"] == ["</grounding>", "</answer>"] and server.bodies[0]["max_tokens"] == 9


def test_a_conversation_that_grew_too_long_ends_over_context_but_a_first_refusal_is_an_error(serve):
    server = serve(lambda body: (400, {"error": "too long"}) if len(body["messages"]) > 2 else CALL)
    speak = data.speaker(data.Endpoint(server.url, "m"))
    probe = Probe(Image.new("RGB", (60, 60)), "?", "red")
    assert [(t.stop, len(t.texts), len(t.crops)) for t in data.collect([probe], speak)] == [("over_context", 1, 1)]
    blind = data.speaker(data.Endpoint(serve(lambda body: (400, {"error": "no images here"})).url, "m"))
    with pytest.raises(UserError, match="no images here"):
        data.collect([probe], blind)


# ------------------------------------------------------------------------------------------------ cold start in context

def written_searches() -> dict[str, list[str]]:
    """The exemplars: name -> the assistant messages."""
    parts = data.EXEMPLARS.read_text(encoding="utf-8").split("\n## ")[1:]
    return {part.split("\n")[0]: [line.removeprefix("Assistant: ") for line in part.split("\n") if line.startswith("Assistant: ")]
            for part in parts}


def test_the_six_exemplars_are_searches_that_the_world_accepts_and_show_what_they_are_named_for():
    searches = written_searches()
    assert [name.casefold() for name in searches] == ["depth-first search", "trial and error", "goal maintenance", "self-reflection",
                                                      "zooming out after a dead end", "a crop of a crop"]
    signs = ("depth first", "trial and error", "goal maintenance", "self-reflection", "zooming out", "crop of a crop")
    text = data.EXEMPLARS.read_text(encoding="utf-8")
    for name, (search, sign) in zip(searches, zip(searches.values(), signs)):
        question = re.search(r"\] (.*)", text.split(f"## {name}")[1])[1]
        probe = Probe(Image.new("RGB", (1000, 1000)), question, data.final_answer(search))
        script = list(search)
        played, = data.collect([probe], lambda _: [script.pop(0)], max_turns=9)
        assert (played.stop, played.reward, played.errors, len(played.crops)) == ("answer", 1.0, [], len(search) - 1)
        if sign != "depth first":                                     # that one goes through stacks, and into one of them
            assert sign in data.patterns(played), (name, data.patterns(played))
    prompt = data.few_shot_prompt()
    assert prompt.startswith(data.SYSTEM_PROMPT) and prompt.count("\n## ") == 6 and "data.py" not in prompt


def test_an_exemplar_file_of_the_user_has_to_hold_searches(tmp_path):
    (tmp_path / "mine.md").write_text("# Mine\n\n## One\nUser: ?\n")
    assert data.few_shot_prompt(tmp_path / "mine.md").endswith("\n\n## One\nUser: ?\n")
    (tmp_path / "none.md").write_text("nothing")
    with pytest.raises(UserError, match="none.md: holds no search"):
        data.few_shot_prompt(tmp_path / "none.md")


def crops_of(*looks) -> data.Trajectory:
    boxes = {"l": (0, 0, 0.5, 1), "r": (0.5, 0, 1, 1), "m": (0.25, 0, 0.75, 1)}
    return data.Trajectory(Probe("", "Where is it?", "x"), ["y"] * len(looks), "answer", 1.0,
                           crops=[Crop(boxes[name], int(source)) for name, source in looks])


@pytest.mark.parametrize("looks, names", [
    ([], []), (["l0"], []), (["l0", "r0"], ["trial and error"]), (["l0", "m0"], []), (["l0", "l1"], ["crop of a crop"]),
    (["l0", "l1", "l2"], ["depth first", "crop of a crop"]), (["l0", "l1", "m0"], ["zooming out", "crop of a crop"]),
    (["l0", "r0", "l2"], ["trial and error", "crop of a crop"])])
def test_patterns_by_hand(looks, names):
    assert data.patterns(crops_of(*looks)) == names


def test_patterns_of_thoughts_by_hand():
    search = data.Trajectory(Probe("", "What color is the umbrella?", "x"), ["Wait, no.", "the color of that umbrella", "umbrella color"],
                             "answer", 1.0)
    assert data.patterns(search) == ["goal maintenance", "self-reflection"]
    search.texts[2] = "it"
    assert data.patterns(search) == ["self-reflection"]


def pictures(folder: Path, count: int) -> Path:
    """`count` questions on pictures of growing width; the answer to number i is i."""
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (300 + i, 200), (20 * i, 90, 90)).save(folder / f"{i}.png")
    rows = [{"image": f"{i}.png", "question": f"Number {i}?", "answer": str(i), "source": "mine", "meta": {"n": [1]}} for i in range(count)]
    (folder / "probes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def scripted(body: dict) -> str:
    """Looks twice, then answers: rightly on even questions, wrongly on 1, on 3 without an action, on 5 it never ends."""
    number, turn = int(re.search(r"Number (\d+)", json.dumps(body))[1]), len(body["messages"]) // 2
    if turn < 3 or number == 5:
        call = {"bbox_2d": [0, 0, 0.5, 0.5], "source": "original_image" if turn == 1 else "observation_1"}
        return f"<think>Not here yet, turn {turn}.</think><grounding>{json.dumps(call)}"
    return "I give up" if number == 3 else f"<think>Seen.</think><answer>{number + number % 2}"


def collect_again(monkeypatch, folder, url, out, **more):
    flags = {"collect": folder, "endpoint": url, "model": "m", "out": out, "max_turns": 5, "slots": 3, **more}
    run(monkeypatch, *(word for name, value in flags.items() for word in (f"--{name}", value)))


def test_the_collector_keeps_what_ends_right_and_counts_the_rest(serve, tmp_path, monkeypatch, capsys):
    server = serve(scripted)
    collect_again(monkeypatch, pictures(tmp_path / "set", 7), server.url, tmp_path / "out")
    said = capsys.readouterr().out
    assert "acceptance    0.571" in said and "kept: 4, wrong: 1, void: 1, over_turn: 1" in said and "turns         3: 4" in said
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["patterns"] == {"self-reflection": 4, "crop of a crop": 4} and report["played"] == 7
    assert {body["messages"][0]["content"][0]["text"] for body in server.bodies} == {data.few_shot_prompt()}
    assert max(len(body["messages"]) for body in server.bodies) == 2 + 2 * 4

    kept = data.load_trajectories(tmp_path / "out")                   # ours
    released = data.load_trajectories(tmp_path / "out/coldstart.parquet")
    assert [t.probe.question for t in kept] == [f"Number {i}?" for i in (0, 2, 4, 6)]
    assert all(t.reward == 1.0 and len(t.texts) == 3 and t.probe.source == "mine" for t in (*kept, *released))
    assert [t.texts for t in kept] == [t.texts for t in released]
    for i, ours, theirs in zip((0, 2, 4, 6), kept, released):
        assert ours.probe.open().tobytes() == theirs.probe.open().tobytes()
        assert ours.probe.open().size == (300 + i, 200) and ours.probe.meta == {"n": (1,)}
        assert theirs.probe.meta == {"images": 3, "sample_index": i, "rollout_index": 0}
    rows = data.pyarrow().parquet.read_table(tmp_path / "out/coldstart.parquet").to_pylist()
    assert list(rows[0]) == ["images", "image_names", "conversations", "data_source", "sample_index", "rollout_index"]
    sizes = [Image.open(io.BytesIO(image["bytes"])).size for image in rows[0]["images"]]
    assert sizes == [(300, 200), (150, 100), (75, 50)]                # native pixels: the picture, a crop, a crop of it
    talk = ast.literal_eval(rows[0]["conversations"])
    assert [part["from"] for part in talk] == ["system", *["human", "gpt"] * 3]
    assert talk[0]["value"] == data.SYSTEM_PROMPT                     # what was shown in context is left out
    assert talk[1]["value"] == "<image>\nNumber 0?" and talk[3]["value"] == "Observation 1:\n<image>"


def test_a_collection_that_stopped_goes_on_where_it_was(serve, tmp_path, monkeypatch, capsys):
    folder, calls = pictures(tmp_path / "set", 6), itertools.count()
    failing = serve(lambda body: (500, {}) if next(calls) > 9 else scripted(body))
    with pytest.raises(SystemExit) as stopped:
        collect_again(monkeypatch, folder, failing.url, tmp_path / "out")
    assert stopped.value.code == 2 and "HTTP 500" in capsys.readouterr().err
    log = tmp_path / "out/played.jsonl"
    before = log.read_text().splitlines()
    assert 1 < len(before) < 7
    with open(log, "a") as f:
        f.write('{"row": 0, "outco')                                  # a line that a kill cut short
    server = serve(scripted)
    collect_again(monkeypatch, folder, server.url, tmp_path / "out")
    after = [json.loads(line) for line in log.read_text().splitlines()]
    assert log.read_text().splitlines()[:len(before)] == before and sorted(row["row"] for row in after[1:]) == list(range(6))
    asked = {int(re.search(r"Number (\d+)", json.dumps(body))[1]) for body in server.bodies}
    assert asked == set(range(6)) - {json.loads(line)["row"] for line in before[1:]}
    assert [t.probe.answer for t in data.load_trajectories(tmp_path / "out")] == ["0", "2", "4"]
    calls = len(server.bodies)
    collect_again(monkeypatch, folder, server.url, tmp_path / "out")
    assert len(server.bodies) == calls                                # nothing is left to play
    with pytest.raises(SystemExit):
        collect_again(monkeypatch, folder, server.url, tmp_path / "out", max_turns=6)
    assert "was started with" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["endpoint", "model", "out"])
def test_a_collection_needs_its_flags(tmp_path, monkeypatch, capsys, missing):
    flags = {"collect": pictures(tmp_path / "set", 1), "endpoint": "http://127.0.0.1:9/v1", "model": "m", "out": tmp_path / "out"}
    with pytest.raises(SystemExit):
        run(monkeypatch, *(word for name, value in flags.items() if name != missing for word in (f"--{name}", value)))
    assert "error: " in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the command

def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
    data.command(data.main, data.Config)


def test_the_command_draws_a_set_that_it_can_check(tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    load_image(PHOTO).save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    options = ["--count", 5, "--kinds", "sign", "relation", "--difficulties", "easy", "--grid", 4, "--cell", 32,
               "--seed", 3, "--backgrounds", tmp_path / "photos"]
    run(monkeypatch, "--out", tmp_path / "set", *options)
    out = capsys.readouterr().out
    assert "  | 1. <think>" in out and "stop: answer  reward 1" in out and "sheet.png" in out
    sheet = Image.open(tmp_path / "set" / "sheet.png")
    assert sheet.width > 6 * 128 and sheet.height > 2 * 128
    probes = load_probes(tmp_path / "set")
    assert {p.source for p in probes} == {"sign", "relation"} and {p.open().size for p in probes} == {(128, 128)}
    run(monkeypatch, "--check", tmp_path / "set")
    out = capsys.readouterr().out
    assert "5 rows" in out and "128 x 128 5" in out and probes[0].question in out
    run(monkeypatch, "--out", tmp_path / "again", *options)
    again = load_probes(tmp_path / "again")
    assert [(p.question, p.open().tobytes()) for p in again] == [(p.question, p.open().tobytes()) for p in probes]


@pytest.mark.parametrize("arguments, message", [
    ([], "give either --out DIR"), (["--out", "x", "--check", "y"], "give either --out DIR"),
    (["--check", "none"], "none: no such file"), (["--out", "full"], "full is not empty"),
    (["--out", "x", "--kinds", "colour"], "kinds are attribute, .* not colour"),
    (["--out", "x", "--kinds"], "kinds are"), (["--out", "x", "--difficulties"], "difficulties are"),
    (["--out", "x", "--difficulties", "brutal"], "not brutal"),
    (["--out", "x", "--grid", "4"], "a grid of 5 to 26"), (["--out", "x", "--grid", "27"], "a grid of 5 to 26"),
    (["--out", "x", "--cell", "4"], "16 pixels"), (["--out", "x", "--count", "0"], "a count of 1"),
    (["--out", "x", "--backgrounds", "none"], "no image files in none"),
    (["--out", "x", "--backgrounds", "texts"], "no image files in texts"),
    (["--out", "x", "--backgrounds", "full"], "full/broken.jpg: "),
])
def test_a_mistake_at_the_keyboard_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert stopped.value.code == 2
    error, = [line for line in re.split("[\r\n]+", capsys.readouterr().err) if "error: " in line]
    assert re.search(message, error) and "Traceback" not in error


def test_the_check_opens_every_image(tmp_path, monkeypatch, capsys):
    directory = visual_probe(tmp_path)
    photo = directory / "data" / "visual_probe_hard_2.jpg"
    photo.write_bytes(photo.read_bytes()[:-600])
    with pytest.raises(SystemExit):
        run(monkeypatch, "--check", directory)
    assert "visual_probe_hard_2.jpg: " in capsys.readouterr().err
