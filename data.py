"""Probes that force a search, and trajectories that show how to search.

A probe is one image, one question, one right answer. K plates lie scattered over a cluttered picture; all of
them look alike from afar, and only a crop shows what is painted on one. The question names one plate by what is
painted on it and asks for something else on it, so the K plates must be tried one by one: expected looks
(K + 1) / 2, the difficulty dial. The K answers are exactly balanced (K is a multiple of the four possible
answers), so that knowing the colours of all plates, but not which is which, is worth nothing: chance is 25 %.

    kind         on a plate             question                                 answer
    attribute    a shape, a letter      What color is the tag with the star?     red, green, blue, yellow
    sign         a letter, a digit      What number is on sign K?                2, 4, 7, 9
    conjunction  a shape, a digit       What color is the tag with star and 7?   a colour
    relation     a digit and a shape    What number is left of the star?         a digit

A scripted searcher, which knows the scene, plays probes through env.CropEnv and leaves the cold-start
trajectories: depth-first and trial-and-error searches, the goal restated at every look, slips that it notices,
and an impatience that grows with every miss. Only those that end correct are kept (paper, section 3.2). For real
photographs, `gather` lets any vision-language model play in context, shown the six searches of docs/exemplars.md.

    $ python data.py --out probes --count 100                     # draw probes: probes.jsonl, images/, sheet.png
    $ python data.py --out probes --backgrounds ~/photos          # the same, on your own photographs
    $ python data.py --check probes                               # what load_probes makes of a set, any format
    $ python data.py --collect probes --endpoint URL --model NAME --out cold_start       # any VLM, shown six searches

Read next: model.py.
"""
import base64
import csv
import errno
import fcntl
import functools
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import random
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from ast import literal_eval as python_literal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from env import (MAX_IMAGE_PIXELS, SYSTEM_PROMPT, ActionError, Answer, Crop, CropEnv, ImageError, fit_pixels,
                 format_action, grade, load_image, parse_action)

PROBE_KINDS = ("attribute", "sign", "conjunction", "relation")
DIFFICULTIES = {                       # our own definition: look-alikes, glyph height in cells, background contrast
    "easy": ((4,), 0.42, 20),
    "medium": ((8,), 0.42, 40),
    "hard": ((12, 16, 20, 24), 0.42, 60),
}
COLORS = {"red": (214, 40, 40), "green": (30, 150, 60), "blue": (40, 80, 220), "yellow": (236, 190, 20)}
SHAPES = ("star", "ring", "cross", "triangle", "square", "heart")
LETTERS = ("A", "C", "H", "K", "T", "X")
DIGITS = ("2", "4", "7", "9")
INK = (30, 30, 36)                     # letters and digits


class UserError(ValueError):
    """A mistake of the person at the keyboard: the message says what, where, and what to do."""


def command(main: Callable, config: type, presets: dict | None = None) -> None:
    """Runs a script: command line -> dataclass -> main(config). A user's mistake is one line and exit code 2.

    presets: {name: config}; a name as the first word takes its values in place of the defaults. A full disk is one
    line, too; Ctrl-C where no step can be finished is one line and exit code 130.
    """
    first, rest = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    try:
        if presets and first and not first.startswith("-"):
            if first not in presets:
                raise UserError(f"{first}: no such preset; there are {', '.join(presets)}")
            return main(tyro.cli(config, args=rest, default=presets[first]))
        note = presets and f"First word: {', '.join(presets)} (default: {next(iter(presets))}); --help after it."
        return main(tyro.cli(config, description=note))
    except (UserError, ImageError) as error:
        said, code = f"error: {error}", 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        said, code = f"error: {error}; is the disk full? What was written before is whole", 2
    except KeyboardInterrupt:
        said, code = "stopped", 130
    tqdm.write(said, file=sys.stderr)                        # on a line of its own, also when a bar is on the screen
    sys.exit(code)


@dataclass(frozen=True)
class Embedded:
    """An image inside a table. It is read again whenever it is opened: thousands of photographs fill any memory."""
    where: str
    read: Callable[[], bytes]

    def __str__(self) -> str:
        return self.where


@dataclass
class Probe:
    """One visual-search question.

    image: PIL RGB image, the path of one, a place in a table, or a function that draws it when it is first opened.
    question: text without any image placeholder.
    answer: the right answer, or the right letter when `options` is {letter: text}; a list means aliases.
    boxes: gold boxes, xyxy relative to the image (width = height = 1), one per look that the answer needs.
    source: the published row's `data_source`, or the probe kind. meta: whatever else is known (scene, ids).
    max_image_pixels: a larger image file is refused when it is opened.
    """
    image: Image.Image | str | Embedded | Callable[[], Image.Image]
    question: str
    answer: str | list[str]
    options: dict[str, str] | None = None
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    source: str = ""
    difficulty: str = ""
    meta: dict = field(default_factory=dict)
    max_image_pixels: int = MAX_IMAGE_PIXELS

    def open(self) -> Image.Image:
        """The image as upright RGB; ImageError names the file if it cannot be read."""
        if isinstance(self.image, Embedded):
            return load_image(self.image.where, self.max_image_pixels, self.image.read)
        if callable(self.image):
            self.image = self.image()
        return self.image if isinstance(self.image, Image.Image) else load_image(self.image, self.max_image_pixels)

    def prompt(self) -> str:
        """The question, with its options one per line where there are any."""
        lines = [f"{letter}. {text}" for letter, text in (self.options or {}).items()]
        return "\n".join([self.question, *lines])


# ------------------------------------------------------------------------------------------------ drawing

def _polygon(shape: str) -> list[tuple[float, float]]:
    if shape == "star":
        return [(0.5 + r * math.sin(i * math.pi / 5), 0.54 - r * math.cos(i * math.pi / 5))
                for i, r in enumerate([0.54, 0.21] * 5)]
    if shape == "cross":
        return [(.34, 0), (.66, 0), (.66, .34), (1, .34), (1, .66), (.66, .66), (.66, 1), (.34, 1), (.34, .66),
                (0, .66), (0, .34), (.34, .34)]
    if shape == "triangle":
        return [(.5, .03), (1, .95), (0, .95)]
    if shape == "heart":
        angles = [2 * math.pi * i / 40 for i in range(40)]
        return [(0.5 + 0.031 * 16 * math.sin(a) ** 3, 0.45 - 0.031 * (13 * math.cos(a) - 5 * math.cos(2 * a)
                 - 2 * math.cos(3 * a) - math.cos(4 * a))) for a in angles]
    return [(.06, .06), (.94, .06), (.94, .94), (.06, .94)]


@functools.lru_cache(maxsize=256)
def _ink(name: str, size: int) -> np.ndarray:
    """How dark a shape or glyph is, (size, size) in 0..1; drawn large and reduced, so that edges are soft."""
    big = 8 * size
    ink = Image.new("L", (big, big))
    draw = ImageDraw.Draw(ink)
    line = big // 7                                         # outlines: a filled shape has little left once corrected
    if name == "ring":
        draw.ellipse((0, 0, big - 1, big - 1), outline=255, width=line)
    elif name in SHAPES:
        corners = [(line / 2 + x * (big - line), line / 2 + y * (big - line)) for x, y in _polygon(name)]
        draw.line(corners + corners[:2], fill=255, width=line, joint="curve")
    else:
        font = ImageFont.load_default(size=big * 1.3)       # cap height is about 0.7 of the font size
        draw.text((big / 2, big / 2), name, fill=255, font=font, anchor="mm", stroke_width=big // 24)
    return np.asarray(ink.resize((size, size), Image.Resampling.LANCZOS), np.float32) / 255


@functools.lru_cache(maxsize=1024)
def _sprite(name: str, size: int, blur_pixels: float) -> Image.Image:
    """A shape or a glyph, `size` pixels high, on transparent ground, that vanishes under a blur of `blur_pixels`.

    Plain drawings do not: a matched filter reads a 2.7-pixel glyph in the overview without error (bench_probes.py).
    So the ink is corrected until, blurred, it equals the mean of all glyphs: vanishing optotypes (Howland, Ginsburg
    and Campbell 1978). The edges stay, and a crop shows them.
    """
    goal = np.mean([_ink(glyph, size) for glyph in SHAPES + LETTERS + DIGITS], axis=0)
    at = np.arange(size)
    blur = np.exp(-0.5 * ((at[:, None] - at) / blur_pixels) ** 2)
    blur /= blur.sum(1, keepdims=True)
    ink = _ink(name, size)
    for _ in range(300):
        ink = np.clip(ink + blur @ (goal - ink) @ blur.T, 0, 1)
    sprite = Image.new("RGBA", (size, size), INK)
    sprite.putalpha(Image.fromarray(np.uint8(255 * ink)))
    return sprite


def _clutter(side: int, channels: int, rng: np.random.Generator) -> np.ndarray:
    """Low-frequency noise in [-1, 1], (side, side, channels) float32: fine noise would average out when the
    picture is shrunk, this does not (three octaves of random values, the finer the weaker)."""
    noise = np.zeros((side, side, channels), np.float32)
    for octave, strength in ((3, 0.45), (9, 0.32), (27, 0.23)):
        small = rng.integers(0, 256, (octave, octave, channels), dtype=np.uint8)
        band = Image.fromarray(small[..., 0] if channels == 1 else small).resize((side, side), Image.Resampling.BICUBIC)
        noise += strength * (np.asarray(band, np.float32).reshape(noise.shape) / 127.5 - 1)
    return noise


def _background(side: int, contrast: float, photo: Image.Image | None, rng: np.random.Generator) -> Image.Image:
    """Drawn clutter, or a random part of a photograph, pulled towards dark grey so that plates stand out."""
    if photo is None:
        part = Image.fromarray(np.uint8(127.5 + 127.5 * np.clip(_clutter(side // 4, 3, rng), -1, 1)))
        part = part.resize((side, side), Image.Resampling.BICUBIC)
    else:
        share = float(rng.uniform(0.6, 1.0))
        w, h = max(1, int(photo.width * share)), max(1, int(photo.height * share))
        left, top = int(rng.integers(0, photo.width - w + 1)), int(rng.integers(0, photo.height - h + 1))
        part = ImageOps.fit(photo.crop((left, top, left + w, top + h)), (side, side), Image.Resampling.LANCZOS)
    return part.point(_levels(contrast) * 3)


@functools.cache
def _levels(contrast: float) -> list[int]:
    """For each of the 256 values of a pixel, what it is pulled to."""
    return [round(min(175, max(0, 96 + (v - 127.5) * contrast / 70))) for v in range(256)]


# ------------------------------------------------------------------------------------------------ probes

def _other(values: tuple[str, ...], not_this: str, rng: random.Random) -> str:
    return rng.choice([value for value in values if value != not_this])


def _scene(kind: str, count: int, rng: random.Random) -> tuple[str, list[dict], list[tuple], int]:
    """(question, items, checks, reads): what is painted on each of `count` plates, items[0] being the target.

    An item is {"parts": (left glyph, right glyph, color name of the bar), "answer": str}. Answers are balanced
    exactly; the other parts make the target unique, and look-alikes share one of them with it where the kind allows.
    `checks`, (part index, wanted name) pairs, tell the target from the others; `reads` is the part with the answer.
    """
    answers = list(DIGITS if kind in ("sign", "relation") else COLORS) * (count // 4)
    rng.shuffle(answers)
    shape, letter, digit = rng.choice(SHAPES), rng.choice(LETTERS), rng.choice(DIGITS)
    items = []
    for i, answer in enumerate(answers):
        target, half = i == 0, i % 2 == 0
        other_shape, color = _other(SHAPES, shape, rng), rng.choice(list(COLORS))
        if kind == "attribute":
            parts = (shape if target else other_shape, rng.choice(LETTERS), answer)
        elif kind == "sign":
            parts = (letter if target else _other(LETTERS, letter, rng), answer, color)
        elif kind == "conjunction":        # look-alikes share the shape or the digit, never both
            other_digit = _other(DIGITS, digit, rng)
            parts = (shape if target or half else other_shape, digit if target or not half else other_digit, answer)
        elif target or not half:           # relation: half of the look-alikes hold the shape, left of the digit
            parts = (answer, shape if target else other_shape, color)
        else:
            parts = (shape, answer, color)
        items.append({"parts": parts, "answer": answer})
    return {
        "attribute": (f"What color is the tag with the {shape}?", items, [(0, shape)], 2),
        "sign": (f"What number is on sign {letter}?", items, [(0, letter)], 1),
        "conjunction": (f"What color is the tag with {shape} and {digit}?", items, [(0, shape), (1, digit)], 2),
        "relation": (f"What number is left of the {shape}?", items, [(1, shape)], 0),
    }[kind]


def make_probe(kind: str, difficulty: str, seed: int, *, grid: int = 6, cell: int = 48,
               backgrounds: list[str] | None = None, candidates: int | None = None) -> Probe:
    """Draws one probe; the same arguments give the same probe everywhere (glyph edges may vary with FreeType).

    grid: the image is grid x grid cells, at most one plate in each. cell: pixels per cell side.
    backgrounds: paths of photographs to lie under the plates, one picked at random; None = drawn clutter.
    candidates: K, the number of look-alikes with the target; None = drawn from DIFFICULTIES[difficulty].
    meta: "k", "grid", "seed", "items", one {"cell": (column, row), "parts", "answer", "target"} per plate, and the
    "checks" and "reads" of _scene, which say how a plate is told from the others and where its answer is.
    Raises ValueError for an unknown kind or difficulty, or a K that does not fit.
    """
    probe = _lay_out(kind, difficulty, seed, grid, cell, backgrounds, candidates)
    probe.open()
    return probe


def _lay_out(kind: str, difficulty: str, seed: int, grid: int = 6, cell: int = 48,
             backgrounds: list[str] | None = None, candidates: int | None = None) -> Probe:
    """make_probe without the drawing, which waits until the image is opened."""
    if kind not in PROBE_KINDS or difficulty not in DIFFICULTIES:
        raise ValueError(f"no probe of kind {kind!r}, difficulty {difficulty!r}: choose from {PROBE_KINDS} and "
                         f"{tuple(DIFFICULTIES)}")
    rng = random.Random(f"{kind}/{difficulty}/{seed}/{grid}/{candidates}")   # str seeds hash alike everywhere
    count = rng.choice(DIFFICULTIES[difficulty][0]) if candidates is None else candidates
    if not 0 < count <= grid * grid or (count % 4 and count != 1):
        raise ValueError(f"{count} look-alikes: needs a multiple of 4 (or 1) that fits a {grid} x {grid} grid")
    question, items, checks, reads = _scene(kind, max(count, 4), rng)
    answer = items[0]["answer"]
    if count == 1:                       # one plate alone, the target or as often a look-alike: a perception warm-up
        items = [items[rng.choice((0, 0, 0, 1, 2, 3))]]
    for item, place in zip(items, rng.sample([(x, y) for y in range(grid) for x in range(grid)], count)):
        item["cell"], item["target"] = place, all(item["parts"][i] == name for i, name in checks)
    meta = {"k": count, "grid": grid, "seed": seed, "items": items, "checks": checks, "reads": reads}
    draw = functools.partial(_draw, meta, difficulty, cell, backgrounds, rng.getrandbits(64))
    return Probe(draw, question, answer, boxes=[cell_box(items[0]["cell"], grid)], source=kind, difficulty=difficulty,
                 meta=meta)


def _draw(meta: dict, difficulty: str, cell: int, backgrounds: list[str] | None, seed: int) -> Image.Image:
    """The picture of a scene: background, plates, uneven light over both."""
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    _, glyph, contrast = DIFFICULTIES[difficulty]
    side = meta["grid"] * cell
    photo = load_image(rng.choice(backgrounds)) if backgrounds else None
    image = _background(side, contrast, photo, noise)
    for item in meta["items"]:
        x, y = ((v + 0.5 + rng.uniform(-0.02, 0.02)) * cell for v in item["cell"])
        _draw_plate(image, item["parts"], x, y, cell, round(glyph * cell), rng.randint(205, 235))
    light = 1 + (_clutter(side // 4, 1, noise)[..., 0] - 1) * contrast / 500
    light = Image.fromarray(np.uint8(255 * np.clip(light, 0, 1))).resize((side, side), Image.Resampling.BICUBIC)
    return ImageChops.multiply(image, Image.merge("RGB", [light] * 3))


def _draw_plate(image: Image.Image, parts: tuple[str, str, str], x: float, y: float, cell: int, size: int,
                tone: int) -> None:
    """A grey plate centered on pixel (x, y): two glyphs side by side, and a bar of its color below them."""
    left, right, color = parts
    w, h, bar = 0.92 * cell, 0.62 * cell, 0.14 * cell
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((x - w / 2, y - h / 2, x + w / 2, y + h / 2), radius=0.08 * cell, fill=(tone,) * 3)
    draw.rectangle((x - w / 2 + 1, y + h / 2 - bar, x + w / 2 - 1, y + h / 2 - 1), fill=COLORS[color])
    for name, side in ((left, -1), (right, 1)):
        sprite = _sprite(name, size, cell / 16)                            # cell / 16: the blur of the overview
        center = x + side * 0.22 * cell, y - bar / 2
        image.paste(sprite, tuple(round(v - size / 2) for v in center), sprite)


def cell_box(cell: tuple[int, int], grid: int) -> tuple[float, float, float, float]:
    """The box of a cell (column, row), xyxy relative, in the two decimals in which the searcher writes it."""
    x, y = cell
    return tuple(round(v / grid, 2) for v in (x, y, x + 1, y + 1))


def cell_name(cell: tuple[int, int]) -> str:
    """Cells are named as on a chess board, seen from the top: a1 is the left of the first row."""
    return f"{chr(ord('a') + cell[0])}{cell[1] + 1}"


def probe_stream(kinds: tuple[str, ...], difficulties: tuple[str, ...], seed: int, **size) -> Iterator[Probe]:
    """Endless fresh probes, drawn when opened; the same seed gives the same stream."""
    rng = random.Random(f"stream/{seed}")
    while True:
        yield _lay_out(rng.choice(kinds), rng.choice(difficulties), rng.getrandbits(48), **size)


# ------------------------------------------------------------------------------------------------ files

SAVED = {                              # the fields of a Probe in probes.jsonl, beside "image", and their JSON types
    "question": (str,), "answer": (str, list), "options": (dict, type(None)), "boxes": (list,), "source": (str,),
    "difficulty": (str,), "meta": (dict,),
}


def sync(file: Path) -> None:
    """Waits until a file is on the disk: else a crash of the machine could leave its new name with no content."""
    with open(file, "rb+") as f:
        os.fsync(f.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, to be written inside the block; then it takes the place of `path`, whole."""
    temporary = path.with_name(f".tmp.{path.name}")              # the ending stays: some writers go by it
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


_locks: list = []                      # open files: a lock lasts as long as its process, also if that is killed


def lock(directory: Path) -> None:
    """Makes a directory ours until this process ends. UserError while another process writes there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _locks.append(open(directory / ".lock", "a"))
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}") from None
    try:
        fcntl.lockf(_locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"another process is writing to {directory}: wait for it, or give another --out") from None


def read_json(file: Path) -> dict:
    """The object in a JSON file; UserError if there is none."""
    content = _json(_text_of(file), str(file))
    if not isinstance(content, dict):
        raise UserError(f"{file}: should be an object {{...}}, not {_short(content)}")
    return content


def save_probes(probes: Iterable[Probe], directory: str | Path) -> None:
    """Writes probes.jsonl and images/ (PNG) into a new or empty directory, for load_probes to read.

    Raises UserError if the directory holds anything or cannot be written, ImageError if an image cannot be read.
    """
    directory = Path(directory)
    try:
        if directory.exists() and any(directory.iterdir()):
            raise UserError(f"{directory} is not empty: give another directory, or delete it first")
        (directory / "images").mkdir(parents=True)                  # of two processes, the second fails here
        lines = []
        for number, probe in enumerate(probes):
            name, png = f"images/{number:05d}.png", io.BytesIO()
            probe.open().save(png, "PNG")
            write_atomic(directory / name, png.getvalue())
            lines.append(json.dumps({"image": name, **{key: getattr(probe, key) for key in SAVED}}) + "\n")
        write_atomic(directory / "probes.jsonl", "".join(lines).encode())
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror or error}") from error


def load_probes(path: str | Path, limit: int | None = None, max_image_pixels: int = MAX_IMAGE_PIXELS, *,
                unanswered: bool = False) -> list[Probe]:
    """Reads a set of probes, or its first `limit` rows. The images stay on disk until they are opened.

    path: a file, or the folder that holds it; FORMATS lists the sets.
        .jsonl    ours: one object per line, with "image" (relative to the file), "question", "answer", and whichever of
                  the other fields of Probe; or test_questions.jsonl of V*
        .json     a list: VisualProbe and DeepEyes_train_4K, val.json or train.json, images named "SET/data/x.jpg",
                  where SET is the folder of the file; or MME-RealWorld
        .tsv      HR-Bench, MME-RealWorld(-Lite): a column of base64 images, read when they are opened
        .parquet  the released cold start, one file or the folder of all parts; its texts are in meta["texts"]
        a folder with one .json and one .jpg per question, or of such folders: V*, with its boxes. The right option
                  comes first there, so the order is shuffled, by id
    unanswered: also rows of a cold start that end without an answer, which is then "".
    Raises UserError, naming the file and the row (from 1), for a wrong path, a broken row, a missing or wrong field,
    an image that is missing or not under the folder of the set, and a set without rows. No row is ever left out.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: needs at least one row, or None for all of them")
    probes = []
    for where, row, folder in itertools.islice(_rows(Path(path)), limit):
        try:
            if not isinstance(row, dict):
                raise UserError(f"should be an object {{...}}, not {_short(row)}")
            probes.append(_to_probe(row, folder))
            probes[-1].max_image_pixels = max_image_pixels
            _check(probes[-1], unanswered)
        except (UserError, OSError) as error:                # the system's own: a name that is too long, no permission
            raise UserError(f"{where}: {getattr(error, 'strerror', None) or error}") from None
    if not probes:
        raise UserError(f"{path}: holds no rows")
    return probes


def _rows(path: Path) -> Iterator[tuple[str, object, Path]]:
    """(where it is, for messages; the row; the folder its images are relative to) of every row of a set."""
    files, paired = [path], []
    if path.is_dir():
        beside = {f.parent for f in [*path.glob("*.json"), *path.glob("*/*.json")] if f.with_suffix(".jpg").is_file()}
        paired = sorted(file for folder in beside for file in folder.glob("*.json"))
        single = [path / name for name in SET_FILES if (path / name).is_file()] + sorted(path.glob("*.tsv"))
        files = paired or single or sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
        if not files or (files == single and len(single) > 1):
            raise UserError(f"{path} holds {' and '.join(f.name for f in files) or 'no set of probes'}: give the path "
                            f"of one {', '.join(SET_FILES)}, .tsv or .parquet")
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file or folder; to make a set: python data.py --out DIR")
        if file.suffix not in READERS:
            raise UserError(f"{file}: cannot read this kind of file, only {', '.join(READERS)}")
        for number, row in [(1, read_json(file))] if paired else READERS[file.suffix](file):
            if paired:
                row |= {"image": f"{file.stem}.jpg", "category": file.parent.name, "question_id": file.stem}
            yield f"{file}, row {number}", row, file.parent


def _json_lines(file: Path) -> Iterator[tuple[int, object]]:
    """(line number, value) of each line that is not blank."""
    for number, line in enumerate(_text_of(file).split("\n"), 1):
        if line.strip():
            yield number, _json(line, f"{file}, row {number}")


def _json_list(file: Path) -> Iterator[tuple[int, object]]:
    """(place from 1, value) of each element of a JSON list."""
    rows = _json(_text_of(file), str(file))
    if not isinstance(rows, list):
        raise UserError(f"{file}: should be a list of rows [...], not {_short(rows)}")
    return enumerate(rows, 1)


def _cells(f, place: int = 0) -> Iterator[list[str]]:
    """The rows of a tab-separated file that is open for reading bytes, from a place on, one at a time."""
    csv.field_size_limit(1 << 30)                           # an image of 8K takes tens of megabytes
    f.seek(place)
    return csv.reader((line.decode("utf-8-sig") for line in iter(f.readline, b"")), delimiter="\t", strict=True)


def _table(file: Path) -> Iterator[tuple[int, dict]]:
    """(place from 1 below the header, {column: text}) of a table; its images stay in the file."""
    def image_at(place: int, column: int) -> bytes:
        with open(file, "rb") as f:
            return base64.b64decode(next(_cells(f, place))[column], validate=True)

    number, places = 0, {}
    with open(file, "rb") as f:
        try:
            rows = _cells(f)
            header, place = next(rows, []), f.tell()
            for number, cells in enumerate(rows, 1):
                row, where = dict(zip(header, cells)), f"{file}, row {number}"
                if len(cells) != len(header):
                    raise UserError(f"{where}: has {len(cells)} columns, the header has {len(header)}")
                if "image" in row:
                    text = row["image"]                     # if short: the index of the row that holds it (VLMEvalKit)
                    if len(text) > 64:
                        places[row.get("index")] = place, hashlib.sha256(text.encode()).hexdigest()
                    held = places.get(row.get("index") if len(text) > 64 else text)
                    if held is None:
                        raise UserError(f"{where}: the image is missing, the column holds {_short(text)}")
                    row["image"] = Embedded(where, functools.partial(image_at, held[0], header.index("image")))
                    if "cycle_category" in row:             # HR-Bench asks each question in four orders of its options
                        row["cycle_of"] = hashlib.sha256(f"{row.get('question')} {held[1]}".encode()).hexdigest()
                yield number, row
                place = f.tell()
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{file}, row {number + 1}: cannot be read ({error})") from None


def pyarrow():
    """The library for parquet, which nothing else needs. UserError if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet files need pyarrow, which is not installed: pip install pyarrow") from None
    return pyarrow


def _parquet(file: Path) -> Iterator[tuple[int, dict]]:
    """(place from 1, row) of a parquet file; of its images only the first is kept, and stays in the file."""
    def image_at(group: int, at: int) -> bytes:
        with arrow.parquet.ParquetFile(file) as table:
            image, *_ = table.read_row_group(group, ["images"])["images"][at].as_py() or [None]
        if image is None:
            raise ValueError("the row has no image")
        return image["bytes"] if isinstance(image, dict) else image

    number, arrow = 0, pyarrow()
    try:
        with arrow.parquet.ParquetFile(file) as table:
            names = [name for name in table.schema_arrow.names if name != "images"]
            if len(names) == len(table.schema_arrow.names):
                raise UserError(f'{file}: the column "images" is missing, there are {", ".join(names)}')
            for group in range(table.num_row_groups):
                for at, row in enumerate(table.read_row_group(group, names).to_pylist()):
                    number += 1
                    image = Embedded(f"{file}, row {number}", functools.partial(image_at, group, at))
                    yield number, {**row, "images": image}
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{file}, row {number + 1}: cannot be read ({_short(str(error))})") from None


READERS = {".jsonl": _json_lines, ".json": _json_list, ".tsv": _table, ".parquet": _parquet}      # file -> rows
SET_FILES = ("probes.jsonl", "trajectories.jsonl", "val.json", "train.json", "test_questions.jsonl")
FORMATS = {     # set: its keys of question, answer and image, and one more; a row is of the set it shares most with
    "ours": ("question", "answer", "image", "options"),
    "visual_probe": ("problem", "solution", "images", "data_source"),                  # and DeepEyes_train_4K
    "cold_start": ("conversations", "sample_index", "images", "image_names"),
    "vstar": ("text", "label", "image", "question_id"),
    "vstar_folders": ("question", "target_object", "bbox", "options", "question_id"),
    "hr_bench": ("question", "answer", "image", "A"),                                  # options in columns
    "mme_realworld": ("Text", "Ground truth", "Image", "Answer choices"),
    "mme_realworld_tsv": ("question", "answer", "image", "multi-choice options"),
}


def _to_probe(row: dict, folder: Path) -> Probe:
    name = max(FORMATS, key=lambda name: sum(key in row for key in FORMATS[name]))
    if name in ("ours", "cold_start", "vstar_folders"):
        return {"ours": _own_row, "cold_start": _cold_start_row, "vstar_folders": _vstar_row}[name](row, folder)
    asked, gold, shown, extra = FORMATS[name]
    question, answer, options = _field(row, asked, str), _field(row, gold, str), None
    images = _field(row, shown, list) if shown == "images" else [_field(row, shown, str, Embedded)]
    if len(images) != 1 or not isinstance(images[0], (str, Embedded)):
        raise UserError(f'"images" should be a list of one path, not {_short(images)}')
    image = images[0] if isinstance(images[0], Embedded) else _find(images[0], folder)
    meta = {key: value for key, value in row.items() if key == "question_id" or key not in (*FORMATS[name], *"ABCDEF")}
    source = _field(row, extra, str) if name == "visual_probe" else name.removesuffix("_tsv")
    if name == "vstar":                                     # a question, "(A) ..." on a line each, and an instruction
        options = dict(re.findall(r"^\(([A-Z])\) (.*)$", question, re.MULTILINE))
        question = question.split("\n(A) ")[0]
    elif name == "hr_bench":
        options = {letter: row[letter] for letter in "ABCDEF" if row.get(letter)}
    elif name != "visual_probe":
        options = _listed(_field(row, extra, str, list))
    if name != "visual_probe" and not options:
        raise UserError(f"no options are found in this row of {name}")
    if "Category" in meta:
        meta["category"] = meta.pop("Category")
    level = source.rpartition("_")[2]                       # visual_probe_hard
    return Probe(image, question, answer, options, source=source, difficulty=level if level in DIFFICULTIES else "",
                 meta=meta)


def _own_row(row: dict, folder: Path) -> Probe:
    fields = {key: _field(row, key, *types) for key, types in SAVED.items() if key in (*row, "question", "answer")}
    image = _field(row, "image", str, Embedded)
    probe = Probe(image if isinstance(image, Embedded) else _image_file(image, folder), **fields)
    probe.meta = {key: value for key, value in row.items() if key not in ("image", *SAVED)} | _tuples(probe.meta)
    probe.boxes = [_tuples(box) for box in probe.boxes]
    return probe


def _vstar_row(row: dict, folder: Path) -> Probe:
    """V* as folders: option 0 is the right one, boxes are x, y, width, height in pixels."""
    path, listed = _image_file(row["image"], folder), _field(row, "options", list)
    identity = f"{row['category']}/{row['question_id']}"
    order = random.Random(f"options/{identity}").sample(range(len(listed)), len(listed))
    options = {chr(ord("A") + i): listed[j] for i, j in enumerate(order)}
    (width, height), boxes = load_image(path).size, []
    for box in _field(row, "bbox", list):
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
            raise UserError(f"a box should be [x, y, width, height] in pixels, not {_short(box)}")
        x, y, w, h = box
        boxes.append((max(0, x / width), max(0, y / height), min(1, (x + w) / width), min(1, (y + h) / height)))
    return Probe(path, _field(row, "question", str), chr(ord("A") + order.index(0)) if order else "", options, boxes,
                 "vstar", meta={key: row[key] for key in row if key not in ("image", "question", "options", "bbox")})


def _cold_start_row(row: dict, _folder: Path) -> Probe:
    """The released cold start: a whole search in "conversations", a Python literal. Image names are not used."""
    said = _field(row, "conversations", str, list)
    said = _literal(said) if isinstance(said, str) else said
    if not isinstance(said, list) or not all(isinstance(part, dict) and isinstance(part.get("from"), str)
                                             and isinstance(part.get("value"), str) for part in said):
        raise UserError(f'"conversations" should be a list of {{"from": ..., "value": ...}}, not {_short(said)}')
    texts = [part["value"] for part in said if part["from"] == "gpt"]
    roles = [part["from"] for part in said if part["from"] != "system"]
    if not texts or roles != ["human", "gpt"] * len(texts):
        raise UserError(f"human and gpt should take turns, from human to gpt, not {_short(' '.join(roles))}")
    question = next(part["value"] for part in said if part["from"] == "human")
    return Probe(_field(row, "images", Embedded), question, final_answer(texts) or "",
                 source=str(row.get("data_source") or "cold_start"), meta={
                     "texts": texts, "images": sum(part["value"].count("<image>") for part in said),
                     **{key: row[key] for key in ("sample_index", "rollout_index") if key in row}})


def final_answer(texts: list[str]) -> str | None:
    """The answer in the last message of a search, None if there is none."""
    try:
        action = parse_action(texts[-1])
    except ActionError:
        return None
    return action.text if isinstance(action, Answer) else None


def ends(text: str) -> bool:
    """Whether a message ends a search: an answer, or no action."""
    try:
        return isinstance(parse_action(text), Answer)
    except ActionError as error:
        return error.code == "no_action"


def _literal(text: str):
    """A Python literal in a published file: read, never run."""
    try:
        return python_literal(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(f"not a list: {_short(text)} ({type(error).__name__})") from None


def _listed(options: str | list) -> dict[str, str]:
    """["(A) red", "(B) blue"], or that list as text -> {"A": "red", "B": "blue"}."""
    listed = _literal(options) if isinstance(options, str) else options
    marked = [re.match(r"\s*\(?([A-Z])[).:]\s*(.*)", text, re.DOTALL) if isinstance(text, str) else None
              for text in (listed if isinstance(listed, list) else [None])]
    if not all(marked) or len({option[1] for option in marked}) < len(marked):
        raise UserError(f"the options should be a list of (A) ..., (B) ..., not {_short(listed)}")
    return {option[1]: option[2] for option in marked}


def _find(name: str, folder: Path) -> str:
    """The image of a row. VisualProbe names it from the folder above; a set's folder may have been renamed since."""
    inside = str(Path(*Path(name).parts[1:]))
    for root, place in ((folder, name), (folder.parent, name), (folder, inside)):
        if (root / place).is_file():
            return _image_file(place, root)
    return _image_file(name, folder)


def _check(probe: Probe, unanswered: bool) -> None:
    """What holds for the probes of every format; takes the image placeholder of published rows out."""
    probe.question = probe.question.replace("<image>", "").strip()        # env.CropEnv puts the image first
    if not probe.question:
        raise UserError("the question is empty")
    answers = [probe.answer] if isinstance(probe.answer, str) else probe.answer
    options = probe.options or {}
    texts = probe.meta.get("texts", ["a search"])
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"the texts of a trajectory should be a list of text, not {_short(texts)}")
    if not answers or not all(isinstance(text, str) for text in (*answers, *options, *options.values())):
        raise UserError(f"the answer and the options should be text, not {_short([probe.answer, options])}")
    try:
        reachable = all(grade(answer, probe.answer, probe.options) for answer in answers)
    except ValueError as error:                             # not one of the options
        raise UserError(str(error)) from None
    if not reachable and not (unanswered and probe.answer == "" and "texts" in probe.meta):
        raise UserError(f"no prediction can match the answer {_short(probe.answer)}: it is empty or too long")
    for box in probe.boxes:
        numbers = isinstance(box, tuple) and len(box) == 4 and all(isinstance(v, (int, float)) for v in box)
        if not numbers or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise UserError(f"a box should be [x0, y0, x1, y1] with x0 < x1 and y0 < y1 in 0..1, not {_short(box)}")
    try:
        " ".join([probe.question, *answers, *options, *options.values(), *texts]).encode()
    except UnicodeEncodeError:
        raise UserError("the row holds half a surrogate pair, which is no character") from None


def _field(row: dict, key: str, *types: type):
    """row[key], which has to be there and of one of these types."""
    if key not in row:
        raise UserError(f'"{key}" is missing, the row has {", ".join(row) or "no keys"}')
    if not isinstance(row[key], types):
        names = {str: "text", list: "a list", dict: "an object", type(None): "null"}
        wanted = " or ".join(names[kind] for kind in types if kind in names)
        raise UserError(f'"{key}" should be {wanted}, not {_short(row[key])}')
    return row[key]


def _image_file(name: str, root: Path) -> str:
    """The path of an image under `root`: neither a row nor a link shall make us read other files. In the cache of the
    Hugging Face hub, snapshots/REVISION holds links into the blobs beside snapshots: there, the folder of both counts.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"the image {_short(name)} is not under {root}")
    if not (root / name).is_file():
        raise UserError(f"the image {root / name} is missing; is the set complete?")
    hub = [p.parent for p in root.resolve().parents if p.name == "snapshots" and (p.parent / "blobs").is_dir()]
    if not (root / name).resolve().is_relative_to(hub[0] if hub else root.resolve()):
        raise UserError(f"the image {root / name} is a link that is not under {root}: put the image itself there")
    return str(root / name)


def _tuples(value):
    """JSON has no tuples: makes each list of plain values one again, so that cells and parts are as when drawn."""
    if isinstance(value, dict):
        return {key: _tuples(part) for key, part in value.items()}
    if isinstance(value, list):
        nested = any(isinstance(part, (list, dict)) for part in value)
        return [_tuples(part) for part in value] if nested else tuple(value)
    return value


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")         # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as UTF-8 text ({error})") from None


def _json(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); is the file cut short?") from None


def _short(value) -> str:
    """A value from a file, for an error message: one line, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ------------------------------------------------------------------------------------------------ the scripted searcher

PATTERNS = ("depth_first", "trial_and_error")      # goal maintenance, slips and impatience are mixed into both


def _crop_text(thought: str, box: tuple[float, ...]) -> str:
    return f"<think>{thought}</think>{format_action(Crop(box, 0))}"


def _verdict(probe: Probe, item: dict | None) -> str:
    """What is thought over a crop: each thing wanted beside what is seen, up to the first that is missing."""
    said = []
    for index, wanted in probe.meta["checks"]:
        seen = item["parts"][index] if item else "nothing"
        said.append(f"want {wanted}: see {seen}, {'yes' if seen == wanted else 'no'}")
        if seen != wanted:
            return ", ".join(said)
    return ", ".join([*said, f"read {item['parts'][probe.meta['reads']]}"])


def search_script(probe: Probe, rng: random.Random, *, pattern: str, impatience: float = 0.0,
                  slip: float = 0.0) -> list[str]:
    """The assistant messages of one whole search through a drawn probe, in order (the scene is known).

    pattern: "depth_first" lists the plates first, region by region, and follows the list from any of them on, round
    its end to its beginning; "trial_and_error" takes them in random order. Neither returns to a plate. impatience:
    after the n-th miss it guesses with probability impatience * n. slip: chance, per plate, that an empty cell is
    taken for one more plate; a look tells ("see nothing"), and the search goes on.
    """
    grid, at = probe.meta["grid"], {item["cell"]: item for item in probe.meta["items"]}
    empty = [(x, y) for y in range(grid) for x in range(grid) if (x, y) not in at]
    slips = sum(rng.random() < slip for _ in at)
    cells = [*at, *rng.sample(empty, min(slips, len(empty)))]
    cells.sort(key=lambda cell: (cell[1] // 2, cell[0] // 2, cell[1], cell[0]))            # regions of 2 x 2
    planned = pattern == "depth_first"
    if planned:                               # starts differ, so that the rollouts of a group look at different plates
        start = rng.randrange(len(cells))
        thought = f"plates {' '.join(cell_name(cell) for cell in cells)}, next"
        cells = cells[start:] + cells[:start]
    else:
        rng.shuffle(cells)
        thought = "try"
    texts = []
    for misses, cell in enumerate(cells, 1):                   # after this look, if it is not the target
        texts.append(_crop_text(f"{thought} {cell_name(cell)}", cell_box(cell, grid)))
        item = at.get(cell)
        thought = _verdict(probe, item)
        if item is not None and item["target"]:
            return [*texts, f"<think>{thought}</think><answer>{item['answer']}</answer>"]
        if rng.random() < impatience * misses:
            guess = rng.choice(DIGITS if probe.answer in DIGITS else list(COLORS))
            return [*texts, f"<think>{thought}, guess</think><answer>{guess}</answer>"]
        thought += f", after {cell_name(cell)}" if planned else ", try"
    raise ValueError("none of the plates is the target")


def look_script(probe: Probe) -> list[str]:
    """Two messages over a picture of a single plate: a crop of all of it, and what is seen. For the warm-up."""
    item, = probe.meta["items"]
    look = _crop_text(f"try {cell_name(item['cell'])}", (0.0, 0.0, 1.0, 1.0))
    thought = _verdict(probe, item)
    if item["target"]:
        return [look, f"<think>{thought}</think><answer>{item['answer']}</answer>"]
    return [look, look.replace("<think>", f"<think>{thought}, ")]


class Unseen(CropEnv):
    """The warm-up's world: the picture is not shown with the question, so that the one crop is all there is to read."""

    def reset(self) -> list[dict]:
        system, user = super().reset()
        return [system, {**user, "content": user["content"][1:]}]


@dataclass
class Trajectory:
    """A finished conversation: the probe, the assistant messages in order, how it stopped, and its reward."""
    probe: Probe
    texts: list[str]
    stop: str
    reward: float
    pattern: str = ""
    answer: str | None = None
    crops: list[Crop] = field(default_factory=list)       # the successful ones
    errors: list[str] = field(default_factory=list)       # the code of each failed action


def _said(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def play(probes: Iterable[Probe], speak: Callable[[list], list], slots: int = 128,
         **env_options) -> Iterator[tuple[int, Trajectory]]:
    """Plays probes turn by turn, `slots` at once, and yields (number, trajectory) as they end, right or wrong.

    `speak` takes conversations (chat messages) and returns one assistant text for each; None where the conversation
    has grown too long to go on: over_context. A conversation is the same list at every turn.
    """
    waiting, live = enumerate(probes), []
    while True:
        for number, probe in itertools.islice(waiting, slots - len(live)):
            env = CropEnv(probe.open(), probe.prompt(), **env_options)
            live.append((number, env, env.reset(), Trajectory(probe, [], "", 0.0)))
        if not live:
            return
        said, going = speak([talk for _, _, talk, _ in live]), []
        if len(said) != len(live):
            raise ValueError(f"speak returned {len(said)} texts for {len(live)} conversations")
        for text, (number, env, talk, trajectory) in zip(said, live):
            message = None
            if text is None:
                env.stop = "over_context"
            else:
                trajectory.texts.append(text)
                message, _ = env.step(text)
                talk += [_said("assistant", text), message]
            if env.stop is None:
                going.append((number, env, talk, trajectory))
                continue
            trajectory.stop, trajectory.answer = env.stop, env.answer
            trajectory.crops, trajectory.errors = env.crops, env.errors
            trajectory.reward = grade(env.answer, trajectory.probe.answer, trajectory.probe.options)
            yield number, trajectory
        live = going


def collect(probes: list[Probe], speak: Callable[[list], list], **env_options) -> list[Trajectory]:
    """The trajectories of `play` in the order of the probes, all at once: filter by reward."""
    played = dict(play(probes, speak, len(probes), **env_options))
    return [played[number] for number in range(len(probes))]


def cold_start(probes: Iterator[Probe], seed: int, *, trial_share: float, impatience: tuple[float, float],
               patient_share: float, slip: float, max_turns: int, unplayed: bool = False,
               **env_options) -> Iterator[Trajectory]:
    """Endless correct trajectories of the scripted searcher (paper, section 3.2: only those that end right).

    trial_share: share of trial-and-error searches, the rest being depth-first. impatience: (lowest, highest), drawn
    log-uniformly for each search: of those that go on for long, too, some give up at every length. patient_share:
    share of searches without impatience, whatever their length: they teach what a long search looks like. unplayed:
    for a caller who plays them, and sees then whether they end right. Raises UserError for an impatience that is no
    range above 0.
    """
    low, high = impatience
    if not 0 < low <= high:
        raise UserError(f"impatience: {low} to {high} is no range above 0; a patient share of 1 is for no impatience")
    rng = random.Random(f"cold start/{seed}")
    for probe in probes:
        pattern = PATTERNS[rng.random() < trial_share]
        hurry = low * (high / low) ** rng.random() if rng.random() >= patient_share else 0.0
        script = search_script(probe, rng, pattern=pattern, impatience=hurry, slip=slip)
        if len(script) > max_turns or not script[-1].endswith(f"<answer>{probe.answer}</answer>"):
            continue                                  # known to fail: spares the drawing
        if unplayed:
            yield Trajectory(probe, script, "", 0.0, pattern)
            continue
        trajectory, = collect([probe], lambda _: [script.pop(0)], max_turns=max_turns, **env_options)
        if trajectory.reward == 1.0:
            trajectory.pattern = pattern
            yield trajectory


def describe(trajectory: Trajectory) -> str:
    """A trajectory as lines of text: the question, each message, the stop and the reward."""
    lines = [f"  | {trajectory.probe.question}  (answer: {trajectory.probe.answer})"]
    lines += [f"  | {i}. {text}" for i, text in enumerate(trajectory.texts, 1)]
    return "\n".join([*lines, f"  | stop: {trajectory.stop}  reward {trajectory.reward:.0f}"])


# ------------------------------------------------------------------------------------------------ a policy elsewhere

TEMPORARY = (408, 425, 429, 500, 502, 503, 504)            # HTTP: try again


class Refusal(UserError):
    """A server would not answer this one conversation: mostly, it is too long."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another server."""

    def redirect_request(self, *_):
        return None


@dataclass
class Endpoint:
    """A policy behind an OpenAI-compatible server (vLLM, for one): `endpoint(messages)` is its reply.

    url: up to and including /v1. key: the environment variable that holds the key, if the server needs one; it is not
    kept, logged or shown. retries: attempts in all, after pauses of `backoff` seconds, doubled each time. Raises
    Refusal for a conversation that the server does not take, UserError when it cannot be reached, refuses the key or
    the model, or fails every time.
    """
    url: str
    model: str
    key: str = "OPENAI_API_KEY"
    timeout: float = 120.0             # seconds
    retries: int = 5
    backoff: float = 1.0

    def __post_init__(self):
        try:
            parts = urllib.parse.urlsplit(self.url)
            good = parts.scheme in ("http", "https") and parts.hostname and not parts.username and not parts.password
        except ValueError:
            good = False
        if not good:
            raise UserError("a server is given as http://HOST:PORT/v1, with the key in the environment variable "
                            + self.key)

    def __call__(self, messages: list[dict], **options) -> str:
        key, problem = os.environ.get(self.key, "").strip(), ""
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{self.key}: a key is one line of ASCII text")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        body = json.dumps({"model": self.model, "messages": [_plain(m) for m in messages], **options}).encode()
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        for attempt in range(self.retries):
            time.sleep(self.backoff * 2 ** (attempt - 1) if attempt else 0)
            try:
                with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as reply:
                    choice = json.loads(reply.read(1 << 24))["choices"][0]
                if choice.get("finish_reason") == "length":             # a cut message is void, as in a rollout
                    return ""
                if isinstance(choice["message"]["content"], str):       # half a surrogate pair could not be written
                    return choice["message"]["content"].encode(errors="replace").decode()
                problem = "no text in the reply"
            except urllib.error.HTTPError as error:
                try:
                    told = error.read(4000).decode(errors="replace")
                except (OSError, http.client.HTTPException):
                    told = ""
                problem = f"HTTP {error.code}, {_short(told.replace(key, '***') if key else told)}"
                if error.code not in TEMPORARY:
                    break
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
                problem = f"{type(error).__name__}: {error}"
        refused = problem.startswith(("HTTP 400", "HTTP 413", "HTTP 422"))
        problem = problem.replace(key, "***") if key else problem
        raise (Refusal if refused else UserError)(f"{self.url}, model {self.model}: {problem}")


def _plain(message: dict) -> dict:
    """A chat message as the API takes it: images as data URLs (JPEG, quality 95: a tenth of PNG)."""
    def plain(part: dict) -> dict:
        if part["type"] == "text":
            return part
        buffer = io.BytesIO()
        part["image"].save(buffer, "JPEG", quality=95)
        url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}
    return {"role": message["role"], "content": [plain(part) for part in message["content"]]}


def speaker(endpoint: Endpoint, **options) -> Callable[[list], list]:
    """An endpoint for `play`: all conversations at once, each message ended by its action.

    UserError while it has refused everything: then it is the set-up that is wrong, not one conversation.
    """
    answered = []

    def say(talk: list) -> str | None:
        try:
            text = endpoint(talk, stop=["</grounding>", "</answer>"], **options)
            answered.append(True)
        except Refusal as error:
            if not answered:
                raise
            tqdm.write(f"refused: {error}", file=sys.stderr)
            return None
        open_tags = [tag for tag in ("grounding", "answer") if text.count(f"<{tag}>") > text.count(f"</{tag}>")]
        return text + "".join(f"</{tag}>" for tag in open_tags[:1])         # servers leave the stop string out

    def speak(talks: list) -> list:
        with ThreadPoolExecutor(len(talks)) as threads:
            return list(threads.map(say, talks))
    return speak


def endpoint_judge(endpoint: Endpoint) -> Callable[[list[str]], list[bool | None]]:
    """A judge behind a server: prompts in, yes or no out; None where it cannot be reached or says neither."""
    def ask(prompt: str) -> bool | None:
        try:
            said = endpoint([_said("user", prompt)], temperature=0, max_tokens=8)
        except UserError as error:
            tqdm.write(f"unjudged: {error}", file=sys.stderr)
            return None
        return {"yes": True, "no": False}.get(said.strip().rstrip(".").casefold())

    def judge(prompts: list[str]) -> list[bool | None]:
        with ThreadPoolExecutor(16) as threads:
            return list(threads.map(ask, prompts))
    return judge


# ------------------------------------------------------------------------------------------------ cold start in context

EXEMPLARS = Path(__file__).parent / "docs" / "exemplars.md"


def few_shot_prompt(file: Path = EXEMPLARS) -> str:
    """The system prompt, and after it the written searches of a file of "## NAME", User: and Assistant: lines."""
    shown = _text_of(file).partition("\n## ")[2]
    if not shown:
        raise UserError(f"{file}: holds no search; one begins with a line ## NAME")
    return (f"{SYSTEM_PROMPT}\nSome searches as they should go; what a view shows stands in brackets there, "
            f"you are given the image itself.\n\n## {shown}")


def patterns(trajectory: Trajectory) -> list[str]:
    """What a search looks like, by simple signs: each pattern is named at most once, none is certain.

    depth first: three looks, each inside the one before. trial and error: two looks in a row at places of the same
    image that do not overlap. goal maintenance: two thoughts, after the first, that repeat half of the long words of
    the question. self-reflection: a thought that takes something back. zooming out: a look at an earlier image after a
    look into a view. crop of a crop: a look into a view.
    """
    crops, found = trajectory.crops, []
    pairs = list(zip(crops, crops[1:]))
    chain = longest = 1
    for i, crop in enumerate(crops):                        # crops[i] made observation i + 1
        chain = chain + 1 if crop.source == i and i else 1
        longest = max(longest, chain)
    asked, *said = (set(re.findall(r"\w{4,}", text.casefold())) for text in (
        trajectory.probe.question, *trajectory.texts[1:]))
    repeated = [len(asked & words) * 2 >= len(asked) for words in said]
    apart = [a.source == b.source and (a.box[2] <= b.box[0] or b.box[2] <= a.box[0] or a.box[3] <= b.box[1]
                                       or b.box[3] <= a.box[1]) for a, b in pairs]
    signs = {"depth first": longest >= 3, "trial and error": any(apart),
             "goal maintenance": bool(asked) and sum(repeated) >= 2,
             "self-reflection": any(re.search(r"\b(wait|mistake|wrong|instead|not here|should not)\b", text, re.I)
                                    for text in trajectory.texts),
             "zooming out": any(a.source > b.source for a, b in pairs), "crop of a crop": any(c.source for c in crops)}
    return [name for name, seen in signs.items() if seen]


def load_trajectories(path: str | Path, limit: int | None = None,
                      max_image_pixels: int = MAX_IMAGE_PIXELS) -> list[Trajectory]:
    """Reads trajectories.jsonl of `gather`, or the released cold start (parquet: a file, or the folder of its parts).

    Without an answer in the last message, `stop` is "void" or "over_turn". Raises UserError as load_probes does, and
    for a set that holds questions only.
    """
    loaded = []
    for number, probe in enumerate(load_probes(path, limit, max_image_pixels, unanswered=True), 1):
        if "texts" not in probe.meta:
            raise UserError(f"{path}: row {number} holds a question and no search")
        texts = probe.meta.pop("texts")
        answer, ended = final_answer(texts), ends(texts[-1])
        loaded.append(Trajectory(probe, texts, "answer" if answer else "void" if ended else "over_turn",
                                 grade(answer, probe.answer, probe.options) if answer else 0.0, answer=answer))
    return loaded


def gather(probes: list[Probe], speak: Callable[[list], list], out: Path, about: dict, *, max_turns: int, slots: int,
           exemplars: Path = EXEMPLARS) -> dict:
    """Cold start in context (paper, section 3.2): a policy is shown a few searches, plays, and what ends right is kept.

    speak: see `play`. about: what the run depends on; a resumed run has to have the same. Everything played goes to
    out/played.jsonl at once, and a second run goes on from there. At the end: trajectories.jsonl and images/ (ours, for
    train_sft.py --data) and coldstart.parquet (the released schema). Returns the report, also in report.json.
    """
    arrow = pyarrow()                                       # better missed now than at the end
    lock(out)
    file, header = out / "played.jsonl", json.dumps({"about": about})
    lines = _text_of(file).split("\n")[:-1] if file.exists() else []            # without a line that was cut
    if lines and lines[0] != header:
        raise UserError(f"{file} was started with {_short(lines[0])}, not {_short(header)}: give another --out")
    write_atomic(file, "".join(f"{line}\n" for line in lines or [header]).encode())
    rows = [_json(line, str(file)) for line in lines[1:]]
    done = {row["row"] for row in rows}
    left = [number for number in range(len(probes)) if number not in done]
    bar = tqdm(total=len(probes), initial=len(done), desc="collect")
    with open(file, "a", encoding="utf-8") as log:
        for at, t in play((probes[n] for n in left), speak, slots, max_turns=max_turns,
                          system_prompt=few_shot_prompt(exemplars)):
            outcome = "kept" if t.reward else "wrong" if t.stop == "answer" else t.stop
            rows.append({"row": left[at], "outcome": outcome, "answer": t.answer, "texts": t.texts})
            log.write(json.dumps(rows[-1]) + "\n")
            log.flush()
            bar.update()
            bar.set_postfix(kept=sum(row["outcome"] == "kept" for row in rows))
    bar.close()
    kept = sorted((row for row in rows if row["outcome"] == "kept"), key=lambda row: row["row"])
    found = _write_trajectories(arrow, [(probes[row["row"]], row) for row in kept], out)
    report = {**about, "played": len(rows), "acceptance": len(kept) / max(1, len(rows)),
              "outcomes": dict(Counter(row["outcome"] for row in rows).most_common()),
              "turns": dict(sorted(Counter(len(row["texts"]) for row in kept).items())),
              "patterns": dict(Counter(found).most_common())}
    write_atomic(out / "report.json", json.dumps(report, indent=1).encode())
    return report


def _write_trajectories(arrow, kept: list[tuple[Probe, dict]], out: Path) -> list[str]:
    """Writes the searches that were kept in both forms; returns all patterns that were seen in them."""
    kinds = {"images": arrow.list_(arrow.struct({"bytes": arrow.binary(), "path": arrow.string()})),
             "image_names": arrow.list_(arrow.string()), "conversations": arrow.string(), "data_source": arrow.string(),
             "sample_index": arrow.int64(), "rollout_index": arrow.int64()}
    roles, lines, found = {"system": "system", "user": "human", "assistant": "gpt"}, [], []
    (out / "images").mkdir(exist_ok=True)
    with (replacing(out / "coldstart.parquet") as temporary,
          arrow.parquet.ParquetWriter(temporary, arrow.schema(kinds)) as writer):
        for probe, row in kept:
            env = CropEnv(probe.open(), probe.prompt(), max_turns=len(row["texts"]))
            talk = env.reset()
            for text in row["texts"]:
                talk += [_said("assistant", text), env.step(text)[0]]
            found += patterns(Trajectory(probe, row["texts"], "answer", 1.0, crops=env.crops))
            encoded = {}
            for i, image in enumerate(env.observations):
                image.save(buffer := io.BytesIO(), "PNG")
                encoded[f"{row['row']:06d}_{i}.png"] = buffer.getvalue()
            first = next(iter(encoded))
            write_atomic(out / "images" / first, encoded[first])
            lines.append(json.dumps({"image": f"images/{first}", **{key: getattr(probe, key) for key in SAVED},
                                     "texts": row["texts"]}, default=str) + "\n")
            said = [{"from": roles[message["role"]], "value": "\n".join(
                part.get("text", "<image>") for part in message["content"])} for message in talk[:-1]]
            values = ([{"bytes": content, "path": name} for name, content in encoded.items()], list(encoded),
                      repr(said), probe.source, row["row"], 0)
            writer.write_table(arrow.Table.from_pylist([dict(zip(kinds, values))], arrow.schema(kinds)))
    write_atomic(out / "trajectories.jsonl", "".join(lines).encode())
    return found


# ------------------------------------------------------------------------------------------------ the command

@dataclass(frozen=True)
class Config:
    out: Path | None = None            # draw probes into this new folder: probes.jsonl, images/, sheet.png
    check: Path | None = None          # or read a set, each image too, and say what is in it
    collect: Path | None = None        # or let a policy at `endpoint` search this set, shown exemplars, into `out`
    count: int | None = None           # probes to draw (default: 100), or rows of a set (default: all)
    endpoint: str = ""                 # OpenAI-compatible server, http://HOST:PORT/v1; its key in OPENAI_API_KEY
    model: str = ""                    # its name there
    max_turns: int = 12                # assistant messages per search
    max_turn_tokens: int = 1024        # tokens per message
    temperature: float = 1.0
    slots: int = 16                    # searches at once
    exemplars: Path = EXEMPLARS        # the searches that the policy is shown
    kinds: tuple[str, ...] = PROBE_KINDS
    difficulties: tuple[str, ...] = tuple(DIFFICULTIES)  # drawn evenly
    seed: int = 0
    grid: int = 6                      # cells per side of the picture
    cell: int = 48                     # pixels per cell side
    backgrounds: Path | None = None    # folder of photographs to lie under the plates; default: drawn clutter
    max_image_pixels: int = MAX_IMAGE_PIXELS  # width * height: --check refuses larger image files


def draw_sheet(probes: list[Probe], columns: int = 3, view: int = 48) -> Image.Image:
    """A contact sheet: a row per kind; each probe, gold box in white, beside its view x view overview enlarged."""
    rows = [[p for p in probes if p.source == kind][:columns] for kind in PROBE_KINDS]
    rows = [row for row in rows if row]
    side, gap = min(probes[0].open().width, 576), 12
    width, height = 2 * side + 3 * gap, side + 3 * gap                    # of one probe, its caption included
    sheet = Image.new("RGB", (gap + columns * width, gap + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        for c, probe in enumerate(row):
            x, y = gap + c * width, gap + r * height
            overview = fit_pixels(probe.open(), view * view, view * view)
            sheet.paste(probe.open().resize((side, side)), (x, y))
            sheet.paste(overview.resize((side, side), Image.Resampling.NEAREST), (x + side + gap, y))
            x0, y0, x1, y1 = (v * side for v in probe.boxes[0])
            draw.rectangle((x + x0, y + y0, x + x1 - 1, y + y1 - 1), outline="white", width=2)
            caption = f"{probe.difficulty}: {probe.question}  {probe.answer}"
            draw.text((x, y + side + 3), caption, "black", font_size=14)
    return sheet


def photos_in(folder: Path) -> list[str]:
    """The image files of a folder, by their endings, in order. UserError if there are none."""
    endings = Image.registered_extensions()
    paths = sorted(str(p) for p in folder.iterdir() if p.suffix.lower() in endings) if folder.is_dir() else []
    if not paths:
        raise UserError(f"--backgrounds: no image files in {folder}")
    return paths


def draw_set(cfg: Config) -> None:
    """Draws a set of probes into cfg.out, and prints how one of them is searched."""
    count = 100 if cfg.count is None else cfg.count
    unknown = [*(set(cfg.kinds) - set(PROBE_KINDS)), *(set(cfg.difficulties) - set(DIFFICULTIES))]
    largest = max((k for name in cfg.difficulties if name in DIFFICULTIES for k in DIFFICULTIES[name][0]), default=0)
    if unknown or not largest or not cfg.kinds:
        raise UserError(f"kinds are {', '.join(PROBE_KINDS)}; difficulties are {', '.join(DIFFICULTIES)}; "
                        f"not {', '.join(unknown) or 'none'}")
    smallest = math.isqrt(largest - 1) + 1
    if not smallest <= cfg.grid <= 26 or cfg.cell < 16 or count < 1:          # 26: columns are named a to z
        raise UserError(f"needs a grid of {smallest} to 26 cells ({largest} plates), cells of 16 pixels or more, "
                        "and a count of 1 or more")
    photos = photos_in(cfg.backgrounds) if cfg.backgrounds else None
    stream = probe_stream(cfg.kinds, cfg.difficulties, cfg.seed, grid=cfg.grid, cell=cfg.cell, backgrounds=photos)
    shown: list[Probe] = []                               # only these stay in memory

    def drawn() -> Iterator[Probe]:
        for probe in tqdm(itertools.islice(stream, count), total=count, desc="probes"):
            if sum(p.source == probe.source for p in shown) < 3:
                shown.append(probe)
            yield probe

    save_probes(drawn(), cfg.out)
    png = io.BytesIO()
    draw_sheet(shown).save(png, "PNG")
    write_atomic(cfg.out / "sheet.png", png.getvalue())
    example = min(shown, key=lambda probe: probe.meta["k"])
    script = search_script(example, random.Random(cfg.seed), pattern="trial_and_error")
    print(describe(*collect([example], lambda _: [script.pop(0)], max_turns=len(script))))
    print(f"{count} probes in {cfg.out}; look at {cfg.out / 'sheet.png'}")


def check_set(path: Path, limit: int | None, max_image_pixels: int) -> None:
    """Prints what load_probes makes of a set, and opens every image."""
    probes = load_probes(path, limit, max_image_pixels, unanswered=True)
    images = (probe.open().size for probe in tqdm(probes, desc="images"))
    sizes = dict(enumerate(images))                                   # width, height
    sides = [math.sqrt((x1 - x0) * w * (y1 - y0) * h) for probe, (w, h) in zip(probes, sizes.values())
             for x0, y0, x1, y1 in probe.boxes]
    searches = [probe.meta["texts"] for probe in probes if "texts" in probe.meta]
    counts = {
        "sources": Counter(p.source for p in probes), "difficulties": Counter(p.difficulty for p in probes),
        "categories": Counter(str(p.meta.get("category", "")) for p in probes),
        "options": Counter(len(p.options or ()) for p in probes), "answers": Counter(str(p.answer) for p in probes),
        "image sizes": Counter(f"{w} x {h}" for w, h in sizes.values()),
        "turns": Counter(len(texts) for texts in searches)}
    print(f"{path}: {len(probes)} rows")
    for name, counter in counts.items():
        most = ", ".join(f"{value or '(none)'} {count}" for value, count in counter.most_common(10))
        if set(counter) - {""}:
            print(f"{name:14s}{most}{f', and {len(counter) - 10} more' if len(counter) > 10 else ''}")
    if sides:
        sides.sort()
        print(f"{'target sizes':14s}{sides[0]:.0f} to {sides[-1]:.0f} pixels, median {sides[len(sides) // 2]:.0f} "
              f"({len(sides)} boxes, side of the square of the same area)")
    if searches:
        print(f"{'no answer':14s}{sum(final_answer(texts) is None for texts in searches)} rows, in their last turn")
    print(f"{'example':14s}{probes[0].image}\n  | {probes[0].prompt()}  (answer: {probes[0].answer})")


def collect_set(cfg: Config) -> None:
    """Cold start in context: see gather."""
    if not (cfg.out and cfg.endpoint and cfg.model):
        raise UserError("--collect PROBES needs --endpoint URL, --model NAME and --out DIR")
    if cfg.max_turns < 1 or cfg.slots < 1:
        raise UserError("--max_turns and --slots start at 1")
    probes = load_probes(cfg.collect, cfg.count, cfg.max_image_pixels)
    speak = speaker(Endpoint(cfg.endpoint, cfg.model), temperature=cfg.temperature, max_tokens=cfg.max_turn_tokens)
    about = {"probes": str(cfg.collect), "rows": len(probes), "model": cfg.model, "max_turns": cfg.max_turns,
             "temperature": cfg.temperature, "exemplars": str(cfg.exemplars)}
    report = gather(probes, speak, cfg.out, about, max_turns=cfg.max_turns, slots=cfg.slots, exemplars=cfg.exemplars)
    for name, value in report.items():
        shown = ", ".join(f"{key}: {count}" for key, count in value.items()) if isinstance(value, dict) else value
        print(f"{name:14s}{shown}")
    print(f"saved in {cfg.out}; next: python train_sft.py --data {cfg.out}")


def main(cfg: Config) -> None:
    if bool(cfg.out) + bool(cfg.check) != 1 or (cfg.collect and cfg.check):
        raise UserError("give either --out DIR, to draw probes, or --check PATH, to look at a set, or --collect PATH "
                        "with --out DIR")
    if cfg.check:
        check_set(cfg.check, cfg.count, cfg.max_image_pixels)
    else:
        collect_set(cfg) if cfg.collect else draw_set(cfg)


if __name__ == "__main__":
    command(main, Config)
