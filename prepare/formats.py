"""The formats that published sets come in: JSON, tables, Python literals, and images inside rows."""

import base64
import csv
import hashlib
import io
import json
from ast import literal_eval
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from shared import UserError, take, write_atomic


def read_json(file: Path) -> list[tuple[str, dict]]:
    """(where it is, for messages; the row) of each element of a JSON list."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise UserError(f"{file}: cannot be read as JSON ({error}); is it complete?") from None
    if not isinstance(rows, list):
        raise UserError(f"{file}: should be a list of rows [...], not {rows!r:.80}")
    return [(f"{file}, row {number}", row) for number, row in enumerate(rows, 1)]


def read_table(file: Path) -> Iterator[tuple[str, dict]]:
    """(where it is, for messages; {column: text}) of each row below the header of a .tsv file."""
    csv.field_size_limit(1 << 30)  # an image of 8K takes tens of megabytes
    number = 0
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            for number, row in enumerate(csv.DictReader(lines, delimiter="\t", strict=True), 1):
                if None in row or None in row.values():
                    raise UserError(f"{file}, row {number}: has more or fewer cells than the header")
                yield f"{file}, row {number}", row
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{file}: broken after row {number} ({error}); is it complete?") from None


def read_literal(text: str):
    """A Python literal inside a row. It is read, never run."""
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(f"not a list: {text!r:.80} ({type(error).__name__})") from None


class ImageWriter:
    """Writes the images inside a set to out/images: each distinct one once, its bytes unchanged."""

    def __init__(self, out: Path):
        self.folder = out.absolute() / "images"
        self.by_index: dict[str, Path] = {}

    def write(self, content: bytes) -> Path:
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                ending = image.format.lower()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            raise UserError("the image in this row is broken, or of an unknown kind") from None
        path = self.folder / f"{hashlib.sha256(content).hexdigest()[:16]}.{ending}"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)
        return path

    def write_cell(self, row: dict) -> Path:
        """The image of a row of a table: base64, or the index of an earlier row with the same image."""
        cell, index = take(row, "image", str), take(row, "index", str)
        if len(cell) > 64:
            self.by_index[index] = self.write(base64.b64decode(cell))
        elif cell in self.by_index:
            self.by_index[index] = self.by_index[cell]
        else:
            raise UserError(f"the image is missing, its cell holds {cell!r}")
        return self.by_index[index]
