"""Converts the cold start that Mini-o3 released: whole searches, for train_sft.py --data. Needs pyarrow.

Reads .parquet, one file or the folder of all parts (also in its folder data/), with these columns:

    images             bytes, or {"bytes": ..., "path": ...}: the original image, then the crops
    conversations      the text of a Python list of {"from": "system", "human" or "gpt", "value": text}
    data_source, sample_index, rollout_index

The conversations are read, never run. Only the first image is kept: the environment cuts the crops again. Its
bytes are written once, to OUT/images. meta["texts"] holds the assistant messages, meta["images"] the number
of images in the conversation. The answer is that of the last message. A search that ends without one has the
answer [], no known answer.

Licence: CC BY-NC 4.0, as Mini-o3 says.

    $ python prepare/released_cold_start.py hub --out cold_start
    $ python prepare/released_cold_start.py ~/Mini-o3-Coldstart-Dataset --out cold_start
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
from formats import ImageWriter, read_literal
from shared import BaseConfig as Config
from shared import Probe, UserError, cli, convert, fetch, take

from env import ActionError, Answer, parse_action


def read_parquet(files: list[Path]) -> Iterator[tuple[str, dict]]:
    """(where it is, for messages; the row) of each row of each file."""
    for file in files:
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                rows = (row for batch in table.iter_batches(batch_size=16) for row in batch.to_pylist())
                for number, row in enumerate(rows, 1):
                    yield f"{file}, row {number}", row
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file}: broken after row {number} ({error!s:.200})") from None


def read_row(row: dict, images: ImageWriter) -> Probe:
    said = read_literal(take(row, "conversations", str))
    if not isinstance(said, list) or not all(is_message(part) for part in said):
        raise UserError(f'"conversations" should list {{"from": ..., "value": ...}}, not {said!r:.80}')
    said = [part for part in said if part["from"] != "system"]
    texts = [part["value"] for part in said if part["from"] == "gpt"]
    if not texts or [part["from"] for part in said] != ["human", "gpt"] * len(texts):
        raise UserError("human and gpt should take turns, from human to gpt")
    pictures = take(row, "images", list)
    if not pictures:
        raise UserError("the row has no image")
    picture = pictures[0] if isinstance(pictures[0], dict) else {"bytes": pictures[0]}
    count = sum(part["value"].count("<image>") for part in said)
    known = {key: row[key] for key in ("sample_index", "rollout_index") if key in row}
    return Probe(
        images.write(take(picture, "bytes", bytes)),
        said[0]["value"],
        find_answer(texts[-1]),
        source=str(row.get("data_source") or "cold_start"),
        meta={"texts": texts, "images": count, **known},
    )


def is_message(part) -> bool:
    return isinstance(part, dict) and all(isinstance(part.get(key), str) for key in ("from", "value"))


def find_answer(text: str) -> str | list[str]:
    """The answer in the last message of a search, [] if there is none."""
    try:
        action = parse_action(text)
    except ActionError:
        return []
    return action.text if isinstance(action, Answer) else []


def main(cfg: Config) -> None:
    path = fetch(cfg.src, "Mini-o3/Mini-o3-Coldstart-Dataset")
    files = [path] if path.is_file() else sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
    if not files:
        raise UserError(f"{path} holds no .parquet files")
    images = ImageWriter(cfg.out)
    convert(read_parquet(files), lambda row: read_row(row, images), cfg.out)


if __name__ == "__main__":
    cli(main, Config)
