"""Tests of data.py: probes, the scripted searcher, sets of probes in files, the command.

Statistics are taken over fixed seeds, most of them over scenes without pictures, so they never flake.
"""

import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

from common import UserError

import matplotlib.cbook
import numpy as np
import pytest
from conftest import run_main
from PIL import Image, ImageChops

import data
from data import (
    COLORS,
    DIGITS,
    PROBE_KINDS,
    Probe,
    cell_box,
    load_probes,
    make_probe,
    make_scene,
    write_search,
)
from env import Answer, Crop, CropEnv, ImageError, crop_pixels, fit_pixels, parse_action

ALL = list(itertools.product(PROBE_KINDS, data.DIFFICULTIES))
PATTERNS = ("depth_first", "trial_and_error")


@pytest.fixture(scope="session")
def photo(tmp_path_factory) -> str:
    """A real photograph, made small: 128 x 150 pixels."""
    with Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        image.resize((128, 150)).save(tmp_path_factory.mktemp("photo") / "admiral.jpg")
    return str(tmp_path_factory.getbasetemp() / "photo0" / "admiral.jpg")


def scenes(kind, difficulty, count, **size):
    return [make_scene(kind, difficulty, seed, **size) for seed in range(count)]


def plates(probe) -> dict[str, tuple]:
    """{name of the cell: its box} of every plate."""
    cells = [item["cell"] for item in probe.meta["items"]]
    return {data.cell_name(cell): cell_box(cell, probe.meta["grid"]) for cell in cells}


# ---------------------------------------------------------------------------------------------- probes

QUESTIONS = {  # kind: the question, the left and right glyph that it asks for, the part that answers
    "attribute": (r"What color is the tag with the (?P<left>\w+)\?", 2),
    "sign": (r"What number is on sign (?P<left>\w)\?", 1),
    "conjunction": (r"What color is the tag with (?P<left>\w+) and (?P<right>\d)\?", 2),
    "relation": (r"What number is left of the (?P<right>\w+)\?", 0),
}


@pytest.mark.parametrize("kind, difficulty", ALL)
def test_exactly_one_plate_fits_the_question_and_the_answers_are_balanced(kind, difficulty):
    counts, pattern = data.DIFFICULTIES[difficulty][0], QUESTIONS[kind][0]
    for probe in scenes(kind, difficulty, 100):
        items, k, wanted = probe.meta["items"], probe.meta["k"], re.fullmatch(pattern, probe.question)
        shown = [dict(zip(("left", "right"), item["parts"])) for item in items]
        fits = [wanted.groupdict().items() <= glyphs.items() for glyphs in shown]
        assert sum(fits) == 1 and fits == [item["target"] for item in items]
        target = items[fits.index(True)]
        assert probe.answer == target["answer"] == target["parts"][QUESTIONS[kind][1]]
        assert probe.boxes == [cell_box(target["cell"], 6)]
        assert len(plates(probe)) == len(items) == k in counts
        answers = list(DIGITS if kind in ("sign", "relation") else COLORS) * (k // 4)
        assert Counter(item["answer"] for item in items) == Counter(answers)


def test_look_alikes_share_a_part_with_the_target():
    for probe in scenes("conjunction", "hard", 20):
        (shape, digit, _), *others = [item["parts"] for item in probe.meta["items"]]
        assert all((other[0] == shape) != (other[1] == digit) for other in others)
    for probe in scenes("relation", "hard", 20):
        (_, shape, _), *others = [item["parts"] for item in probe.meta["items"]]
        assert any(other[0] == shape for other in others)  # the named shape, on the wrong side


@pytest.mark.parametrize("kind", PROBE_KINDS)
def test_nothing_but_the_plate_gives_the_answer_away(kind):
    """The best guess after 1000 other probes is right as often as chance: 25 %, within 4.5 sigma of 1.4 %."""
    probes = scenes(kind, "hard", 2000)
    for feature in (lambda p: 0, lambda p: p.question, lambda p: p.meta["k"], lambda p: p.boxes[0][:2]):
        seen = defaultdict(Counter)
        for probe in probes[:1000]:
            seen[feature(probe)][probe.answer] += 1
        right = [max(seen[feature(p)], key=seen[feature(p)].get) == p.answer for p in probes[1000:]]
        assert abs(np.mean(right) - 0.25) < 0.063
    everywhere = Counter(p.boxes[0] for p in probes)  # 2000 / 36 = 55.6 in each cell, sigma 7.4
    assert len(everywhere) == 36 and all(abs(count - 55.6) < 33 for count in everywhere.values())


@pytest.mark.parametrize("kind, difficulty", ALL)
def test_a_scene_is_a_probe_still_to_be_drawn(kind, difficulty):
    scene, probe = make_scene(kind, difficulty, 7), make_probe(kind, difficulty, 7)
    assert scene.image is None and vars(probe) == {**vars(scene), "image": probe.image}
    assert data.draw_scene(scene).tobytes() == probe.open().tobytes()
    assert probe.image.size == (288, 288) and probe.image.mode == "RGB"  # 6 cells of 48 pixels
    assert (probe.source, probe.difficulty, probe.prompt()) == (kind, difficulty, probe.question)
    assert make_probe(kind, difficulty, 7, cell=32, grid=5).image.size == (160, 160)


def test_a_scene_draws_nothing():
    assert make_scene("sign", "easy", 0, cell=10**9).meta["cell"] == 10**9  # its picture fits no computer


def test_the_same_seed_gives_the_same_probe_in_every_process(capsys):
    script = "import zlib, data\nprobe = data.make_probe('relation', 'hard', {seed})\n"
    script += "print(probe.question, probe.answer, probe.meta, zlib.crc32(probe.image.tobytes()))"
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(data.__file__).parent)}
    said = subprocess.check_output([sys.executable, "-c", script.format(seed=5)], text=True, env=env)
    exec(script.format(seed=5))
    assert capsys.readouterr().out == said != ""
    exec(script.format(seed=6))
    assert capsys.readouterr().out != said


def test_the_same_seed_gives_the_same_stream():
    kinds, levels = PROBE_KINDS[:2], ("easy", "hard")
    streams = [data.probe_stream(kinds, levels, seed, make_scene) for seed in (1, 1, 2)]
    first, again, other = ([vars(probe) for probe in itertools.islice(stream, 40)] for stream in streams)
    assert first == again != other and len({p["question"] for p in first}) > 8
    assert {(p["source"], p["difficulty"]) for p in first} == set(itertools.product(kinds, levels))


@pytest.mark.parametrize("kind, difficulty", [("colour", "hard"), ("sign", "brutal")])
def test_unknown_kinds_and_difficulties_are_refused(kind, difficulty):
    with pytest.raises(ValueError, match="attribute, sign, conjunction, relation; easy, medium, hard"):
        make_scene(kind, difficulty, 0)


@pytest.mark.parametrize("grid, candidates", [(6, 5), (6, 2), (6, 40), (6, 0), (6, -4), (1, 4), (1, None)])
def test_plates_that_are_no_multiple_of_four_or_do_not_fit_the_grid_are_refused(grid, candidates):
    with pytest.raises(ValueError, match=f"that fits a {grid} x {grid} grid"):
        make_scene("sign", "easy", 0, grid=grid, candidates=candidates)
    assert make_scene("sign", "hard", 0, candidates=36).meta["k"] == 36  # every cell holds a plate


def test_the_gold_box_holds_the_plate_and_little_else():
    for probe in scenes("attribute", "hard", 40, candidates=1):
        image, (item,) = data.draw_scene(probe), probe.meta["items"]
        probe.meta["items"] = []
        left, top, right, bottom = ImageChops.difference(image, data.draw_scene(probe)).getbbox()
        x0, y0, x1, y1 = crop_pixels(image.size, probe.boxes[0])
        assert x0 <= left < right <= x1 and y0 <= top < bottom <= y1
        assert right - left > 40 and bottom - top > 26 and max(x1 - x0, y1 - y0) <= 50
        crop = np.asarray(image.crop((x0, y0, x1, y1)), float)
        distance = {name: np.abs(crop - color).sum(2).min() for name, color in COLORS.items()}
        assert min(distance, key=distance.get) == item["answer"]  # the bar has the color of the answer


def test_photographs_lie_under_the_plates(photo, tmp_path):
    probe, again = (make_probe("sign", "easy", 1, backgrounds=[photo]) for _ in range(2))
    drawn = make_probe("sign", "easy", 1)
    assert probe.image.tobytes() == again.image.tobytes() != drawn.image.tobytes()
    assert probe.meta == drawn.meta
    (tmp_path / "broken.jpg").write_bytes(Path(photo).read_bytes()[:2000])
    with pytest.raises(ImageError, match="broken.jpg"):
        make_probe("sign", "easy", 1, backgrounds=[str(tmp_path / "broken.jpg")])


def test_a_crop_tells_two_glyphs_apart_and_the_overview_does_not():
    near, far = [], []
    for name in data.SHAPES + data.LETTERS + DIGITS:
        canvas, sprite = Image.new("RGB", (48, 48), (220,) * 3), data._sprite(name, 20, 48 / 16)
        canvas.paste(sprite, (14, 14), sprite)
        near.append(np.asarray(canvas, float))
        far.append(np.asarray(fit_pixels(canvas, 64, 64), float))
    for i, j in itertools.combinations(range(len(near)), 2):
        assert abs(near[i] - near[j]).max() > 60 and abs(far[i] - far[j]).max() < 8  # grey levels


def test_cells_are_named_from_the_top_left():
    assert [data.cell_name(cell) for cell in ((0, 0), (2, 0), (0, 9), (25, 25))] == ["a1", "c1", "a10", "z26"]
    assert cell_box((1, 2), 6) == (0.17, 0.33, 0.33, 0.5)


# ---------------------------------------------------------------------------------------------- the searcher


def crops_and_answer(texts):
    *looks, last = [parse_action(text) for text in texts]
    assert all(isinstance(look, Crop) and look.source == 0 for look in looks) and isinstance(last, Answer)
    return [look.box for look in looks], last.text


@pytest.mark.parametrize("kind, pattern", itertools.product(PROBE_KINDS, PATTERNS))
def test_the_searcher_never_returns_to_a_plate_and_ends_at_the_target(kind, pattern):
    """Looks are even on 1 .. 20: mean 10.5, variance (20 ** 2 - 1) / 12."""
    looks = []
    for seed, probe in enumerate(scenes(kind, "hard", 100, candidates=20)):
        boxes, answer = crops_and_answer(write_search(probe, random.Random(seed), pattern=pattern))
        assert len(set(boxes)) == len(boxes) and set(boxes) <= set(plates(probe).values())
        assert boxes[-1] == probe.boxes[0] and answer == probe.answer
        looks.append(len(boxes))
    assert abs(np.mean(looks) - 10.5) < 3 * (399 / 12 / 100) ** 0.5


def test_depth_first_follows_one_list_round_its_end_from_any_start():
    probe = make_scene("sign", "hard", 1)
    starts, lists = set(), set()
    for seed in range(20):
        texts = write_search(probe, random.Random(seed), pattern="depth_first")
        listed, start = re.match(r"<think>plates ([\w ]+), next (\w+)</think>", texts[0]).groups()
        plan = listed.split()
        plan = plan[plan.index(start) :] + plan[: plan.index(start)]
        assert crops_and_answer(texts)[0] == [plates(probe)[name] for name in plan][: len(texts) - 1]
        assert all(f", after {name}</think>" in text for name, text in zip(plan, texts[1:-1]))
        starts.add(start), lists.add(listed)
    assert sorted(plan) == sorted(plates(probe)) and len(lists) == 1 and len(starts) > 5
    regions = [((int(row) - 1) // 2, (ord(column) - ord("a")) // 2) for column, row in listed.split()]
    assert regions == sorted(regions)  # of 2 x 2 cells, one after the other


def test_trial_and_error_has_no_list_and_takes_any_order():
    probe = make_scene("sign", "hard", 1)
    tried = [write_search(probe, random.Random(seed), pattern="trial_and_error") for seed in range(9)]
    assert not any("plates" in text or "after" in text for text in itertools.chain(*tried))
    assert all("try " in text for texts in tried for text in texts[:-1])
    assert len({str(texts) for texts in tried}) > 4


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_slip_looks_at_an_empty_cell_and_is_noticed(pattern):
    slipped = 0
    for seed, probe in enumerate(scenes("sign", "hard", 20, candidates=20)):
        texts = write_search(probe, random.Random(seed), pattern=pattern, slip=0.5)
        boxes, answer = crops_and_answer(texts)
        assert answer == probe.answer and len(set(boxes)) == len(boxes)
        noticed = ["see nothing, no" in text for text in texts[1:]]
        assert noticed == [box not in plates(probe).values() for box in boxes]
        slipped += sum(noticed)
    assert 50 < slipped < 150  # 20 searches of about 15 looks, a third of them slips


@pytest.mark.parametrize("impatience, share", [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_impatience_guesses_with_a_chance_that_grows_with_the_misses(impatience, share):
    """At 1 a first miss ends in a guess; at 0.5 half of the first misses do, and all of the second ones."""
    guessed, guesses = [], set()
    for seed, probe in enumerate(scenes("sign", "hard", 400, candidates=20)):
        texts = write_search(probe, random.Random(seed), pattern="depth_first", impatience=impatience)
        assert impatience == 0 or len(texts) <= 1 + 1 / impatience
        if "yes" not in texts[1]:
            guessed.append(", guess</think>" in texts[1])
        guesses |= {parse_action(texts[-1]).text} if "guess" in texts[-1] else set()
    assert abs(np.mean(guessed) - share) < 0.1 and guesses == (set(DIGITS) if share else set())


def test_every_thought_holds_the_goal_beside_what_is_seen():
    probe = make_scene("conjunction", "hard", 4)
    (_, shape), (_, digit) = probe.meta["checks"]
    _, *misses, last = write_search(probe, random.Random(0), pattern="depth_first")
    assert misses and all(f"<think>want {shape}: see " in text and ", no, after " in text for text in misses)
    want = f"<think>want {shape}: see {shape}, yes, want {digit}: see {digit}, yes, read {probe.answer}"
    assert last == f"{want}</think><answer>{probe.answer}</answer>"


@pytest.mark.parametrize("kind", PROBE_KINDS)
def test_searches_play_without_an_error(kind):
    probe = make_probe(kind, "easy", 11)
    world = CropEnv(probe.open(), probe.prompt(), max_turns=99)
    for text in write_search(probe, random.Random(1), pattern="trial_and_error", slip=0.2):
        world.step(text)
    assert (world.stop, world.errors, world.answer) == ("answer", [], probe.answer)


def test_a_single_plate_is_looked_at_once_and_is_the_target_as_often_as_not():
    answered = 0
    for probe in scenes("sign", "hard", 300, grid=1, candidates=1):
        (item,) = probe.meta["items"]
        look, last = data.write_look(probe)
        assert parse_action(look) == Crop((0.0, 0.0, 1.0, 1.0), 0) and f"see {item['parts'][0]}, " in last
        assert parse_action(last) == (Answer(probe.answer) if item["target"] else parse_action(look))
        answered += item["target"]
    assert 110 < answered < 190


def test_the_world_of_the_warm_up_hides_the_first_view():
    probe = make_probe("sign", "hard", 3, grid=1, candidates=1)
    world = data.WarmUpEnv(probe.open(), probe.prompt())
    system, user = world.reset()
    assert system["role"] == "system" and user["content"] == [{"type": "text", "text": probe.question}]
    reply, _ = world.step(data.write_look(probe)[0])
    assert reply["content"][-1]["image"].tobytes() == fit_pixels(probe.image, 40_000, 2_000_000).tobytes()


def kept(count, seed=0, **changes):
    settings = {"trial_share": 0.3, "impatience": (0.03, 0.12), "patient_share": 0.3, "slip": 0.04}
    stream = data.probe_stream(PROBE_KINDS, ("easy", "hard"), seed, make_scene, cell=4)
    searches = data.cold_start(stream, seed, **settings | {"max_turns": 16} | changes)
    return list(itertools.islice(searches, count))


def test_only_searches_that_end_right_in_time_are_kept_and_their_probes_are_drawn():
    for probe, texts in kept(60, max_turns=6):
        assert crops_and_answer(texts)[1] == probe.answer and len(texts) <= 6
        assert probe.image.size == (24, 24)
    searches = kept(150)
    assert max(len(texts) for _, texts in searches) == 16
    assert any("guess" in texts[-1] for _, texts in searches)  # guesses that were right by chance stay
    assert 0.2 < np.mean([texts[0].startswith("<think>try ") for _, texts in searches]) < 0.4
    assert searches[0][1] == kept(1)[0][1] != kept(1, seed=1)[0][1]


def test_patient_searches_never_guess():
    lengths = {}
    for share in (0.0, 0.5, 1.0):
        searches = [texts for _, texts in kept(60, impatience=(1.0, 1.0), patient_share=share, slip=0.0)]
        lengths[share] = max(map(len, searches))
        assert any("guess" in texts[-1] for texts in searches) == (share < 1)
    assert lengths[0.0] == 2 and min(lengths[0.5], lengths[1.0]) > 10


def test_each_search_draws_its_own_impatience_log_uniformly():
    """Of first misses in kept searches, 10 % end in a guess; a uniform impatience would make that 35 %."""
    searches = kept(150, impatience=(0.01, 1.0), patient_share=0.0, max_turns=99)
    missed = [texts[1] for _, texts in searches if "yes, read" not in texts[1]]
    assert 0.04 < np.mean(["guess" in text for text in missed]) < 0.2


@pytest.mark.parametrize("impatience", [(0.0, 0.1), (0.2, 0.1), (-1.0, 1.0)])
def test_an_impatience_that_is_no_range_above_zero_is_refused(impatience):
    with pytest.raises(UserError, match=r"--impatience .*: needs 0 < lowest <= highest"):
        kept(1, impatience=impatience)


# ---------------------------------------------------------------------------------------------- files


def test_saved_probes_come_back_as_they_were(tmp_path, photo):
    drawn, question = make_probe("relation", "medium", 5), "Who\u2028is \u201cshe\u201d?"
    named = Probe(
        photo, question, ["A", "C"], {"A": "x", "B": "y", "C": "z"}, [(0, 0.5, 1, 1)], "mine", "hard"
    )
    assert named.prompt() == f"{question}\nA. x\nB. y\nC. z" and named.open().size == (128, 150)
    data.save_probes(iter([drawn, named]), tmp_path / "set")
    for path in (tmp_path / "set", str(tmp_path / "set" / "probes.jsonl")):
        first, second = load_probes(path)
        meta = json.loads(json.dumps(drawn.meta))  # lists where there were tuples
        assert vars(first) == {**vars(drawn), "image": f"{tmp_path}/set/images/00000.png", "meta": meta}
        assert first.open().tobytes() == drawn.image.tobytes()
        assert vars(second) == vars(named)  # named, not copied
    files = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert files == {"probes.jsonl", "00000.png"}  # no temporary file left
    with pytest.raises(UserError, match="set holds a set of probes already: give another --out"):
        data.save_probes([drawn], tmp_path / "set")
    assert len(load_probes(tmp_path / "set")) == 2


GOOD = {"image": "a.png", "question": "What color?", "answer": "red"}


def write_rows(folder, *rows):
    """A set beside one image, a.png. A row is an object, or the bytes of its line."""
    Image.new("RGB", (30, 20), "red").save(folder / "a.png")
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "probes.jsonl").write_bytes(b"\n".join(lines))
    return folder / "probes.jsonl"


def test_a_row_by_hand_needs_three_fields_and_further_keys_go_to_meta(tmp_path):
    file = write_rows(tmp_path, GOOD, {**GOOD, "category": "x", "k": 3, "meta": {"k": [1]}})
    first, second = load_probes(file)
    assert vars(first) == vars(Probe(str(tmp_path / "a.png"), "What color?", "red"))
    assert second.meta == {"category": "x", "k": [1]}
    assert [len(load_probes(file, limit=n)) for n in (1, 2, 9)] == [1, 2, 2]
    write_rows(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")  # as Windows saves it
    assert load_probes(file)[0].question == "What color?"


BAD_BOXES = [
    [0.5, 0, 0.5, 1],
    [0, 0.6, 1, 0.5],
    [-0.1, 0, 1, 1],
    [0, 0, 200, 100],
    [0, 0, 1],
    [0, 0, 1, 1, 1],
]
BAD_ROWS = {  # the message: the rows, or what is changed in a good one
    "": [b"{'image': 1}", b'{"image": "a.png"', b"", b"[" * 100_000, b'"\xff"', {"image": "x" * 300}],
    "should be an object {...}, not": [b"[1]", b"null"],
    "is missing or of the wrong type": [{"question": None}, {"image": 3}, {"meta": []}, {"boxes": {}}],
    '"answer"': [b'{"image": "a.png", "question": "?"}', {"answer": 8}, {"answer": []}],
    "should be text, and not empty": [{"answer": ["a", 2]}, {"answer": " "}, {"question": " "}],
    "the options should be text": [{"options": {"A": 1}, "answer": "A"}],
    '"options" should be': [{"options": ["red"]}],
    "not one of the options": [{"options": {"A": "red", "B": "blue"}, "answer": "C"}],
    "no prediction can match": [{"answer": "x" * 2000}],
    "surrogate": [{"question": "q \ud800"}],
    "a box should be": [{"boxes": [box]} for box in [*BAD_BOXES, ["0", 0, 1, 1], 0]],
    "is missing; is the set complete": [{"image": "b.png"}, {"image": ""}],
}


@pytest.mark.parametrize("message, row", [(text, row) for text, rows in BAD_ROWS.items() for row in rows])
def test_a_broken_row_is_one_error_that_names_the_file_and_the_row(tmp_path, message, row):
    with pytest.raises(UserError) as caught:
        load_probes(write_rows(tmp_path, GOOD, GOOD | row if isinstance(row, dict) else row, GOOD))
    assert str(caught.value).startswith(f"{tmp_path}/probes.jsonl, row 2: ") and message in str(caught.value)


def test_a_set_that_is_not_there_or_empty_is_one_error(tmp_path):
    for path in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(UserError, match=r"no such set of probes; to make one: python data.py --out DIR"):
            load_probes(path)
    with pytest.raises(UserError, match="probes.jsonl: holds no rows"):
        load_probes(write_rows(tmp_path))


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_draws_a_set_and_a_sheet(tmp_path, monkeypatch, photo):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.JPG").write_bytes(Path(photo).read_bytes())
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    flags = "--count 8 --kinds sign relation --difficulties easy --grid 4 --cell 32 --seed 3".split()
    for out, more in (("a", []), ("b", ["--backgrounds", tmp_path / "photos"]), ("c", [])):
        code, said, _ = run_main(monkeypatch, "data.py", "--out", tmp_path / out, *flags, *more)
        assert code == 0 and said[-1] == f"8 probes in {tmp_path / out}; look at {tmp_path / out}/sheet.png"
    assert re.fullmatch(r"What .*\?  \(answer: \d\)", said[0]) and said[1].startswith("  <think>try ")
    drawn, photos, again = (load_probes(tmp_path / out) for out in "abc")
    assert {(p.source, p.difficulty) for p in drawn} == {("sign", "easy"), ("relation", "easy")}
    pictures = [[p.open().tobytes() for p in probes] for probes in (drawn, photos, again)]
    assert pictures[0] == pictures[2] and not set(pictures[0]) & set(pictures[1])
    assert [p.meta for p in drawn] == [p.meta for p in photos] and drawn[0].open().size == (128, 128)
    sheet = Image.open(tmp_path / "a" / "sheet.png")  # two kinds; three columns of two pictures of 128
    assert sheet.size == (12 + 3 * (2 * 128 + 36), 12 + 2 * (128 + 36))
    first = next(p for p in drawn if p.source == "sign")
    x, y = (12 + round(v * 128) for v in first.boxes[0][:2])
    assert sheet.getpixel((x, y)) == (255, 255, 255)  # the corner of the gold box
    assert sheet.getpixel((x + 10, y + 5)) == first.open().getpixel((x - 2, y - 7))


MISTAKES = {
    "--kinds colour": "no probe of kind 'colour', .*: choose from attribute, sign",
    "--kinds": "kind",
    "--difficulties brutal": "difficulty 'brutal'",
    "--grid 3": "that fits a 3 x 3 grid",
    "--grid 27": "--grid ends at 26",
    "--cell 15": "--cell at 16",
    "--count 0": "--count starts at 1",
    "--backgrounds none": "--backgrounds: no image files in none",
    "--backgrounds texts": "--backgrounds: no image files in texts",
    "--backgrounds photos": "photos/broken.jpg: ",
    "--out old": "old holds a set of probes already",
}


@pytest.mark.parametrize("flags, message", MISTAKES.items())
def test_a_mistake_at_the_keyboard_is_one_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    for file in ("texts/a.txt", "photos/broken.jpg", "old/probes.jsonl"):
        Path(file).parent.mkdir()
        Path(file).write_bytes(b"\xff\xd8\xff")
    base = "--out new --difficulties hard --cell 16 --count 3".split()
    code, _, said = run_main(monkeypatch, "data.py", *base, *flags.split())
    (error,) = [line for line in said if "error: " in line]
    assert code == 2 and re.search(message, error) and not Path("new").exists()
