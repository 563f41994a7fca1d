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
