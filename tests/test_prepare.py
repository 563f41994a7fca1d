"""Tests of prepare/: each published set, drawn in its own format, becomes probes that load_probes reads.

Lines worth flipping, each with the test that then fails:
    read_literal    literal_eval -> eval                     -> code_in_a_conversation_is_never_run
    find_image      no check of the name                     -> an_image_outside_the_set_is_refused
    hr_bench        cycle_of without the image               -> cycle_of_is_the_same_for_the_four_orders_...
    read_question   options as they are listed               -> the_right_option_of_vstar_does_not_come_first
    write           the image is encoded again               -> images_keep_their_bytes_and_are_written_once
"""

import base64
import csv
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "prepare"))

import hr_bench
import mme_realworld
import pyarrow.parquet
import pytest
import released_cold_start
import shared
import visual_probe
import vstar
from PIL import Image

from data import load_probes

CROP = '<think>Look.</think><grounding>{"bbox_2d": [0, 0, 0.5, 0.5], "source": "original_image"}</grounding>'
RED = "<think>Red.</think><answer>Red</answer>"
CHOICES = ["(A) The red one", "(B) 5", "(C) (A) or (B)", "(E) None of these."]


def encode(width: int, height: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((width, height)).save(buffer, kind)
    return buffer.getvalue()


def as_text(image: bytes) -> str:
    return base64.b64encode(image).decode()


def convert(script, src, out: Path, **flags):
    """The probes that a script makes of a set."""
    script.main(getattr(script, "Config", shared.BaseConfig)(str(src), out, **flags))
    return load_probes(out)


# ----------------------------------------------------------------------------------------- drawn sets
# Each function draws a set in its published format. `change` goes to the second row, to break it.


def draw_visual_probe(folder: Path, **change) -> Path:
    (folder / "data").mkdir(parents=True)
    row = {"problem": "<image>\nWhat color?", "solution": " White.", "data_source": "visual_probe_hard"}
    rows = [row | {"images": [f"VisualProbe_Hard/data/{i}.jpg"], "doc_id": f"hard_{i}"} for i in range(2)]
    for i in range(2):
        (folder / f"data/{i}.jpg").write_bytes(encode(40 + i, 30, "JPEG"))
    rows[1] |= change
    (folder / "val.json").write_text(json.dumps(rows))
    return folder / "val.json"


def draw_vstar(folder: Path, **change) -> Path:
    row = {"target_object": ["cap"], "bbox": [[20, 10, 40, 20], [180, 90, 30, 10]], "question": "What?"}
    row["options"] = ["red", "blue", "white", "black"]
    for kind in ("direct_attributes", "relative_position"):
        (folder / kind).mkdir(parents=True)
        for i in range(20):
            (folder / kind / f"sa_{i:02d}.jpg").write_bytes(encode(200, 100, "JPEG"))
            (folder / kind / f"sa_{i:02d}.json").write_text(json.dumps(row | change))
    return folder


def draw_vstar_file(folder: Path, **change) -> Path:
    draw_vstar(folder)
    row = {"image": "direct_attributes/sa_00.jpg", "label": "B", "question_id": 3}
    row["text"] = "What is it?\n(A) rubber\n(B) cotton\nAnswer with the option's letter."
    (folder / "test_questions.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row | change)}\n")
    return folder / "test_questions.jsonl"


def write_table(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir()
    with open(file, "w", newline="", encoding="utf-8") as lines:
        csv.writer(lines, delimiter="\t").writerows([rows[0], *(row.values() for row in rows)])
    return file


def draw_hr_bench(folder: Path, **change) -> Path:
    """Two questions, each in four orders of its options. "red" is right and moves from A to D, C, B."""
    rows, options = [], ["red", "blue", "green", "grey"]
    for i in range(8):
        row = {"index": i, "question": 'Which "color"\nis it?', "answer": "ADCB"[i % 4], "category": "single"}
        row |= dict(zip("ABCD", options[i % 4 :] + options[: i % 4]))
        rows.append(row | {"cycle_category": i % 4, "image": as_text(encode(60 + i // 4, 40))})
    rows[1] |= change
    return write_table(folder / "hr_bench_4k.tsv", rows)


def draw_mme(folder: Path, **change) -> Path:
    folder.mkdir()
    (folder / "a.png").write_bytes(encode(9, 9))
    row = {"Image": "a.png", "Text": "Q?", "Answer choices": CHOICES, "Ground truth": "B"}
    row |= {"Category": "color", "Task": "Perception"}
    (folder / "MME_RealWorld.json").write_text(json.dumps([row, row | change]))
    return folder / "MME_RealWorld.json"


def draw_mme_lite(folder: Path, **change) -> Path:
    row = {"index": 7, "image": as_text(encode(50, 30)), "question": "Q?", "answer": "E", "category": "count"}
    row["multi-choice options"] = repr(CHOICES)
    return write_table(folder / "lite.tsv", [row, row | {"index": 8, "image": "7"} | change])


def draw_cold_start(folder: Path, **change) -> Path:
    talk = [("system", "Search."), ("human", "<image>\nWhat color?"), ("gpt", CROP), ("human", "<image>")]
    row = {"conversations": repr([{"from": who, "value": text} for who, text in [*talk, ("gpt", RED)]])}
    row |= {"images": [encode(40, 30), encode(20, 15)], "image_names": ["../../a.png", "/tmp/x.png"]}
    row |= {"data_source": "visual_probe_train", "sample_index": 5, "rollout_index": 1}
    (folder / "data").mkdir(parents=True)
    file = folder / "data/train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row | change]), file)
    return file


# ----------------------------------------------------------------------------------------- each set


def test_visual_probe_names_its_images_whatever_its_folder_is_called(tmp_path):
    _, probe = convert(visual_probe, draw_visual_probe(tmp_path / "5f3a9c0e").parent, tmp_path / "out")
    assert probe.image == str(tmp_path / "5f3a9c0e/data/1.jpg") and not (tmp_path / "out/images").exists()
    assert (probe.question, probe.answer, probe.options) == ("What color?", " White.", None)
    assert (probe.source, probe.difficulty, probe.meta) == ("visual_probe_hard", "hard", {"doc_id": "hard_1"})


def test_the_right_option_of_vstar_does_not_come_first(tmp_path):
    probes = convert(vstar, draw_vstar(tmp_path / "V"), tmp_path / "out")
    assert {probe.options[probe.answer] for probe in probes} == {"red"}  # listed first in the files
    letters = Counter(probe.answer for probe in probes)
    assert set(letters) == {"A", "B", "C", "D"} and letters["A"] < 20
    assert convert(vstar, tmp_path / "V", tmp_path / "again") == probes  # the order is drawn from the id
    assert probes[0].boxes == [(0.1, 0.1, 0.3, 0.3), (0.9, 0.9, 1.0, 1.0)]  # relative, and inside the image
    known = {"target_object": ["cap"], "category": "relative_position", "question_id": "sa_00"}
    assert probes[20].meta == known and probes[20].open().size == (200, 100)


def test_the_question_file_of_vstar_has_its_options_in_the_text(tmp_path):
    probe, _ = convert(vstar, draw_vstar_file(tmp_path / "V"), tmp_path / "out")
    assert (probe.question, probe.answer, probe.boxes) == ("What is it?", "B", [])
    assert (probe.options, probe.meta) == ({"A": "rubber", "B": "cotton"}, {"question_id": 3})


def test_cycle_of_is_the_same_for_the_four_orders_and_different_between_questions(tmp_path):
    file = draw_hr_bench(tmp_path / "hr", image="0")  # row 2 names the row with its image
    probes = convert(hr_bench, file.parent, tmp_path / "out")
    assert {probe.options[probe.answer] for probe in probes} == {"red"}
    cycles = [probe.meta["cycle_of"] for probe in probes]
    assert len(set(cycles)) == 2 and cycles == [cycles[0]] * 4 + [cycles[4]] * 4
    assert [probe.meta["cycle_category"] for probe in probes] == list("0123" * 2)
    assert probes[1].prompt() == 'Which "color"\nis it?\nA. blue\nB. green\nC. grey\nD. red'
    assert [probe.open().size for probe in probes] == [(60, 40)] * 4 + [(61, 40)] * 4


def test_images_keep_their_bytes_and_are_written_once(tmp_path):
    image = encode(1500, 1500, "BMP")
    assert len(image) > 10 * 131_072  # csv stops at 131,072 by itself
    probes = convert(hr_bench, draw_hr_bench(tmp_path / "hr", image=as_text(image)), tmp_path / "out")
    assert Path(probes[1].image).read_bytes() == image
    assert probes[1].open() == Image.open(io.BytesIO(image)).convert("RGB")
    assert len(list((tmp_path / "out/images").iterdir())) == 3


def test_mme_realworld_is_read_from_json_and_from_a_table(tmp_path):
    options = {"A": "The red one", "B": "5", "C": "(A) or (B)", "E": "None of these."}
    probe, _ = convert(mme_realworld, draw_mme(tmp_path / "full").parent, tmp_path / "a")
    assert (probe.question, probe.answer, probe.options) == ("Q?", "B", options)
    assert probe.meta == {"Task": "Perception", "category": "color"} and probe.open().size == (9, 9)
    first, second = convert(mme_realworld, draw_mme_lite(tmp_path / "c").parent, tmp_path / "b", set="lite")
    assert (first.answer, first.options, first.meta["category"]) == ("E", options, "count")
    assert first.image == second.image and second.open().size == (50, 30)  # row 2 names the index of row 1


def test_the_released_cold_start_keeps_the_assistant_messages(tmp_path):
    unfinished = repr([{"from": "human", "value": "<image>Who?"}, {"from": "gpt", "value": CROP}])
    file = draw_cold_start(tmp_path / "set", conversations=unfinished)
    first, second = convert(released_cold_start, tmp_path / "set", tmp_path / "out")
    assert (first.question, first.answer, first.source) == ("What color?", "Red", "visual_probe_train")
    assert first.meta == {"texts": [CROP, RED], "images": 2, "sample_index": 5, "rollout_index": 1}
    assert first.open().size == (40, 30)  # the original image, and not the crop
    assert (second.question, second.answer, second.meta["texts"]) == ("Who?", [], [CROP])
    row = pyarrow.parquet.read_table(file).to_pylist()[0]
    row["images"] = [{"bytes": image, "path": "../a"} for image in row["images"]]  # the other form
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    assert convert(released_cold_start, file, tmp_path / "again")[0].open().size == (40, 30)


# ----------------------------------------------------------------------------------------- broken sets

BROKEN = [
    (visual_probe, draw_visual_probe, {"solution": 8}, '"solution" is missing or of the wrong type: 8'),
    (visual_probe, draw_visual_probe, {"images": ["V/data/none.jpg"]}, "none.jpg is missing"),
    (visual_probe, draw_visual_probe, {"problem": "<image>\n"}, "the question is empty"),
    (visual_probe, draw_visual_probe, {"solution": " "}, "no prediction can match the answer"),
    (vstar, draw_vstar_file, {"text": "What?\nA. rubber\nB. cotton"}, "there are no options"),
    (hr_bench, draw_hr_bench, {"answer": "F"}, "not one of the options"),
    (hr_bench, draw_hr_bench, {"image": "99"}, "the image is missing, its cell holds '99'"),
    (hr_bench, draw_hr_bench, {"image": "x" * 400}, "the image in this row is broken"),
    (mme_realworld, draw_mme, {"Answer choices": ["red", "blue"]}, "the options should be"),
    (mme_realworld, draw_mme_lite, {"multi-choice options": "[1, 2"}, "not a list"),
    (released_cold_start, draw_cold_start, {"images": []}, "the row has no image"),
    (released_cold_start, draw_cold_start, {"conversations": "[]"}, "should take turns"),
]


@pytest.mark.parametrize("script, draw, change, message", BROKEN)
def test_a_broken_row_names_the_file_and_the_row(tmp_path, script, draw, change, message):
    file = draw(tmp_path / "set", **change)
    with pytest.raises(shared.UserError, match=message) as caught:
        convert(script, file, tmp_path / "out")
    assert str(caught.value).startswith(f"{file}, row 2: ") and "\n" not in str(caught.value)
    assert not (tmp_path / "out/probes.jsonl").exists()


@pytest.mark.parametrize("change", [{"options": []}, {"bbox": [[1, 2]]}, {"question": None}])
def test_a_broken_question_of_the_vstar_folders_is_named(tmp_path, change):
    with pytest.raises(shared.UserError, match="direct_attributes/sa_00.json, row 1: "):
        convert(vstar, draw_vstar(tmp_path / "V", **change), tmp_path / "out")


@pytest.mark.parametrize("name", ["{root}/secret.png", "../secret.png", "V/../../secret.png"])
def test_an_image_outside_the_set_is_refused(tmp_path, name):
    (tmp_path / "secret.png").write_bytes(encode(8, 8))
    name = name.format(root=tmp_path)
    files = {visual_probe: draw_visual_probe(tmp_path / "probe", images=[name])}
    files |= {vstar: draw_vstar_file(tmp_path / "V", image=name)}
    files |= {mme_realworld: draw_mme(tmp_path / "mme", Image=name)}
    for script, file in files.items():
        with pytest.raises(shared.UserError, match="row 2: the image .* is not inside"):
            convert(script, file, tmp_path / "out")


def test_code_in_a_conversation_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = draw_cold_start(tmp_path / "set", conversations="__import__('os').system('touch hacked')")
    with pytest.raises(shared.UserError, match="row 2: not a list"):
        convert(released_cold_start, file, tmp_path / "out")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("script, draw", dict.fromkeys(row[:2] for row in BROKEN))
def test_a_file_that_is_cut_short_is_named(tmp_path, script, draw):
    file = draw(tmp_path / "set")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(shared.UserError, match=str(file)):
        convert(script, file, tmp_path / "out")


# ----------------------------------------------------------------------------------------- the command


def test_hub_downloads_only_the_file_that_is_asked_for(tmp_path, monkeypatch):
    def download(repo, repo_type, allow_patterns):
        assert (repo, repo_type, allow_patterns) == ("DreamMr/HR-Bench", "dataset", "hr_bench_4k.tsv")
        return str(draw_hr_bench(tmp_path / "cache").parent)

    monkeypatch.setattr(shared.huggingface_hub, "snapshot_download", download)
    assert len(convert(hr_bench, "hub", tmp_path / "out", set="4k")) == 8


def test_the_documented_command_runs_from_anywhere(tmp_path):
    draw_mme_lite(tmp_path / "lite")
    command = [sys.executable, mme_realworld.__file__, "lite/lite.tsv", "--out", "out"]
    assert subprocess.check_output(command, cwd=tmp_path, text=True) == "2 probes in out\n"
    assert [probe.open().size for probe in load_probes(tmp_path / "out")] == [(50, 30)] * 2
