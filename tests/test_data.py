"""Tests of data.py: probes, the scripted searcher, our file format, the command."""

import itertools
import json
import random
from collections import Counter

from common import UserError

import pytest
from conftest import noise, run_main
from PIL import Image, ImageChops

import data
from data import (
    COLORS,
    DIFFICULTIES,
    DIGITS,
    PROBE_KINDS,
    Probe,
    WarmUpEnv,
    cell_box,
    cold_start,
    draw_scene,
    load_probes,
    make_probe,
    make_scene,
    probe_stream,
    save_probes,
    write_look,
    write_search,
)
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
    assert len(items) == k and k in DIFFICULTIES["hard"][0]
    answers = Counter(item["answer"] for item in items)
    assert set(answers.values()) == {k // 4} and len(answers) == 4
    assert [item["target"] for item in items] == [True] + [False] * (k - 1)
    target = items[0]
    assert target["answer"] == probe.answer == target["parts"][probe.meta["reads"]]
    assert all(
        target["parts"][i] == wanted and wanted in probe.question for i, wanted in probe.meta["checks"]
    )
    for item in items[1:]:
        assert any(item["parts"][i] != wanted for i, wanted in probe.meta["checks"])


@pytest.mark.parametrize("kind, seed", HARD)
def test_each_plate_has_a_cell_of_its_own_and_the_gold_box_is_that_of_the_target(kind, seed):
    probe = make_scene(kind, "hard", seed)
    cells = [item["cell"] for item in probe.meta["items"]]
    assert len(set(cells)) == len(cells) and all(0 <= v < 6 for cell in cells for v in cell)
    assert probe.boxes == [cell_box(cells[0], 6)]


def test_a_plate_is_drawn_in_its_cell_in_its_color():
    probe = make_probe("attribute", "hard", 0)
    for item in probe.meta["items"]:
        x, y = item["cell"]
        red, green, blue = probe.image.getpixel((x * 48 + 24, y * 48 + 36))  # on the bar
        nearest = min(
            COLORS, key=lambda name: sum(abs(a - b) for a, b in zip(COLORS[name], (red, green, blue)))
        )
        assert nearest == item["parts"][2]


def test_a_scene_is_a_probe_that_is_not_drawn_yet():
    scene, probe = make_scene("sign", "medium", 5), make_probe("sign", "medium", 5)
    assert scene.image is None
    assert (scene.question, scene.answer, scene.boxes, scene.meta) == (
        probe.question,
        probe.answer,
        probe.boxes,
        probe.meta,
    )
    assert draw_scene(scene).tobytes() == probe.image.tobytes()


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
        (("sign", "hard"), {"candidates": 40}, "40 look-alikes"),
        (("sign", "hard"), {"candidates": 8, "grid": 2}, "fits a 2 x 2 grid"),
    ],
)
def test_a_probe_that_cannot_be_drawn_is_refused(arguments, size, message):
    with pytest.raises(ValueError, match=message):
        make_probe(*arguments, 0, **size)


def test_photographs_lie_under_the_plates(tmp_path):
    Image.new("RGB", (90, 70), (255, 0, 0)).save(tmp_path / "red.png")
    plain, photo = (make_probe("sign", "hard", 1, backgrounds=b) for b in (None, [str(tmp_path / "red.png")]))
    assert plain.meta == photo.meta and ImageChops.difference(plain.image, photo.image).getbbox()
    empty = next(
        (x, y) for x in range(6) for y in range(6) if (x, y) not in [i["cell"] for i in photo.meta["items"]]
    )
    red, green, blue = photo.image.getpixel((empty[0] * 48 + 24, empty[1] * 48 + 24))
    assert red > 2 * green and red > 2 * blue


def test_a_stream_is_endless_fresh_and_given_by_its_seed():
    one, two = (
        list(itertools.islice(probe_stream(PROBE_KINDS, ("easy",), 7, make_scene), 40)) for _ in (1, 2)
    )
    assert one == two and len({probe.meta["seed"] for probe in one}) == 40
    assert {probe.source for probe in one} == set(PROBE_KINDS)


# ---------------------------------------------------------------------------------------------- the searcher


def play(probe, texts, env_class=CropEnv):
    env = env_class(probe.open(), probe.prompt(), max_turns=len(texts))
    env.reset()
    for text in texts:
        _, stop = env.step(text)
    return env, stop


@pytest.mark.parametrize("pattern", ["depth_first", "trial_and_error"])
@pytest.mark.parametrize("kind", PROBE_KINDS)
def test_a_patient_search_visits_each_plate_once_at_most_and_ends_right(pattern, kind):
    probe = make_probe(kind, "hard", 2)
    texts = write_search(probe, random.Random(1), pattern=pattern)
    env, stop = play(probe, texts)
    assert stop == "answer" and env.answer == probe.answer and not env.errors
    boxes = {cell_box(item["cell"], 6) for item in probe.meta["items"]}
    looks = [crop.box for crop in env.crops]
    assert len(set(looks)) == len(looks) and set(looks) <= boxes and looks[-1] == probe.boxes[0]
    wanted = probe.meta["checks"][0][1]
    assert all(f"want {wanted}: see " in text for text in texts[1:])  # the goal is restated at every look
    assert texts[0].startswith("<think>plates " if pattern == "depth_first" else "<think>try ")


def test_searches_of_a_scene_begin_at_different_plates():
    probe = make_scene("sign", "hard", 2)
    firsts = {write_search(probe, random.Random(s), pattern="depth_first")[0] for s in range(30)}
    assert len(firsts) > 5


def test_a_slip_is_noticed_and_the_search_goes_on():
    probe = make_probe("sign", "hard", 2)
    texts = write_search(probe, random.Random(0), pattern="trial_and_error", slip=1.0)
    occupied = {cell_box(item["cell"], 6) for item in probe.meta["items"]}
    empty = [i for i, text in enumerate(texts[:-1]) if parse_action(text).box not in occupied]
    assert empty and all("see nothing, no" in texts[i + 1] for i in empty)
    assert play(probe, texts)[0].answer == probe.answer


def test_impatience_ends_in_a_guess_that_grows_likelier_with_every_miss():
    """With impatience 1 it guesses after the first miss; with 0.2, after the fifth at the latest."""
    probe = make_scene("sign", "hard", 2)
    for impatience, longest in ((1.0, 2), (0.2, 6)):
        for seed in range(40):
            texts = write_search(probe, random.Random(seed), pattern="trial_and_error", impatience=impatience)
            assert len(texts) <= longest
            if "guess" in texts[-1]:
                assert parse_action(texts[-1]).text in DIGITS


def test_a_look_at_a_single_plate_reads_it_or_says_no():
    scenes = (make_scene("relation", "hard", seed, grid=1, candidates=1) for seed in itertools.count())
    for target in (True, False):
        scene = next(s for s in scenes if s.meta["items"][0]["target"] == target)
        first, second = write_look(scene)
        assert parse_action(first) == Crop((0.0, 0.0, 1.0, 1.0), 0)
        assert isinstance(parse_action(second), Answer if target else Crop)
        assert ("yes, read" if target else ", no") in second


def test_the_warm_up_hides_the_first_view():
    probe = make_probe("sign", "hard", 0, grid=1, candidates=1)
    env = WarmUpEnv(probe.image, "?", 2)
    assert [part["type"] for part in env.reset()[1]["content"]] == ["text"]
    reply, _ = env.step(write_look(probe)[0])
    assert [part["type"] for part in reply["content"]] == ["text", "image"]


def searches(count, **changes):
    scenes = probe_stream(PROBE_KINDS, ("hard",), 3, make_scene)
    shares = {
        "trial_share": 0.5,
        "impatience": (0.05, 0.15),
        "patient_share": 0.1,
        "slip": 0.02,
        "max_turns": 32,
    }
    return list(itertools.islice(cold_start(scenes, 1, **shares | changes), count))


def test_only_searches_that_end_right_within_the_limit_are_kept_and_drawn():
    kept = searches(25, max_turns=7)
    for probe, texts in kept:
        assert (
            len(texts) <= 7
            and play(probe, texts)[0].answer == probe.answer
            and probe.image.size == (288, 288)
        )
    assert {text[0].startswith("<think>plates") for _, text in kept} == {True, False}


def test_the_shares_of_patterns_and_patience_are_as_asked():
    assert all(texts[0].startswith("<think>plates") for _, texts in searches(8, trial_share=0.0))
    assert all(texts[0].startswith("<think>try") for _, texts in searches(8, trial_share=1.0))
    patient = searches(25, patient_share=1.0)
    assert not any("guess" in texts[-1] for _, texts in patient)
    assert any("guess" in texts[-1] for _, texts in searches(25, impatience=(0.5, 0.5), patient_share=0.0))
    for bad in ((0.0, 0.1), (0.2, 0.1)):
        with pytest.raises(UserError, match="--impatience"):
            searches(1, impatience=bad)


# ---------------------------------------------------------------------------------------------- files


def test_a_set_is_read_as_it_was_saved_and_files_are_named_not_copied(tmp_path):
    drawn, photo = make_probe("sign", "hard", 0), tmp_path / "photo.png"
    noise(40, 30).save(photo)
    named = Probe(
        str(photo), "Which?", "B", {"A": "red", "B": "blue"}, [(0.0, 0.1, 0.5, 1.0)], "mine", "", {"id": 7}
    )
    save_probes([drawn, named], tmp_path / "set")
    for path in (tmp_path / "set", tmp_path / "set/probes.jsonl"):
        one, two = load_probes(path)
        assert one.open().tobytes() == drawn.image.tobytes() and one.prompt() == drawn.prompt()
        assert (one.answer, one.boxes, one.source, one.meta["k"]) == (
            "".join(drawn.answer),
            drawn.boxes,
            "sign",
            drawn.meta["k"],
        )
        assert (two.image, two.options, two.boxes, two.meta) == (
            str(photo),
            named.options,
            named.boxes,
            {"id": 7},
        )
        assert two.prompt() == "Which?\nA. red\nB. blue"
    assert (
        len(list((tmp_path / "set/images").iterdir())) == 1
        and len(load_probes(tmp_path / "set", limit=1)) == 1
    )
    with pytest.raises(UserError, match="holds a set of probes already"):
        save_probes([drawn], tmp_path / "set")


def test_further_keys_go_to_meta_and_paths_are_relative_to_the_file(tmp_path):
    noise(8, 8).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "Who?", "answer": ["Ann", "Anna"], "category": "people"}
    (tmp_path / "x.jsonl").write_text("\ufeff" + json.dumps(row) + "\n")
    (probe,) = load_probes(tmp_path / "x.jsonl")
    assert (
        probe.meta == {"category": "people"}
        and probe.answer == ["Ann", "Anna"]
        and probe.open().size == (8, 8)
    )


GOOD = {"image": "a.png", "question": "Who?", "answer": "A", "options": {"A": "Ann", "B": "Bob"}}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"question": None}, '"question" is missing or of the wrong type'),
        ({"question": " "}, "should be text, and not empty"),
        ({"answer": 5}, '"answer" is missing or of the wrong type'),
        ({"answer": "C"}, "not one of the options"),
        ({"answer": "x" * 2000, "options": None}, "no prediction can match"),
        ({"options": ["Ann"]}, '"options" should be'),
        ({"image": "b.png"}, "b.png is missing"),
        ({"boxes": [[0.5, 0, 0.2, 1]]}, "a box should be"),
        ({"question": "\ud800"}, "surrogates not allowed"),
        ("[1]", "should be an object"),
        ('{"image"', "row 2: "),
    ],
)
def test_a_broken_row_is_one_error_that_names_file_and_row(tmp_path, change, message):
    noise(8, 8).save(tmp_path / "a.png")
    broken = change if isinstance(change, str) else json.dumps(GOOD | change)
    (tmp_path / "probes.jsonl").write_text(f"{json.dumps(GOOD)}\n{broken}\n")
    with pytest.raises(UserError, match=message) as caught:
        load_probes(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'probes.jsonl'}, row 2: ") and "\n" not in str(
        caught.value
    )


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
    noise(60, 60).save(photos / "a.jpg")
    code, out, _ = run_main(
        monkeypatch, "data", "--out", tmp_path / "set", "--count", 5, "--backgrounds", photos
    )
    assert not code and "5 probes in" in "\n".join(out) and any("<answer>" in line for line in out)
    assert len(load_probes(tmp_path / "set")) == 5 and Image.open(tmp_path / "set/sheet.png").width > 1000


@pytest.mark.parametrize(
    "words, message",
    [
        (["--kinds", "plate"], "no probe of kind"),
        (["--grid", "3"], "look-alikes"),
        (["--count", "0"], "--count starts at 1"),
        (["--backgrounds", "nowhere"], "no image files in nowhere"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, monkeypatch, words, message):
    code, _, err = run_main(monkeypatch, "data", "--out", tmp_path / "set", *words)
    errors = [line for line in err if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0] and not (tmp_path / "set").exists()


def test_the_sheet_shows_each_kind_in_a_row_of_its_own():
    probes = [make_probe(kind, "easy", 0) for kind in PROBE_KINDS]
    assert data.draw_sheet(probes).height == 12 + 4 * (288 + 36)
