"""Converts MME-RealWorld or MME-RealWorld-Lite (1,919 rows).

Reads either form of the set:

  - JSON, a list of rows, with the images in folders beside it. They are named, not copied. Where they come as
    archives, unpack those first.

        {"Question_id": "m/1", "Image": "sub/a.png", "Text": "What ...?", "Ground truth": "B",
         "Answer choices": ["(A) red", "(B) 5"], "Category": "color", "Subtask": "Monitoring"}

  - A table (.tsv). The bytes of each distinct image are written once, to OUT/images. An image cell may also
    hold the index of an earlier row with the same image.

        index  image (base64)  question  multi-choice options (a list as text)  answer  category  l2-category

Licence: tagged Apache-2.0, but its text forbids commercial use and redistribution.

    $ python prepare/mme_realworld.py ~/MME_RealWorld.json --out mme_realworld
    $ python prepare/mme_realworld.py hub --set lite --out mme_realworld_lite
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from formats import ImageWriter, read_json, read_literal, read_table
from shared import BaseConfig, Probe, UserError, cli, convert, find_file, find_image, take

SETS = {  # its repository, its file
    "full": ("yifanzhang114/MME-RealWorld", "*.json"),
    "lite": ("yifanzhang114/MME-RealWorld-Lite", "*.tsv"),
}


@dataclass(frozen=True)
class Config(BaseConfig):
    set: Literal["full", "lite"] = "full"  # the set to look for in a folder or on the hub


def read_options(options: list | str) -> dict[str, str]:
    """["(A) red", "(B) blue"], or that list as text -> {"A": "red", "B": "blue"}."""
    listed = read_literal(options) if isinstance(options, str) else options
    found = {}
    for text in listed if isinstance(listed, list) else []:
        match = re.match(r"\s*\(?([A-Z])[).:]\s*(.*)", str(text), re.DOTALL)
        if match is None or match[1] in found:
            raise UserError(f"the options should be (A) ..., (B) ..., not {listed!r:.80}")
        found[match[1]] = match[2]
    if not found:
        raise UserError(f"there are no options in {options!r:.80}")
    return found


def read_json_row(row: dict, folder: Path) -> Probe:
    used = ("Image", "Text", "Ground truth", "Answer choices", "Category")
    return Probe(
        find_image(folder, take(row, "Image", str)),
        take(row, "Text", str),
        take(row, "Ground truth", str),
        read_options(take(row, "Answer choices", list, str)),
        source="mme_realworld",
        meta={k: v for k, v in row.items() if k not in used} | {"category": row.get("Category", "")},
    )


def read_table_row(row: dict, images: ImageWriter) -> Probe:
    used = ("image", "question", "answer", "multi-choice options")
    return Probe(
        images.write_cell(row),
        take(row, "question", str),
        take(row, "answer", str),
        read_options(take(row, "multi-choice options", str)),
        source="mme_realworld",
        meta={k: v for k, v in row.items() if k not in (*used, *"ABCDEF")},
    )


def main(cfg: Config) -> None:
    repo, pattern = SETS[cfg.set]
    file = find_file(cfg.src, repo, pattern, download="*.tsv" if cfg.set == "lite" else None)
    if file.suffix == ".json":
        convert(read_json(file), lambda row: read_json_row(row, file.parent), cfg.out)
    else:
        images = ImageWriter(cfg.out)
        convert(read_table(file), lambda row: read_table_row(row, images), cfg.out)


if __name__ == "__main__":
    cli(main, Config)
