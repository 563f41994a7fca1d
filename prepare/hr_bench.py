"""Converts HR-Bench 4K or 8K (800 rows each): 200 questions, each in four orders of its options.

Reads hr_bench_4k.tsv or hr_bench_8k.tsv, a table with these columns:

    index  question  answer (a letter)  category  A  B  C  D  cycle_category (which order)  image (base64)

The bytes of each distinct image are written once, to OUT/images. An image cell may also hold the index of an
earlier row with the same image. meta["cycle_of"] is the same for the four orders of a question, and
meta["cycle_category"] tells them apart: eval.py averages over the orders and takes the error over questions.

Licence: "other"; its text is empty.

    $ python prepare/hr_bench.py hub --set 4k --out hr_bench_4k
    $ python prepare/hr_bench.py ~/hr_bench_8k.tsv --out hr_bench_8k
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

from formats import ImageWriter, read_table
from shared import BaseConfig, Probe, UserError, cli, convert, find_file, take

LETTERS = "ABCDEF"


@dataclass(frozen=True)
class Config(BaseConfig):
    set: Literal["4k", "8k"] = "4k"  # the file to look for in a folder or on the hub


def read_row(row: dict, images: ImageWriter) -> Probe:
    image, question = images.write_cell(row), take(row, "question", str)
    options = {letter: row[letter] for letter in LETTERS if row.get(letter)}
    if not options:
        raise UserError("there are no options")
    meta = {k: v for k, v in row.items() if k not in ("image", "question", "answer", *LETTERS)}
    meta["cycle_category"] = take(row, "cycle_category", str)
    meta["cycle_of"] = hashlib.sha256(f"{question} {image.name}".encode()).hexdigest()[:16]
    return Probe(image, question, take(row, "answer", str), options, source="hr_bench", meta=meta)


def main(cfg: Config) -> None:
    name = f"hr_bench_{cfg.set}.tsv"
    file = find_file(cfg.src, "DreamMr/HR-Bench", name, download=name)
    images = ImageWriter(cfg.out)
    convert(read_table(file), lambda row: read_row(row, images), cfg.out)


if __name__ == "__main__":
    cli(main, Config)
