"""Converts VisualProbe (Easy, Medium, Hard, train) and DeepEyes_train_4K. The images are named, not copied.

Reads val.json or train.json, a list of rows, with the images beside it:

    {"images": ["VisualProbe_Hard/data/x.jpg"], "problem": "<image>\\nWhat ...?", "solution": "White.",
     "data_source": "visual_probe_hard", "doc_id": "visual_probe_hard_0"}

The first part of an image's name is the folder of the set, whatever that is called on this disk. The answers
of DeepEyes_train_4K are sentences: train on them with a judge.

Licence: CC BY-NC 4.0, as Mini-o3 says. The licence of what DeepEyes_train_4K was made from is not known.

    $ python prepare/visual_probe.py hub --set VisualProbe_Hard --out visual_probe_hard  # downloads it
    $ python prepare/visual_probe.py ~/VisualProbe_Hard --out visual_probe_hard          # it was downloaded
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from formats import read_json
from shared import BaseConfig, Probe, UserError, cli, convert, find_file, find_image, take


@dataclass(frozen=True)
class Config(BaseConfig):
    # The set that `hub` downloads.
    set: Literal[
        "VisualProbe_Easy", "VisualProbe_Medium", "VisualProbe_Hard", "VisualProbe_train", "DeepEyes_train_4K"
    ] = "VisualProbe_Hard"


def read_row(row: dict, folder: Path) -> Probe:
    names = take(row, "images", list)
    if len(names) != 1 or not isinstance(names[0], str):
        raise UserError(f'"images" should be a list of one path, not {names!r:.80}')
    name = names[0]
    if not (folder / name).is_file() and not Path(name).is_absolute():
        name = str(Path(*Path(name).parts[1:]))
    source = take(row, "data_source", str)
    level = source.rpartition("_")[2]
    return Probe(
        find_image(folder, name),
        take(row, "problem", str),
        take(row, "solution", str),
        source=source,
        difficulty=level if level in ("easy", "medium", "hard") else "",
        meta={k: v for k, v in row.items() if k not in ("images", "problem", "solution", "data_source")},
    )


def main(cfg: Config) -> None:
    file = find_file(cfg.src, f"Mini-o3/{cfg.set}", "val.json", "train.json")
    convert(read_json(file), lambda row: read_row(row, file.parent), cfg.out)


if __name__ == "__main__":
    cli(main, Config)
