"""Converts V* (191 questions). The images are named, not copied.

Reads either form of the set:

  - Folders (direct_attributes, relative_position) with one .json and one .jpg per question. Boxes are
    x, y, width, height in pixels. The first option is the right one, so the options are shuffled, by id.

        {"target_object": ["cap"], "bbox": [[20, 10, 40, 20]], "question": "What ...?",
         "options": ["red", "blue"]}

  - test_questions.jsonl, without boxes, its options shuffled already:

        {"image": "direct_attributes/sa_0.jpg", "text": "What ...?\\n(A) red\\n(B) blue\\nAnswer with ...",
         "category": "direct_attributes", "label": "B", "question_id": 3}

Licence: the code MIT; the images are from SA-1B.

    $ python prepare/vstar.py hub --out vstar                                   # folders, with boxes
    $ python prepare/vstar.py ~/vstar_bench/test_questions.jsonl --out vstar    # that file
"""

import json
import random
import re
from pathlib import Path

from shared import BaseConfig as Config
from shared import Probe, UserError, cli, convert, fetch, find_image, take

from env import load_image


def find_questions(path: Path) -> list[Path]:
    """The .json files of the folders that hold pairs of .json and .jpg, if there are any."""
    files = [*path.glob("*.json"), *path.glob("*/*.json")] if path.is_dir() else []
    folders = {file.parent for file in files if file.with_suffix(".jpg").is_file()}
    return sorted(file for file in files if file.parent in folders)


def read_question(file: Path) -> Probe:
    """A question of the folders."""
    row, category = json.loads(file.read_bytes()), file.parent.name
    question, listed, boxes = take(row, "question", str), take(row, "options", list), take(row, "bbox", list)
    if not listed or not all(isinstance(text, str) for text in listed):
        raise UserError(f"the options should be a list of texts, not {listed!r:.80}")
    order = random.Random(f"options/{category}/{file.stem}").sample(range(len(listed)), len(listed))
    options = {chr(ord("A") + i): listed[j] for i, j in enumerate(order)}
    image = file.with_suffix(".jpg")
    width, height = load_image(image).size
    boxes = [scale_box(box, width, height) for box in boxes]
    meta = {k: v for k, v in row.items() if k not in ("question", "options", "bbox")}
    meta |= {"category": category, "question_id": file.stem}
    return Probe(image, question, chr(ord("A") + order.index(0)), options, boxes, "vstar", meta=meta)


def scale_box(box: list, width: int, height: int) -> tuple[float, float, float, float]:
    """x, y, width, height in pixels -> x0, y0, x1, y1 relative to the image, and inside it."""
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
        raise UserError(f"a box should be [x, y, width, height] in pixels, not {box!r:.80}")
    x, y, w, h = box
    x0, y0, x1, y1 = max(0, x / width), max(0, y / height), min(1, (x + w) / width), min(1, (y + h) / height)
    if x0 >= x1 or y0 >= y1:
        raise UserError(f"the box {box} has no area inside an image of {width} x {height} pixels")
    return x0, y0, x1, y1


def read_line(row: dict, folder: Path) -> Probe:
    """A row of test_questions.jsonl."""
    image, text, label = take(row, "image", str), take(row, "text", str), take(row, "label", str)
    options = dict(re.findall(r"^\(([A-Z])\) (.*)$", text, re.MULTILINE))
    if not options:
        raise UserError(f"there are no options (A), (B), ... in {text!r:.80}")
    question = text.split("\n(A) ")[0]
    meta = {k: v for k, v in row.items() if k not in ("image", "text", "label")}
    return Probe(find_image(folder, image), question, label, options, source="vstar", meta=meta)


def main(cfg: Config) -> None:
    path = fetch(cfg.src, "craigwu/vstar_bench")
    if questions := find_questions(path):
        convert([(f"{file}, row 1", file) for file in questions], read_question, cfg.out)
    else:
        file = path / "test_questions.jsonl" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"{path} holds no test_questions.jsonl, and no .json files with a .jpg each")
        lines = file.read_bytes().splitlines()
        rows = [(f"{file}, row {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
        convert(rows, lambda line: read_line(json.loads(line), file.parent), cfg.out)


if __name__ == "__main__":
    cli(main, Config)
