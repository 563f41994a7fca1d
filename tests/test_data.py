"""Tests of data.py: probes, the scripted searcher, our file format, the command."""

import itertools
import json
import random
import re
from collections import Counter

from common import UserError

import numpy as np
import pytest
from conftest import noise, run_main
from PIL import Image, ImageChops, ImageFilter

import data
from data import DIGITS, PROBE_KINDS, Probe, load_probes, make_probe, make_scene, save_probes, write_search
from env import Answer, Crop, CropEnv, parse_action

HARD = [(kind, seed) for kind in PROBE_KINDS for seed in range(3)]


# ---------------------------------------------------------------------------------------------- probes


@pytest.mark.parametrize("kind", PROBE_KINDS)
def test_the_same_seed_gives_the_same_probe_and_another_seed_another(kind):
    one, two, other = (make_probe(kind, "hard", seed) for seed in (3, 3, 4))
    assert one == two and one.image.tobytes() == two.image.tobytes()
    assert one.image.tobytes() != other.image.tobytes() and one.image.size == (288, 288)


@pytest.mark.parametrize("kind, seed", HARD)
def test_the_answers_of_the_look_alikes_are_balanced_and_one_plate_is_the_target(kind, seed):
    probe = make_scene(kind, "hard", seed)
    items, k = probe.meta["items"], probe.meta["k"]
    assert len(items) == k and k in data.DIFFICULTIES["hard"][0]
    answers = Counter(item["answer"] for item in items)
    assert set(answers.values()) == {k // 4} and len(answers) == 4
    assert [item["target"] for item in items] == [True] + [False] * (k - 1)
    target = items[0]
    assert target["answer"] == probe.answer == target["parts"][probe.meta["reads"]]
    checks = probe.meta["checks"]
    assert all(target["parts"][i] == wanted and wanted in probe.question for i, wanted in checks)
    for item in items[1:]:
        assert any(item["parts"][i] != wanted for i, wanted in probe.meta["checks"])


@pytest.mark.parametrize("kind, seed", HARD)
def test_each_plate_has_a_cell_of_its_own_and_the_gold_box_is_that_of_the_target(kind, seed):
    probe = make_scene(kind, "hard", seed)
    cells = [item["cell"] for item in probe.meta["items"]]
    assert len(set(cells)) == len(cells) and all(0 <= v < 6 for cell in cells for v in cell)
    x, y = cells[0]
    (box,) = probe.boxes
    assert box == pytest.approx([(v + d) / 6 for d in (0, 1) for v in (x, y)], abs=1e-4)


def test_answers_and_places_are_scattered():
    scenes = [make_scene("sign", "hard", seed, regions=3) for seed in range(300)]
    assert min(Counter(scene.answer for scene in scenes)[digit] for digit in DIGITS) > 45
    targets = {scene.meta["items"][0]["cell"] for scene in scenes}
    plates = {item["cell"] for scene in scenes for item in scene.meta["items"]}
    assert len(targets) > 180 and len(plates) == 18 * 18
    regions = [{data.split_cell(item["cell"], 6)[0] for item in s.meta["items"]} for s in scenes]
    assert {len(occupied) for occupied in regions} == {3, 4, 5, 6, 7}
    assert len({make_scene("sign", "hard", seed).meta["items"][0]["cell"] for seed in range(300)}) == 36


def test_a_glyph_is_seen_in_a_crop_and_vanishes_in_the_view_of_its_region():
    """Six cells are shown at a sixth of their size; plain drawings differ by 50 of 255 levels there."""
    sprites = [data._sprite(name, 20, 3.0).getchannel("A") for name in data.SHAPES + data.LETTERS + DIGITS]
    blurred = [sprite.filter(ImageFilter.GaussianBlur(3)) for sprite in sprites]
    for (a, b), (c, d) in zip(itertools.combinations(sprites, 2), itertools.combinations(blurred, 2)):
        inner = [np.asarray(image, float)[6:-6, 6:-6] for image in (a, b, c, d)]
        assert np.abs(inner[0] - inner[1]).mean() > 5 and np.abs(inner[2] - inner[3]).mean() < 1


def test_with_several_regions_a_board_lies_under_the_plates_of_a_region_and_nowhere_else():
    probe = make_probe("sign", "hard", 0, regions=3)
    occupied = {data.split_cell(item["cell"], 6)[0] for item in probe.meta["items"]}
    for x, y in itertools.product(range(3), repeat=2):
        between = [(x * 288 + 48 * i, y * 288 + 48) for i in range(1, 6)]  # no plate reaches there
        light = [np.array(probe.image.getpixel(pixel)) / data.BOARD for pixel in between]
        boards = [colors.max() - colors.min() < 0.03 for colors in light]
        assert all(boards) if (x, y) in occupied else not any(boards)


def test_a_plate_is_drawn_in_its_cell_in_its_color():
    probe = make_probe("attribute", "hard", 0)
    for item in probe.meta["items"]:
        x, y = item["cell"]
        bar, colors = np.array(probe.image.getpixel((x * 48 + 24, y * 48 + 36))), data.COLORS
        assert min(colors, key=lambda name: np.abs(bar - colors[name]).sum()) == item["parts"][2]


def test_a_scene_is_a_probe_that_is_not_drawn_yet():
    scene, probe = make_scene("sign", "medium", 5), make_probe("sign", "medium", 5)
    assert {**vars(scene), "image": None} == {**vars(probe), "image": None}
    assert scene.open().tobytes() == probe.image.tobytes() and scene.image is None


def test_a_single_plate_is_the_target_about_as_often_as_not():
    scenes = [make_scene("attribute", "hard", seed, grid=1, candidates=1) for seed in range(200)]
    assert all(len(scene.meta["items"]) == 1 for scene in scenes)
    assert 70 < sum(scene.meta["items"][0]["target"] for scene in scenes) < 130


@pytest.mark.parametrize(
    "arguments, size, message",
    [
        (("plate", "hard"), {}, "no probe of kind 'plate'"),
        (("sign", "harder"), {}, "difficulty 'harder'"),
        (("sign", "hard"), {"candidates": 5}, "5 look-alikes"),
        (("sign", "hard"), {"candidates": 6}, "6 look-alikes"),
        (("sign", "hard"), {"candidates": 40}, "40 look-alikes"),
        (("sign", "hard"), {"candidates": 8, "grid": 2}, "at most 4"),
    ],
)
def test_a_probe_that_cannot_be_drawn_is_refused(arguments, size, message):
    with pytest.raises(ValueError, match=message):
        make_probe(*arguments, 0, **size)


def test_photographs_lie_under_the_plates(tmp_path):
    Image.new("RGB", (90, 70), (255, 0, 0)).save(tmp_path / "red.png")
    plain, photo = (make_probe("sign", "hard", 1, backgrounds=b) for b in (None, [str(tmp_path / "red.png")]))
    assert plain.meta["items"] == photo.meta["items"]
    assert ImageChops.difference(plain.image, photo.image).getbbox()
    taken = [item["cell"] for item in photo.meta["items"]]
    x, y = next(place for place in itertools.product(range(6), repeat=2) if place not in taken)
    red, green, blue = photo.image.getpixel((x * 48 + 24, y * 48 + 24))
    assert red > 2 * green and red > 2 * blue


def test_a_stream_is_endless_fresh_and_given_by_its_seed():
    one, two = (list(itertools.islice(data.probe_stream(PROBE_KINDS, ("easy",), 7), 40)) for _ in (1, 2))
    assert one == two and len({probe.meta["seed"] for probe in one}) == 40
    assert {probe.source for probe in one} == set(PROBE_KINDS)


# ---------------------------------------------------------------------------------------------- the searcher


def play(probe, texts, env_class=CropEnv):
    env = env_class(probe.open(), probe.prompt(), max_turns=len(texts))
    env.reset()
    for text in texts:
        _, stop = env.step(text)
    return env, stop


def looks_at(texts) -> list[tuple]:
    """The places in order: (region, None) for a crop of a region, (region, cell) for a crop inside of it."""
    places: list[tuple] = []
    boxes = {n: {data.cell_box((x, y), n): (x, y) for x in range(n) for y in range(n)} for n in (3, 6)}
    for crop in map(parse_action, texts[:-1]):
        if crop.box in boxes[6]:
            places.append((places[crop.source - 1][0] if crop.source else (0, 0), boxes[6][crop.box]))
        else:
            places.append((boxes[3][crop.box], None))
    return places


@pytest.mark.parametrize("regions", [1, 3])
@pytest.mark.parametrize("pattern", ["depth_first", "trial_and_error"])
@pytest.mark.parametrize("kind", PROBE_KINDS)
def test_a_patient_search_visits_each_plate_once_at_most_region_by_region(kind, pattern, regions):
    probe = make_probe(kind, "hard", 2, regions=regions)
    texts = write_search(probe, random.Random(1), pattern=pattern)
    env, stop = play(probe, texts)
    assert stop == "answer" and env.answer == probe.answer and not env.errors
    plates = [data.split_cell(item["cell"], 6) for item in probe.meta["items"]]
    looks = looks_at(texts)
    assert len(set(looks)) == len(looks) and looks[-1] == plates[0]
    assert set(looks) <= {*plates, *((region, None) for region, _ in plates)}
    for region, inside in itertools.groupby(looks, lambda look: look[0]):
        seen = [cell for _, cell in inside]
        assert regions == 1 or seen.pop(0) is None  # into a region, its plates one by one, back out
        if region != looks[-1][0]:
            assert {(region, cell) for cell in seen} == {plate for plate in plates if plate[0] == region}
    wanted = probe.meta["checks"][0][1]
    for (region, cell), text in zip(looks, texts[1:]):  # it keeps the goal, or says where it is
        here = f"in {data.region_name(region)}, observation_"
        assert text.startswith(f"<think>want {wanted}: see " if cell else f"<think>{here}")


def test_lists_go_in_blocks_of_two_by_two_and_the_first_is_followed_round():
    probe = make_scene("sign", "hard", 0, candidates=8, regions=3)
    cells = [(17, 17), (0, 0), (3, 0), (1, 1), (0, 2), (6, 0), (6, 1), (7, 0)]
    for item, cell in zip(probe.meta["items"], cells):
        item["cell"] = cell
    firsts = set()
    for seed in range(30):
        texts = write_search(probe, random.Random(seed), pattern="depth_first")
        assert texts[0].startswith("<think>regions r1 r2 r9, next ")
        regions = re.findall(r"(?:^.*next|leave r\d) (r\d)", "\n".join(texts))
        firsts.add(regions[0])
        assert "r1 r2 r9 r1 r2 r9".find(" ".join(regions)) >= 0 and regions[-1] == "r9"
        lists = set(re.findall(r"in (r\d), observation_.*?: (plates .*?),", " ".join(texts)))
        assert lists <= {("r1", "plates a1 b2 d1 a3"), ("r2", "plates a1 b1 a2"), ("r9", "plates f6")}
    assert firsts == {"r1", "r2", "r9"}
    flat = make_scene("sign", "hard", 2)
    for texts in (write_search(flat, random.Random(seed), pattern="depth_first") for seed in range(30)):
        listed, _, visited = texts[0].partition("plates ")[2].partition(",")
        visited = re.findall(r"(?:next|after \w+) (\w+)", visited + " ".join(texts[1:]))
        firsts.add(visited[0])
        assert " ".join(visited) in f"{listed} {listed}"
    assert len(firsts) > 8


@pytest.mark.parametrize("pattern", ["depth_first", "trial_and_error"])
def test_a_slip_is_noticed_and_the_search_goes_on(pattern):
    probe = make_probe("sign", "hard", 2, regions=3)
    plates = [data.split_cell(item["cell"], 6) for item in probe.meta["items"]]
    goal, missed, empty = probe.meta["checks"][0][1], [], []
    for seed in range(5):
        texts = write_search(probe, random.Random(seed), pattern=pattern, slip=1.0)
        for (region, cell), text in zip(looks_at(texts), texts[1:]):
            if cell and (region, cell) not in plates:
                missed.append(f"want {goal}: see nothing, no, " in text)
            if not cell and region not in [plate[0] for plate in plates]:
                empty.append(": plates nothing, leave " in text)
        assert play(probe, texts)[0].answer == probe.answer
    assert missed and all(missed) and empty and all(empty)


def test_impatience_ends_in_a_guess_that_grows_likelier_with_every_miss():
    """With impatience 1 it guesses after the first miss; with 0.2, after the fifth at the latest."""
    probe = make_scene("sign", "hard", 2)
    for impatience, longest in ((1.0, 1), (0.2, 5)):
        for seed in range(40):
            texts = write_search(probe, random.Random(seed), pattern="trial_and_error", impatience=impatience)
            assert sum("<think>want" in text for text in texts) <= longest
            if "guess" in texts[-1]:
                assert parse_action(texts[-1]).text in DIGITS


def test_a_look_hides_the_first_view_and_reads_a_single_plate_or_says_no():
    single = {"grid": 1, "candidates": 1}
    scenes = (make_scene("relation", "hard", seed, **single) for seed in itertools.count())
    for target in (True, False):
        scene = next(s for s in scenes if s.meta["items"][0]["target"] == target)
        first, second = data.write_look(scene)
        assert parse_action(first) == Crop((0.0, 0.0, 1.0, 1.0), 0)
        assert isinstance(parse_action(second), Answer if target else Crop)
        assert ("yes, read" if target else ", no") in second
        env = data.WarmUpEnv(scene.open(), "?", 2)
        shown = [message["content"] for message in (env.reset()[1], env.step(first)[0])]
        assert [[part["type"] for part in content] for content in shown] == [["text"], ["text", "image"]]


def searches(count, **changes):
    scenes = data.probe_stream(PROBE_KINDS, ("hard",), 3)
    shares = {"trial_share": 0.5, "impatience": (0.05, 0.15), "patient_share": 0.1, "slip": 0.02}
    return list(itertools.islice(data.cold_start(scenes, 1, **{"max_turns": 32} | shares | changes), count))


def test_only_searches_that_end_right_within_the_limit_are_kept_and_drawn():
    kept = searches(40, max_turns=7)
    assert max(len(texts) for _, texts in kept) == 7
    for probe, texts in kept:
        assert play(probe, texts)[0].answer == probe.answer and probe.open().size == (288, 288)
    assert {", next" in text[0] for _, text in kept} == {True, False}


def test_the_shares_of_patterns_and_patience_are_as_asked():
    assert all(", next" in texts[0] for _, texts in searches(8, trial_share=0.0))
    assert all(", try " in texts[0] for _, texts in searches(8, trial_share=1.0))
    assert not any("guess" in texts[-1] for _, texts in searches(25, patient_share=1.0))
    assert any("guess" in texts[-1] for _, texts in searches(25, impatience=(0.5, 0.5), patient_share=0.0))
    # Impatience is drawn log-uniformly: of (0.001, 1), half are below 0.03, and few such searches guess.
    wide = searches(40, impatience=(0.001, 1.0), patient_share=0.0, max_turns=100)
    assert 8 < sum(len(texts) > 8 for _, texts in wide)
    for bad in ((0.0, 0.1), (0.2, 0.1)):
        with pytest.raises(UserError, match="--impatience"):
            searches(1, impatience=bad)


# ---------------------------------------------------------------------------------------------- files


def test_a_set_is_read_as_it_was_saved_and_files_are_named_not_copied(tmp_path):
    drawn, photo = make_probe("sign", "hard", 0), tmp_path / "photo.png"
    noise(40, 30).save(photo)
    options, boxes = {"A": "red", "B": "blue"}, [(0.0, 0.1, 0.5, 1.0)]
    named = Probe(str(photo), "Which?", "B", options, boxes, "mine", "", {"id": 7})
    save_probes([drawn, named], tmp_path / "set")
    for path in (tmp_path / "set", tmp_path / "set/probes.jsonl"):
        one, two = load_probes(path)
        assert one.open().tobytes() == drawn.image.tobytes() and one.prompt() == drawn.prompt()
        assert (one.answer, one.boxes, one.source) == (drawn.answer, drawn.boxes, "sign")
        assert one.meta["k"] == drawn.meta["k"] and two == named
        assert two.prompt() == "Which?\nA. red\nB. blue"
    assert len(list((tmp_path / "set/images").iterdir())) == 1
    assert len(load_probes(tmp_path / "set", limit=1)) == 1
    with pytest.raises(UserError, match="holds a set of probes already"):
        save_probes([drawn], tmp_path / "set")


def test_a_relative_path_is_saved_so_that_it_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise(8, 8).save("a.png")
    save_probes([Probe("a.png", "Who?", "Ann")], tmp_path / "set")
    monkeypatch.chdir("/")
    assert load_probes(tmp_path / "set")[0].open().size == (8, 8)


def test_further_keys_go_to_meta_and_paths_are_relative_to_the_file(tmp_path):
    noise(8, 8).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "Who?", "answer": ["Ann", "Anna"], "category": "people"}
    (tmp_path / "x.jsonl").write_text("\ufeff" + json.dumps(row) + "\n")
    (probe,) = load_probes(tmp_path / "x.jsonl")
    assert probe.meta == {"category": "people"} and probe.answer == ["Ann", "Anna"]
    assert probe.open().size == (8, 8)


GOOD = {"image": "a.png", "question": "Who?", "answer": "A", "options": {"A": "Ann", "B": "Bob"}}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"question": None}, '"question" is missing or of the wrong type'),
        ({"question": " "}, "should be text, and not empty"),
        ({"answer": 5}, '"answer" is missing or of the wrong type'),
        ({"answer": "C"}, "not one of the options"),
        ({"answer": ["Ann", "x" * 2000], "options": None}, "no prediction can match"),
        ({"options": ["Ann"]}, '"options" should be'),
        ({"image": "b.png"}, "b.png is missing"),
        ({"image": "b" * 300}, "is missing"),
        ({"boxes": [[0.5, 0, 0.2, 1]]}, "a box should be"),
        ({"question": "\ud800"}, "surrogates not allowed"),
        ("[1]", "should be an object"),
        ('{"image"', "row 2: "),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff\xfe", "utf-8"),
    ],
)
def test_a_broken_row_is_one_error_that_names_file_and_row(tmp_path, change, message):
    noise(8, 8).save(tmp_path / "a.png")
    broken = change if isinstance(change, (str, bytes)) else json.dumps(GOOD | change)
    broken = broken if isinstance(broken, bytes) else broken.encode()
    (tmp_path / "probes.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + broken + b"\n")
    with pytest.raises(UserError, match=message) as caught:
        load_probes(tmp_path)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'probes.jsonl'}, row 2: ") and "\n" not in said


def test_a_set_that_is_not_there_or_empty_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no such set of probes"):
        load_probes(tmp_path)
    (tmp_path / "probes.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no rows"):
        load_probes(tmp_path)


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_draws_a_set_and_a_sheet(tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    noise(60, 60).save(photos / "a.JPG", "JPEG")
    words = ("--out", tmp_path / "set", "--count", 5, "--backgrounds", photos)
    code, out, _ = run_main(monkeypatch, "data", *words)
    assert not code and "5 probes in" in "\n".join(out)
    assert len(load_probes(tmp_path / "set")) == 5 and Image.open(tmp_path / "set/sheet.png").width > 1000


@pytest.mark.parametrize(
    "words, message",
    [
        (["--kinds", "plate"], "no probe of kind"),
        (["--kinds"], "--kinds and --difficulties need at least one value"),
        (["--count", "0"], "--count starts at 1"),
        (["--backgrounds", "nowhere"], "no image files in nowhere"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, monkeypatch, words, message):
    code, _, err = run_main(monkeypatch, "data", "--out", tmp_path / "set", *words)
    errors = [line for line in err if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0] and not (tmp_path / "set").exists()


def test_a_folder_that_is_taken_is_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(data, "draw_scene", None)
    code, _, err = run_main(monkeypatch, "data", "--out", tmp_path / "file")
    assert code == 2 and "is a file" in err[-1] and (tmp_path / "file").read_text() == "mine"


def test_the_sheet_shows_each_kind_in_a_row_of_its_own_and_the_target_framed():
    probes = [make_probe(kind, "easy", 0) for kind in PROBE_KINDS]
    sheet = data.draw_sheet(probes)
    x0, y0 = (round(v * 576) for v in probes[0].boxes[0][:2])
    assert sheet.getpixel((x0, y0)) == (255, 255, 255) and sheet.height == 4 * (576 + 36)
