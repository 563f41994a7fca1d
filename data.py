"""Probes that force a search, and the scripted searcher that shows how to search.

A probe is one image, one question, one right answer. K plates lie scattered over a cluttered picture. From
afar they all look alike, and only a crop shows what is painted on one. The question names one plate by what
is painted on it and asks for something else on it, so the K plates must be tried one by one: (K + 1) / 2
looks on average. K is the difficulty dial. The K answers are exactly balanced (K is a multiple of the four
possible answers), so knowing the colors of all plates, but not which is which, is worth nothing: chance is
25 %.

    kind         on a plate             question                                 answer
    attribute    a shape, a letter      What color is the tag with the star?     red, green, blue, yellow
    sign         a letter, a digit      What number is on sign K?                2, 4, 7, 9
    conjunction  a shape, a digit       What color is the tag with star and 7?   a color
    relation     a digit and a shape    What number is left of the star?         a digit

The scripted searcher knows the scene. It plays the cold-start searches: depth-first or trial-and-error, the
goal restated at every look, slips that it notices, and an impatience that grows with every miss. Only
searches that end right are kept (paper, section 3.2).

Published sets become our one format, probes.jsonl, through the scripts in prepare/.

    $ python data.py --out probes --count 100                 # draws probes: probes.jsonl, images/, sheet.png
    $ python data.py --out probes --backgrounds ~/photos      # the same, on your own photographs

Read next: model.py.
"""

import functools
import io
import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common import UserError, cli, write_atomic, write_lines

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from env import Crop, CropEnv, fit_pixels, format_action, grade, load_image

PROBE_KINDS = ("attribute", "sign", "conjunction", "relation")
DIFFICULTIES = {  # numbers of look-alikes K, height of a glyph in cells, contrast of the background
    "easy": ((4,), 0.42, 20),
    "medium": ((8,), 0.42, 40),
    "hard": ((12, 16, 20, 24), 0.42, 60),
}
COLORS = {"red": (214, 40, 40), "green": (30, 150, 60), "blue": (40, 80, 220), "yellow": (236, 190, 20)}
SHAPES = ("star", "ring", "cross", "triangle", "square", "heart")
LETTERS = ("A", "C", "H", "K", "T", "X")
DIGITS = ("2", "4", "7", "9")
INK = (30, 30, 36)  # letters and digits


@dataclass
class Probe:
    """One visual-search question.

    image: a PIL image or the path of one. question: text without any image placeholder. answer: the right
    answer, or the right letter when `options` is {letter: text}; a list means aliases
    (an empty one: not known). boxes: gold boxes,
    xyxy relative to the image (width = height = 1), one per look that the answer needs. source: the name of
    the set, or the probe kind. meta: whatever else is known. For a drawn probe that is the scene (see
    make_scene); for a row of a cold start, "texts" holds the assistant messages of the search.
    """

    image: Image.Image | str | Path
    question: str
    answer: str | list[str]
    options: dict[str, str] | None = None
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    source: str = ""
    difficulty: str = ""
    meta: dict = field(default_factory=dict)

    def open(self) -> Image.Image:
        """The image as upright RGB. ImageError names the file if it cannot be read."""
        return self.image if isinstance(self.image, Image.Image) else load_image(self.image)

    def prompt(self) -> str:
        """The question, with its options one per line where there are any."""
        lines = [f"{letter}. {text}" for letter, text in (self.options or {}).items()]
        return "\n".join([self.question, *lines])


# ---------------------------------------------------------------------------------------------- drawing


def _polygon(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape in the unit square."""
    if shape == "star":
        spokes = [(i * math.pi / 5, radius) for i, radius in enumerate([0.54, 0.21] * 5)]
        return [(0.5 + r * math.sin(angle), 0.54 - r * math.cos(angle)) for angle, r in spokes]
    if shape == "cross":
        a, b = 0.34, 0.66
        return [
            (a, 0),
            (b, 0),
            (b, a),
            (1, a),
            (1, b),
            (b, b),
            (b, 1),
            (a, 1),
            (a, b),
            (0, b),
            (0, a),
            (a, a),
        ]
    if shape == "triangle":
        return [(0.5, 0.03), (1, 0.95), (0, 0.95)]
    if shape == "heart":
        angles = [2 * math.pi * i / 40 for i in range(40)]
        wave = [
            13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles
        ]
        return [(0.5 + 0.031 * 16 * math.sin(a) ** 3, 0.45 - 0.031 * w) for a, w in zip(angles, wave)]
    return [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)]


@functools.lru_cache(maxsize=256)
def _ink(name: str, size: int) -> np.ndarray:
    """How dark a shape or glyph is, (size, size) in 0..1; drawn large and reduced, so that edges are soft."""
    big = 8 * size
    ink = Image.new("L", (big, big))
    draw = ImageDraw.Draw(ink)
    line = big // 7  # outlines: the correction below would erase a filled shape
    if name == "ring":
        draw.ellipse((0, 0, big - 1, big - 1), outline=255, width=line)
    elif name in SHAPES:
        corners = [(line / 2 + x * (big - line), line / 2 + y * (big - line)) for x, y in _polygon(name)]
        draw.line(corners + corners[:2], fill=255, width=line, joint="curve")
    else:
        font = ImageFont.load_default(size=big * 1.3)  # cap height is about 0.7 of the font size
        draw.text((big / 2, big / 2), name, fill=255, font=font, anchor="mm", stroke_width=big // 24)
    return np.asarray(ink.resize((size, size), Image.Resampling.LANCZOS), np.float32) / 255


@functools.lru_cache(maxsize=1024)
def _sprite(name: str, size: int, blur_pixels: float) -> Image.Image:
    """A shape or glyph, `size` pixels high, on transparent ground. It vanishes under a blur of `blur_pixels`.

    Plain drawings do not vanish: a matched filter reads a 2.7-pixel glyph in the overview without error
    (bench/bench_probes.py). So the ink is corrected until, blurred, it equals the mean of all glyphs:
    vanishing optotypes (Howland, Ginsburg and Campbell 1978). The edges stay, and a crop shows them.
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
    """Low-frequency noise in [-1, 1], (side, side, channels) float32, in three octaves.

    Finer noise would average out when the picture is shrunk to the overview; this does not.
    """
    noise = np.zeros((side, side, channels), np.float32)
    for octave, strength in ((3, 0.45), (9, 0.32), (27, 0.23)):
        small = rng.integers(0, 256, (octave, octave, channels), dtype=np.uint8)
        band = Image.fromarray(small[..., 0] if channels == 1 else small)
        band = band.resize((side, side), Image.Resampling.BICUBIC)
        noise += strength * (np.asarray(band, np.float32).reshape(noise.shape) / 127.5 - 1)
    return noise


def _background(
    side: int, contrast: float, photo: Image.Image | None, rng: np.random.Generator
) -> Image.Image:
    """Drawn clutter, or a random part of a photograph, pulled towards dark grey so that plates stand out."""
    if photo is None:
        part = Image.fromarray(np.uint8(127.5 + 127.5 * np.clip(_clutter(side // 4, 3, rng), -1, 1)))
        part = part.resize((side, side), Image.Resampling.BICUBIC)
    else:
        share = float(rng.uniform(0.6, 1.0))
        w, h = max(1, int(photo.width * share)), max(1, int(photo.height * share))
        left, top = int(rng.integers(0, photo.width - w + 1)), int(rng.integers(0, photo.height - h + 1))
        part = ImageOps.fit(
            photo.crop((left, top, left + w, top + h)), (side, side), Image.Resampling.LANCZOS
        )
    return part.point(_levels(contrast) * 3)


@functools.cache
def _levels(contrast: float) -> list[int]:
    """For each of the 256 values of a pixel, what it is pulled to."""
    return [round(min(175, max(0, 96 + (v - 127.5) * contrast / 70))) for v in range(256)]


def _draw_plate(
    image: Image.Image, parts: tuple[str, str, str], x: float, y: float, cell: int, size: int, tone: int
) -> None:
    """A grey plate centered on pixel (x, y): two glyphs side by side, and a bar of its color below them."""
    left, right, color = parts
    w, h, bar = 0.92 * cell, 0.62 * cell, 0.14 * cell
    draw = ImageDraw.Draw(image)
    edges = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    draw.rounded_rectangle(edges, radius=0.08 * cell, fill=(tone,) * 3)
    draw.rectangle((x - w / 2 + 1, y + h / 2 - bar, x + w / 2 - 1, y + h / 2 - 1), fill=COLORS[color])
    for name, side in ((left, -1), (right, 1)):
        sprite = _sprite(name, size, cell / 16)  # cell / 16: the blur of the overview
        center = x + side * 0.22 * cell, y - bar / 2
        image.paste(sprite, tuple(round(v - size / 2) for v in center), sprite)


def draw_scene(probe: Probe, backgrounds: list[str] | None = None) -> Image.Image:
    """The picture of a scene: background, plates, uneven light over both."""
    meta = probe.meta
    rng, noise = random.Random(meta["draw_seed"]), np.random.default_rng(meta["draw_seed"])
    _, glyph, contrast = DIFFICULTIES[probe.difficulty]
    cell, side = meta["cell"], meta["grid"] * meta["cell"]
    photo = load_image(rng.choice(backgrounds)) if backgrounds else None
    image = _background(side, contrast, photo, noise)
    for item in meta["items"]:
        x, y = ((v + 0.5 + rng.uniform(-0.02, 0.02)) * cell for v in item["cell"])
        _draw_plate(image, item["parts"], x, y, cell, round(glyph * cell), rng.randint(205, 235))
    light = 1 + (_clutter(side // 4, 1, noise)[..., 0] - 1) * contrast / 500
    light = Image.fromarray(np.uint8(255 * np.clip(light, 0, 1)))
    light = light.resize((side, side), Image.Resampling.BICUBIC)
    return ImageChops.multiply(image, Image.merge("RGB", [light] * 3))


# ---------------------------------------------------------------------------------------------- probes


def _other(values: tuple[str, ...], not_this: str, rng: random.Random) -> str:
    return rng.choice([value for value in values if value != not_this])


def _paint_plates(kind: str, count: int, rng: random.Random) -> tuple[str, list[dict], list[tuple], int]:
    """(question, items, checks, reads): what is painted on each of `count` plates, items[0] being the target.

    An item is {"parts": (left glyph, right glyph, color of the bar), "answer": str}. Answers are balanced
    exactly. The other parts make the target unique; look-alikes share one of them with it where the kind
    allows. checks: (part index, wanted name) pairs that tell the target from the others. reads: the part
    with the answer.
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
        elif kind == "conjunction":  # look-alikes share the shape or the digit, never both
            other_digit = _other(DIGITS, digit, rng)
            left, right = (shape, digit) if target else (shape, other_digit) if half else (other_shape, digit)
            parts = (left, right, answer)
        elif target or not half:  # relation: half of the look-alikes hold the shape, left of the digit
            parts = (answer, shape if target else other_shape, color)
        else:
            parts = (shape, answer, color)
        items.append({"parts": parts, "answer": answer})
    return {
        "attribute": (f"What color is the tag with the {shape}?", items, [(0, shape)], 2),
        "sign": (f"What number is on sign {letter}?", items, [(0, letter)], 1),
        "conjunction": (
            f"What color is the tag with {shape} and {digit}?",
            items,
            [(0, shape), (1, digit)],
            2,
        ),
        "relation": (f"What number is left of the {shape}?", items, [(1, shape)], 0),
    }[kind]


def make_scene(
    kind: str, difficulty: str, seed: int, *, grid: int = 6, cell: int = 48, candidates: int | None = None
) -> Probe:
    """A probe whose image is still to be drawn (draw_scene): cheap, for those who may not need the picture.

    meta: "k", "grid", "cell", "seed", "draw_seed"; "items", one {"cell": (column, row), "parts", "answer",
    "target"} per plate; "checks" and "reads" say how the target is told from the others and where its
    answer is.
    """
    if kind not in PROBE_KINDS or difficulty not in DIFFICULTIES:
        choices = f"{', '.join(PROBE_KINDS)}; {', '.join(DIFFICULTIES)}"
        raise ValueError(f"no probe of kind {kind!r}, difficulty {difficulty!r}: choose from {choices}")
    rng = random.Random(f"{kind}/{difficulty}/{seed}/{grid}/{candidates}")  # str seeds hash alike everywhere
    count = rng.choice(DIFFICULTIES[difficulty][0]) if candidates is None else candidates
    if not 0 < count <= grid * grid or (count % 4 and count != 1):
        raise ValueError(
            f"{count} look-alikes: needs a multiple of 4 (or 1) that fits a {grid} x {grid} grid"
        )
    question, items, checks, reads = _paint_plates(kind, max(count, 4), rng)
    answer = items[0]["answer"]
    if count == 1:  # one plate alone, as often the target as a look-alike: for the warm-up
        items = [items[rng.choice((0, 0, 0, 1, 2, 3))]]
    cells = rng.sample([(x, y) for y in range(grid) for x in range(grid)], count)
    for item, place in zip(items, cells):
        item["cell"], item["target"] = place, all(item["parts"][i] == name for i, name in checks)
    meta = {"k": count, "grid": grid, "cell": cell, "seed": seed, "draw_seed": rng.getrandbits(64)}
    meta |= {"items": items, "checks": checks, "reads": reads}
    boxes = [cell_box(items[0]["cell"], grid)]
    return Probe(None, question, answer, boxes=boxes, source=kind, difficulty=difficulty, meta=meta)


def make_probe(
    kind: str, difficulty: str, seed: int, *, backgrounds: list[str] | None = None, **size
) -> Probe:
    """Draws one probe. The same arguments give the same probe everywhere (glyph edges vary with FreeType).

    backgrounds: paths of photographs, one of which lies under the plates; None = drawn clutter.
    size: grid (the image is grid x grid cells, at most one plate in each), cell (pixels per side of a cell),
    candidates (K, the number of plates; None = drawn from DIFFICULTIES[difficulty]).
    Raises ValueError for an unknown kind or difficulty, or a K that does not fit.
    """
    probe = make_scene(kind, difficulty, seed, **size)
    probe.image = draw_scene(probe, backgrounds)
    return probe


def probe_stream(
    kinds: tuple[str, ...], difficulties: tuple[str, ...], seed: int, make=make_probe, **options
) -> Iterator[Probe]:
    """Endless fresh probes; the same seed gives the same stream. make: make_probe or make_scene."""
    rng = random.Random(f"stream/{seed}")
    while True:
        yield make(rng.choice(kinds), rng.choice(difficulties), rng.getrandbits(48), **options)


def cell_box(cell: tuple[int, int], grid: int) -> tuple[float, float, float, float]:
    """The box of a cell (column, row), xyxy relative, in the two decimals in which the searcher writes it."""
    x, y = cell
    return tuple(round(v / grid, 2) for v in (x, y, x + 1, y + 1))


def cell_name(cell: tuple[int, int]) -> str:
    """Cells are named as on a chess board, seen from the top: a1 is the left of the first row."""
    return f"{chr(ord('a') + cell[0])}{cell[1] + 1}"


# ---------------------------------------------------------------------------------------------- files


def save_probes(probes: Iterable[Probe], directory: str | Path) -> None:
    """Writes probes.jsonl, for load_probes to read. An image that is a file already is named, not copied.

    UserError if the directory holds a set already.
    """
    directory = Path(directory)
    if (directory / "probes.jsonl").exists():
        raise UserError(f"{directory} holds a set of probes already: give another --out")
    rows = []
    for number, probe in enumerate(probes):
        if not isinstance(probe.image, Image.Image):
            name = str(Path(probe.image).absolute())
        else:
            name, png = f"images/{number:05d}.png", io.BytesIO()
            probe.image.save(png, "PNG")
            (directory / "images").mkdir(parents=True, exist_ok=True)
            write_atomic(directory / name, png.getvalue())
        rows.append({**vars(probe), "image": name})
    directory.mkdir(parents=True, exist_ok=True)
    write_lines(directory / "probes.jsonl", rows)


def load_probes(path: str | Path, limit: int | None = None) -> list[Probe]:
    """Reads a set of probes: a .jsonl file, or the folder that holds probes.jsonl. Images stay on disk.

    A row is one object with "image" (a path, relative to the file or absolute), "question", "answer", and
    whichever of the other fields of Probe. Further keys go to `meta`. limit: read only so many rows.
    UserError names the file and the row of what is wrong. No row is left out.
    """
    file = Path(path)
    file = file / "probes.jsonl" if file.is_dir() else file
    if not file.is_file():
        raise UserError(
            f"{file}: no such set of probes; to make one: python data.py --out DIR, or see prepare/"
        )
    probes = []
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(itertools.islice(lines, limit), 1):
            try:
                probes.append(_read_row(json.loads(line), file.parent))
            except ValueError as error:  # broken JSON, an answer that is no option, and the checks below
                raise UserError(f"{file}, row {number}: {error}") from None
    if not probes:
        raise UserError(f"{file}: holds no rows")
    return probes


def _read_row(row: dict, folder: Path) -> Probe:
    """One row of probes.jsonl as a Probe. ValueError says what is wrong with it."""
    wanted = {"image": str, "question": str, "answer": (str, list), "boxes": list, "meta": dict}
    if not isinstance(row, dict):
        raise ValueError(f"should be an object {{...}}, not {row!r:.80}")
    row = {"boxes": [], "meta": {}, "options": None, **row}
    for key, kind in wanted.items():
        if not isinstance(row.get(key), kind):
            raise ValueError(f'"{key}" is missing or of the wrong type: {row.get(key)!r:.80}')
    options = row["options"]
    texts = [row["question"], *([row["answer"]] if isinstance(row["answer"], str) else row["answer"])]
    if not (options is None or isinstance(options, dict)):
        raise ValueError(f'"options" should be {{letter: text}} or null, not {options!r:.80}')
    if not all(isinstance(text, str) and text.strip() for text in [*texts, *(options or {}).values()]):
        raise ValueError("the question, the answers and the options should be text, and not empty")
    "".join(texts).encode()  # UnicodeEncodeError, a ValueError: half a surrogate pair
    for box in row["boxes"]:
        numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(v, (int, float)) for v in box)
        if not numbers or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise ValueError(f"a box should be [x0, y0, x1, y1], relative to the image, not {box!r:.80}")
    if not all(grade(answer, row["answer"], options) for answer in texts[1:]):
        raise ValueError(f"no prediction can match the answer {row['answer']!r:.80}")
    image = folder / row["image"]
    if not image.is_file():
        raise ValueError(f"the image {image} is missing; is the set complete?")
    known = {key: row.pop(key) for key in list(row) if key in Probe.__dataclass_fields__}
    known |= {"image": str(image), "boxes": [tuple(box) for box in known["boxes"]]}
    return Probe(**known | {"meta": row | known["meta"]})


# --------------------------------------------------------------------------------- the scripted searcher


def _crop_text(thought: str, box: tuple[float, ...]) -> str:
    return f"<think>{thought}</think>{format_action(Crop(box, 0))}"


def _compare(probe: Probe, item: dict | None) -> str:
    """The thought over a crop: each thing wanted beside what is seen, up to the first that is missing."""
    thoughts = []
    for index, wanted in probe.meta["checks"]:
        seen = item["parts"][index] if item else "nothing"
        thoughts.append(f"want {wanted}: see {seen}, {'yes' if seen == wanted else 'no'}")
        if seen != wanted:
            return ", ".join(thoughts)
    return ", ".join([*thoughts, f"read {item['parts'][probe.meta['reads']]}"])


def write_search(
    probe: Probe, rng: random.Random, *, pattern: str, impatience: float = 0.0, slip: float = 0.0
) -> list[str]:
    """The assistant messages of one whole search through a drawn probe, in order (the scene is known).

    pattern: "depth_first" lists the plates first, region by region, and follows the list from a random
    plate on, round its end to its beginning; "trial_and_error" takes them in random order. Neither returns
    to a plate. impatience: after the n-th miss it guesses with probability impatience * n. slip: chance,
    per plate, that an empty cell is taken for one more plate; a look tells ("see nothing"), and the search
    goes on.
    """
    grid, at = probe.meta["grid"], {item["cell"]: item for item in probe.meta["items"]}
    empty = [(x, y) for y in range(grid) for x in range(grid) if (x, y) not in at]
    slips = sum(rng.random() < slip for _ in at)
    cells = [*at, *rng.sample(empty, min(slips, len(empty)))]
    cells.sort(key=lambda cell: (cell[1] // 2, cell[0] // 2, cell[1], cell[0]))  # regions of 2 x 2
    planned = pattern == "depth_first"
    if planned:  # starts differ, so that the rollouts of a group look at different plates
        start = rng.randrange(len(cells))
        thought = f"plates {' '.join(cell_name(cell) for cell in cells)}, next"
        cells = cells[start:] + cells[:start]
    else:
        rng.shuffle(cells)
        thought = "try"
    texts = []
    for misses, cell in enumerate(cells, 1):  # after this look, if it is not the target
        texts.append(_crop_text(f"{thought} {cell_name(cell)}", cell_box(cell, grid)))
        item = at.get(cell)
        thought = _compare(probe, item)
        if item is not None and item["target"]:
            return [*texts, f"<think>{thought}</think><answer>{item['answer']}</answer>"]
        if rng.random() < impatience * misses:
            guess = rng.choice(DIGITS if probe.answer in DIGITS else list(COLORS))
            return [*texts, f"<think>{thought}, guess</think><answer>{guess}</answer>"]
        thought += f", after {cell_name(cell)}" if planned else ", try"
    raise ValueError("none of the plates is the target")


def write_look(probe: Probe) -> list[str]:
    """Warm-up: two messages over a picture of a single plate, a crop of all of it and what is seen."""
    (item,) = probe.meta["items"]
    look = _crop_text(f"try {cell_name(item['cell'])}", (0.0, 0.0, 1.0, 1.0))
    thought = _compare(probe, item)
    if item["target"]:
        return [look, f"<think>{thought}</think><answer>{item['answer']}</answer>"]
    return [look, look.replace("<think>", f"<think>{thought}, ")]


class WarmUpEnv(CropEnv):
    """Hides the first view, so the answer can only be read from the crop."""

    def reset(self) -> list[dict]:
        system, user = super().reset()
        return [system, {**user, "content": user["content"][1:]}]


def cold_start(
    scenes: Iterator[Probe],
    seed: int,
    *,
    trial_share: float,
    impatience: tuple[float, float],
    patient_share: float,
    slip: float,
    max_turns: int,
) -> Iterator[tuple[Probe, list[str]]]:
    """Endless (probe, messages) of searches that end right within max_turns (paper, section 3.2).

    scenes: of make_scene; only those of kept searches are drawn. trial_share: share of trial-and-error
    searches, the rest are depth-first. impatience: (lowest, highest), drawn log-uniformly for each search,
    so that some give up at every length. patient_share: share of searches that never guess: they teach what
    a long search looks like. UserError for an impatience that is no range above 0.
    """
    low, high = impatience
    if not 0 < low <= high or max_turns < 2:
        raise UserError(f"needs 0 < --impatience {low} <= {high}, and --max_turns {max_turns} of 2 or more")
    rng = random.Random(f"cold start/{seed}")
    for probe in scenes:
        pattern = "trial_and_error" if rng.random() < trial_share else "depth_first"
        hurry = low * (high / low) ** rng.random() if rng.random() >= patient_share else 0.0
        texts = write_search(probe, rng, pattern=pattern, impatience=hurry, slip=slip)
        if len(texts) <= max_turns and texts[-1].endswith(f"<answer>{probe.answer}</answer>"):
            probe.image = draw_scene(probe)
            yield probe, texts


# ---------------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class Config:
    out: Path  # a new folder: probes.jsonl, images/, sheet.png
    count: int = 100  # probes to draw
    kinds: tuple[str, ...] = PROBE_KINDS
    difficulties: tuple[str, ...] = tuple(DIFFICULTIES)  # drawn evenly
    seed: int = 0
    grid: int = 6  # cells per side of the picture
    cell: int = 48  # pixels per side of a cell
    backgrounds: Path | None = None  # folder of photographs to lie under the plates; default: drawn clutter


def draw_sheet(probes: list[Probe], columns: int = 3, view: int = 48) -> Image.Image:
    """A contact sheet, a row per kind: each probe, gold box in white, beside its view x view overview."""
    rows = [[p for p in probes if p.source == kind][:columns] for kind in PROBE_KINDS]
    rows = [row for row in rows if row]
    side, gap = min(probes[0].image.width, 576), 12
    width, height = 2 * side + 3 * gap, side + 3 * gap  # of one probe, its caption included
    sheet = Image.new("RGB", (gap + columns * width, gap + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for (r, row), c in itertools.product(enumerate(rows), range(columns)):
        if c < len(row):
            probe, x, y = row[c], gap + c * width, gap + r * height
            overview = fit_pixels(probe.image, view * view, view * view)
            sheet.paste(probe.image.resize((side, side)), (x, y))
            sheet.paste(overview.resize((side, side), Image.Resampling.NEAREST), (x + side + gap, y))
            x0, y0, x1, y1 = (v * side for v in probe.boxes[0])
            draw.rectangle((x + x0, y + y0, x + x1 - 1, y + y1 - 1), outline="white", width=2)
            caption = f"{probe.difficulty}: {probe.question}  {probe.answer}"
            draw.text((x, y + side + 3), caption, "black", font_size=14)
    return sheet


def list_photos(folder: Path) -> list[str]:
    """The image files of a folder, by their endings, in order. UserError if there are none."""
    endings = Image.registered_extensions()
    paths = sorted(str(p) for p in folder.iterdir() if p.suffix.lower() in endings) if folder.is_dir() else []
    if not paths:
        raise UserError(f"--backgrounds: no image files in {folder}")
    return paths


def main(cfg: Config) -> None:
    photos = list_photos(cfg.backgrounds) if cfg.backgrounds else None
    if cfg.count < 1 or cfg.cell < 16 or cfg.grid > 26:  # 26: columns are named a to z
        raise UserError("--count starts at 1, --cell at 16, and --grid ends at 26")
    options = {"grid": cfg.grid, "cell": cfg.cell, "backgrounds": photos}
    stream = probe_stream(cfg.kinds, cfg.difficulties, cfg.seed, **options)
    try:
        probes = [next(stream) for _ in tqdm(range(cfg.count), desc="probes")]
    except ValueError as error:  # an unknown kind, or plates that do not fit
        raise UserError(str(error)) from None
    save_probes(probes, cfg.out)
    png = io.BytesIO()
    draw_sheet(probes).save(png, "PNG")
    write_atomic(cfg.out / "sheet.png", png.getvalue())
    example = min(probes, key=lambda probe: probe.meta["k"])
    print(f"{example.question}  (answer: {example.answer})")
    for text in write_search(example, random.Random(cfg.seed), pattern="trial_and_error"):
        print(f"  {text}")
    print(f"{cfg.count} probes in {cfg.out}; look at {cfg.out / 'sheet.png'}")


if __name__ == "__main__":
    cli(main, Config)
