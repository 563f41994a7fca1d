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

With `regions` above 1 a picture has two levels: some of its regions hold a board with plates. The first view
shows where boards are, a crop of a region shows its plates, and only a crop of that crop shows what is on
one. The default training does not learn that world well yet: see docs/log.md.

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
import os
import random
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from common import UserError, cli, replacing, write_atomic, write_lines

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from env import Box, Crop, CropEnv, fit_pixels, format_action, grade, load_image, source_name

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
INK = (30, 30, 36)  # shapes, letters and digits
BOARD = (190, 90, 210)  # what the plates of a region lie on; no background is so bright


@dataclass
class Probe:
    """One visual-search question.

    image: a PIL image or the path of one; None for a scene, which is drawn when it is opened. question: text
    without any image placeholder. answer: the right answer, or the right letter when `options` is {letter:
    text}; a list means aliases (an empty one: not known). boxes: gold boxes, xyxy relative to the image
    (width = height = 1), one per look that the answer needs. source: the name of the set, or the probe
    kind. meta: whatever else is known: of a drawn probe the scene (see make_scene), of a row of a cold
    start "texts", the assistant messages of the search.
    """

    image: Image.Image | str | Path | None
    question: str
    answer: str | list[str]
    options: dict[str, str] | None = None
    boxes: list[Box] = field(default_factory=list)
    source: str = ""
    difficulty: str = ""
    meta: dict = field(default_factory=dict)

    def open(self) -> Image.Image:
        """The image as upright RGB, drawn if need be. ImageError names the file if it cannot be read."""
        if self.image is None:
            return draw_scene(self)
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
    if shape == "cross":  # three corners of one arm, and the same turned three times
        corners = [(0.34, 0), (0.66, 0), (0.66, 0.34)]
        for _ in range(3):
            corners += [(1 - y, x) for x, y in corners[-3:]]
        return corners
    if shape == "triangle":
        return [(0.5, 0.03), (1, 0.95), (0, 0.95)]
    if shape == "heart":
        angles = [2 * math.pi * i / 40 for i in range(40)]
        waves = ((13, 1), (-5, 2), (-2, 3), (-1, 4))
        heights = [sum(height * math.cos(n * a) for height, n in waves) for a in angles]
        return [(0.5 + 0.496 * math.sin(a) ** 3, 0.45 - 0.031 * y) for a, y in zip(angles, heights)]
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
        band = Image.fromarray(small.squeeze()).resize((side, side), Image.Resampling.BICUBIC)
        noise += strength * (np.asarray(band, np.float32).reshape(noise.shape) / 127.5 - 1)
    return noise


def _background(side: int, contrast: float, photo: Image.Image | None, rng) -> Image.Image:
    """Drawn clutter, or a random part of a photograph, pulled towards dark grey so that plates stand out."""
    if photo is None:
        part = Image.fromarray(np.uint8(127.5 + 127.5 * np.clip(_clutter(side // 4, 3, rng), -1, 1)))
    else:
        part = ImageOps.fit(photo, (side, side), Image.Resampling.LANCZOS, centering=rng.random(2))
    levels = [round(min(175, max(0, 96 + (v - 127.5) * contrast / 70))) for v in range(256)]
    return part.point(levels * 3).resize((side, side), Image.Resampling.BILINEAR)


def _draw_plate(
    image: Image.Image, parts: tuple[str, str, str], x: float, y: float, cell: int, height: float, tone: int
) -> None:
    """A grey plate centered on pixel (x, y): two glyphs of `height` cells, a bar of its color below them."""
    left, right, color = parts
    size = round(height * cell)
    w, h, bar = 0.92 * cell, 0.62 * cell, 0.14 * cell
    draw = ImageDraw.Draw(image)
    edges = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    draw.rounded_rectangle(edges, radius=0.08 * cell, fill=(tone,) * 3)
    draw.rectangle((x - w / 2 + 1, y + h / 2 - bar, x + w / 2 - 1, y + h / 2 - 1), fill=COLORS[color])
    for name, direction in ((left, -1), (right, 1)):
        sprite = _sprite(name, size, cell / 16)  # cell / 16: the blur of a view of 6 x 6 cells
        center = x + direction * 0.22 * cell, y - bar / 2
        image.paste(sprite, tuple(round(v - size / 2) for v in center), sprite)


def draw_scene(probe: Probe) -> Image.Image:
    """The picture of a scene: background, boards where there are several regions, plates, uneven light."""
    meta, (_, glyph, contrast) = probe.meta, DIFFICULTIES[probe.difficulty]
    rng, noise = random.Random(meta["draw_seed"]), np.random.default_rng(meta["draw_seed"])
    cell, region = meta["cell"], meta["grid"] * meta["cell"]  # pixels per side
    photo = load_image(meta["photo"]) if meta["photo"] else None
    side = meta["regions"] * region
    image = _background(side, contrast, photo, noise)
    occupied = {split_cell(item["cell"], meta["grid"])[0] for item in meta["items"]}
    for x, y in sorted(occupied) if meta["regions"] > 1 else ():
        inset = rng.uniform(0.05, 0.15) * cell
        edges = [v * region + d for v, d in zip((x, y, x + 1, y + 1), (inset, inset, -inset, -inset))]
        ImageDraw.Draw(image).rectangle(edges, fill=BOARD)
    for item in meta["items"]:
        x, y = ((v + 0.5 + rng.uniform(-0.02, 0.02)) * cell for v in item["cell"])
        _draw_plate(image, item["parts"], x, y, cell, glyph, rng.randint(205, 235))
    # Uneven light. Without it, a matched filter reads plates in the overview (bench/bench_probes.py).
    light = 1 + (_clutter(side // 4, 1, noise)[..., 0] - 1) * contrast / 300
    light = Image.fromarray(np.uint8(255 * np.clip(light, 0, 1)))
    light = light.resize((side, side), Image.Resampling.BILINEAR)
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
    question, checks, reads = {
        "attribute": (f"What color is the tag with the {shape}?", [(0, shape)], 2),
        "sign": (f"What number is on sign {letter}?", [(0, letter)], 1),
        "conjunction": (f"What color is the tag with {shape} and {digit}?", [(0, shape), (1, digit)], 2),
        "relation": (f"What number is left of the {shape}?", [(1, shape)], 0),
    }[kind]
    return question, items, checks, reads


def make_scene(
    kind: str,
    difficulty: str,
    seed: int,
    *,
    regions: int = 1,
    grid: int = 6,
    cell: int = 48,
    candidates: int | None = None,
    backgrounds: list[str] | None = None,
) -> Probe:
    """A probe that is drawn when it is opened; the arguments are those of make_probe.

    meta: "k", "regions", "grid", "cell", "seed", "draw_seed", "photo" (a path or None); "items", one {"cell":
    (column, row), "parts", "answer", "target"} per plate, cells being counted over the whole picture;
    "checks" and "reads" say how the target is told from the others and where its answer is.
    """
    if kind not in PROBE_KINDS or difficulty not in DIFFICULTIES:
        choices = ", ".join([*PROBE_KINDS, *DIFFICULTIES])
        raise UserError(f"no probe of kind {kind!r}, difficulty {difficulty!r}: choose from {choices}")
    # str seeds hash alike everywhere
    rng = random.Random(f"{kind}/{difficulty}/{seed}/{regions}/{grid}/{candidates}")
    count = rng.choice(DIFFICULTIES[difficulty][0]) if candidates is None else candidates
    if regions not in (1, 3):
        raise UserError(f"--regions is 1 or 3 (per side of the picture), not {regions}")
    if not 0 < count <= (regions * grid) ** 2 or (count % 4 and count != 1):
        raise UserError(f"{count} look-alikes: needs 1 or a multiple of 4, at most {(regions * grid) ** 2}")
    # Regions with plates.
    boards = min(regions**2, count, max(-(-count // grid**2), rng.randint(count // 6 + 1, count // 4 + 1)))
    question, items, checks, reads = _paint_plates(kind, max(count, 4), rng)
    answer = items[0]["answer"]
    if count == 1:  # one plate alone, as often the target as a look-alike: for the warm-up
        items = [items[rng.choice((0, 0, 0, 1, 2, 3))]]
    chosen = rng.sample([(x, y) for y in range(regions) for x in range(regions)], boards)
    cells = [[(grid * x + i, grid * y + j) for j in range(grid) for i in range(grid)] for x, y in chosen]
    first = [rng.choice(inside) for inside in cells]  # each of these regions holds at least one plate
    rest = rng.sample(sorted(set().union(*cells) - set(first)), count - boards)
    places = rng.sample(first + rest, count)
    for item, place in zip(items, places):
        item["cell"], item["target"] = place, all(item["parts"][i] == name for i, name in checks)
    meta = {"k": count, "regions": regions, "grid": grid, "cell": cell, "seed": seed}
    meta |= {"draw_seed": rng.getrandbits(64), "items": items, "checks": checks, "reads": reads}
    meta["photo"] = rng.choice(backgrounds) if backgrounds else None
    boxes = [cell_box(items[0]["cell"], regions * grid, decimals=4)]
    return Probe(None, question, answer, boxes=boxes, source=kind, difficulty=difficulty, meta=meta)


def make_probe(kind: str, difficulty: str, seed: int, **size) -> Probe:
    """Draws one probe. The same arguments give the same probe everywhere (glyph edges vary with FreeType).

    size: regions (per side of the image: 1, or 3 with boards), grid (a region is grid x grid cells, at
    most one plate in each), cell (pixels per side of a cell), candidates (K, the number of plates; None =
    drawn from DIFFICULTIES[difficulty]), backgrounds (paths of photographs, one of which lies under the
    plates; None = drawn clutter). UserError for an unknown kind or difficulty, or a K that does not fit.
    """
    probe = make_scene(kind, difficulty, seed, **size)
    return replace(probe, image=draw_scene(probe))


def probe_stream(kinds: tuple[str, ...], difficulties: tuple[str, ...], seed: int, **size) -> Iterator[Probe]:
    """Endless fresh scenes (make_scene); the same seed gives the same stream. UserError for no kinds."""
    if not kinds or not difficulties:
        raise UserError("--kinds and --difficulties need at least one value")
    rng = random.Random(f"stream/{seed}")
    while True:
        yield make_scene(rng.choice(kinds), rng.choice(difficulties), rng.getrandbits(48), **size)


def list_photos(folder: Path) -> list[str]:
    """The image files of a folder, by their endings, in order. UserError if there are none."""
    endings = Image.registered_extensions()
    paths = sorted(str(p) for p in folder.iterdir() if p.suffix.lower() in endings) if folder.is_dir() else []
    if not paths:
        raise UserError(f"--backgrounds: no image files in {folder}")
    return paths


@dataclass(frozen=True)
class ProbeFlags:
    """What to draw: the Config of each script that draws probes has these fields."""

    kinds: tuple[str, ...] = PROBE_KINDS
    difficulties: tuple[str, ...] = ("hard",)  # drawn evenly
    regions: int = 1  # regions per side of a picture; 3: a world of two levels, where crops need a crop
    candidates: int | None = None  # plates per picture; default: by difficulty
    backgrounds: Path | None = None  # folder of photographs to lie under the plates; default: drawn clutter

    def draw_probes(self, seed: int, **size) -> Iterator[Probe]:
        """probe_stream of these flags; size: see make_probe. UserError for a folder without photographs."""
        if self.candidates == 1:
            raise UserError("--candidates 1: a plate alone need not be the one; give a multiple of 4")
        photos = list_photos(self.backgrounds) if self.backgrounds else None
        flags = {"regions": self.regions, "candidates": self.candidates, "backgrounds": photos}
        return probe_stream(self.kinds, self.difficulties, seed, **flags | size)


def cell_box(cell: tuple[int, int], grid: int, decimals: int = 2) -> Box:
    """The box of a cell or region (column, row), xyxy relative. The searcher writes two decimals."""
    x, y = cell
    return tuple(round(v / grid, decimals) for v in (x, y, x + 1, y + 1))


def split_cell(cell: tuple[int, int], grid: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """A cell of the whole picture as its region and the cell inside it, each (column, row)."""
    return (cell[0] // grid, cell[1] // grid), (cell[0] % grid, cell[1] % grid)


def cell_name(cell: tuple[int, int]) -> str:
    """Cells are named as on a chess board, seen from the top: a1 is the left of the first row."""
    return f"{chr(ord('a') + cell[0])}{cell[1] + 1}"


def region_name(region: tuple[int, int]) -> str:
    """Regions are numbered row by row, from r1 on: there are 3 x 3, or one."""
    return f"r{3 * region[1] + region[0] + 1}"


# ---------------------------------------------------------------------------------------------- files


def save_probes(probes: Iterable[Probe], directory: str | Path) -> None:
    """Writes probes.jsonl, for load_probes to read. An image that is a file already is named, not copied.

    UserError if the directory holds a set already.
    """
    directory, rows = Path(directory), []
    refuse_old_set(directory)
    for number, probe in enumerate(probes):
        if isinstance(probe.image, (str, Path)):
            name = str(Path(probe.image).absolute())
        else:
            name, png = f"images/{number:05d}.png", io.BytesIO()
            probe.open().save(png, "PNG")
            (directory / "images").mkdir(parents=True, exist_ok=True)
            write_atomic(directory / name, png.getvalue())
        rows.append({**vars(probe), "image": name})
    directory.mkdir(parents=True, exist_ok=True)
    write_lines(directory / "probes.jsonl", rows)


def refuse_old_set(directory: Path) -> None:
    """UserError if the directory holds a set of probes already, or cannot be one."""
    if (directory / "probes.jsonl").exists() or directory.is_file():
        raise UserError(f"{directory} is a file, or holds a set of probes already: give another --out")


def load_probes(path: str | Path, limit: int | None = None) -> list[Probe]:
    """Reads a set of probes: a .jsonl file, or the folder that holds probes.jsonl. Images stay on disk.

    A row is one object with "image" (a path, relative to the file or absolute), "question", "answer", and
    whichever of the other fields of Probe. Further keys go to `meta`. limit: read only so many rows.
    UserError names the file and the row of what is wrong. No row is left out.
    """
    file = Path(path, "probes.jsonl") if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"{file}: no such set of probes; make one: python data.py --out DIR, or prepare/")
    probes = []
    with open(file, "rb") as lines:
        for number, line in enumerate(itertools.islice(lines, limit), 1):
            try:
                probes.append(_read_row(json.loads(line.decode("utf-8-sig")), file.parent))
            except RecursionError:
                raise UserError(f"{file}, row {number}: is nested too deeply") from None
            except ValueError as error:  # no UTF-8, no JSON, an answer that is no option, the checks below
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
    if not os.path.isfile(image):  # False also for a name that no file can have
        raise ValueError(f"the image {image} is missing; is the set complete?")
    known = {key: row.pop(key) for key in list(row) if key in Probe.__dataclass_fields__}
    known |= {"image": str(image), "boxes": [tuple(box) for box in known["boxes"]]}
    return Probe(**known | {"meta": row | known["meta"]})


# --------------------------------------------------------------------------------- the scripted searcher


def _crop_text(thought: str, box: tuple[float, ...], source: int = 0) -> str:
    return f"<think>{thought}</think>{format_action(Crop(box, source))}"


def _compare(probe: Probe, item: dict | None) -> str:
    """The thought over a crop: each thing wanted beside what is seen, up to the first that is missing."""
    thoughts = []
    for index, wanted in probe.meta["checks"]:
        seen = item["parts"][index] if item else "nothing"
        thoughts.append(f"want {wanted}: see {seen}, {'yes' if seen == wanted else 'no'}")
        if seen != wanted:
            return ", ".join(thoughts)
    return ", ".join([*thoughts, f"read {item['parts'][probe.meta['reads']]}"])


def _plan(places: Collection[tuple[int, int]], size: int, slip: float, rng: random.Random) -> list:
    """The places to visit, in blocks of 2 x 2. slip: chance, per place, that an empty one is among them."""
    empty = [(x, y) for y in range(size) for x in range(size) if (x, y) not in places]
    slips = min(sum(rng.random() < slip for _ in places), len(empty))
    return sorted([*places, *rng.sample(empty, slips)], key=lambda p: (p[1] // 2, p[0] // 2, p[1], p[0]))


def write_search(
    probe: Probe, rng: random.Random, *, pattern: str, impatience: float = 0.0, slip: float = 0.0
) -> list[str]:
    """The assistant messages of one whole search through a drawn probe, in order (the scene is known).

    It lists the plates and crops one after the other. Where there are several regions, it lists those with
    boards, crops one, does the same inside of that observation, and goes on with the next region. pattern:
    "depth_first" follows its lists, the first of them from a random place on, round its end;
    "trial_and_error" takes their places in random order. Neither returns to a place. impatience: after the
    n-th miss it guesses with probability impatience * n. slip: chance, per place, that an empty one is taken
    for one more; a look tells ("plates nothing", "see nothing"), and the search goes on.
    """
    regions, grid = probe.meta["regions"], probe.meta["grid"]
    step = "next" if pattern == "depth_first" else "try"
    # Depth-first, the next place follows the last one directly, as in the list: easy to learn by copying.
    go = "" if step == "next" else ", try"
    at: dict[tuple, dict] = {}  # region -> cell inside it -> item
    for item in probe.meta["items"]:
        region, cell = split_cell(item["cell"], grid)
        at.setdefault(region, {})[cell] = item

    def order(places: list, first: bool) -> list:
        if step == "try":
            return rng.sample(places, len(places))
        start = rng.randrange(len(places)) if first else 0  # so that the rollouts of a group part at once
        return places[start:] + places[:start]

    planned = _plan(at, regions, slip, rng)
    lead = f"regions {' '.join(map(region_name, planned))}, {step}"  # what comes before the next place
    texts, misses, source = [], 0, 0
    path = order(planned, first=True)
    for number, region in enumerate(path, 1):
        name, cells = region_name(region), _plan(at.get(region, ()), grid, slip, rng)
        thought = f"plates {' '.join(map(cell_name, cells)) or 'nothing'}"
        if regions > 1:
            texts.append(_crop_text(f"{lead} {name}", cell_box(region, regions)))
            source = len(texts)  # the view of this region; naming it first makes it easy to copy
            rest = f", then {' '.join(map(region_name, path[number:]))}" if path[number:] and not go else ""
            thought = f"in {name}, {source_name(source)}{rest}: {thought}"
        lead = f"{thought}, {step}"
        for cell in order(cells, first=regions == 1) if cells else ():
            texts.append(_crop_text(f"{lead} {cell_name(cell)}", cell_box(cell, grid), source))
            item = at.get(region, {}).get(cell)
            thought = _compare(probe, item)
            if item is not None and item["target"]:
                return [*texts, f"<think>{thought}</think><answer>{item['answer']}</answer>"]
            misses += 1
            if rng.random() < impatience * misses:
                guess = rng.choice(DIGITS if probe.answer in DIGITS else list(COLORS))
                return [*texts, f"<think>{thought}, guess</think><answer>{guess}</answer>"]
            thought += f", after {cell_name(cell)}" if step == "next" else ""
            lead = thought + go
        lead = f"{thought}, leave {name}{go}"
    raise ValueError("none of the plates is the target")


def write_look(probe: Probe) -> list[str]:
    """Warm-up: two messages over a picture of a single plate: a crop of all of it, and what is seen.

    The thought ends with all that is on the plate. Three names for a look teach to read much sooner than one.
    """
    (item,) = probe.meta["items"]
    look = _crop_text(f"try {cell_name(item['cell'])}", (0.0, 0.0, 1.0, 1.0))
    thought = f"{_compare(probe, item)}, on it: {', '.join(item['parts'])}"
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
    """Endless (drawn probe, messages) of searches that end right within max_turns (paper, section 3.2).

    scenes: as probe_stream gives them. trial_share: share of trial-and-error searches, the rest are
    depth-first. impatience: (lowest, highest), drawn log-uniformly for each search, so that some give up at
    every length. patient_share: share of searches that never guess: they teach what a long search looks
    like. UserError for an impatience that is no range above 0.
    """
    low, high = impatience
    if not 0 < low <= high or max_turns < 2:
        raise UserError(f"needs 0 < --impatience {low} <= {high}, and --max_turns {max_turns} of 2 or more")
    rng = random.Random(f"cold start/{seed}")
    for probe in (scene for scene in scenes for _ in range(2)):  # drawing is dear: a picture serves twice
        pattern = "trial_and_error" if rng.random() < trial_share else "depth_first"
        hurry = low * (high / low) ** rng.random() if rng.random() >= patient_share else 0.0
        texts = write_search(probe, rng, pattern=pattern, impatience=hurry, slip=slip)
        if len(texts) <= max_turns and texts[-1].endswith(f"<answer>{probe.answer}</answer>"):
            probe.image = probe.open()
            yield probe, texts


# ---------------------------------------------------------------------------------------------- the command


@dataclass(frozen=True, kw_only=True)
class Config(ProbeFlags):
    out: Path  # a new folder: probes.jsonl, images/, sheet.png
    count: int = 100  # probes to draw
    difficulties: tuple[str, ...] = tuple(DIFFICULTIES)  # drawn evenly
    seed: int = 0


def draw_sheet(probes: list[Probe], columns: int = 3, side: int = 576) -> Image.Image:
    """A contact sheet, a row per kind: each probe, gold box in white, beside its 48 x 48 overview."""
    gap, rows = 36, [[p for p in probes if p.source == kind][:columns] for kind in PROBE_KINDS]
    sheet = Image.new("RGB", (2 * columns * (side + gap), len(rows) * (side + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for (r, row), c in itertools.product(enumerate(rows), range(columns)):
        for probe in row[c : c + 1]:
            image, x, y = probe.open(), 2 * c * (side + gap), r * (side + gap)
            overview = fit_pixels(image, 48 * 48, 48 * 48).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(image.resize((side, side)), (x, y))
            sheet.paste(overview, (x + side + gap // 2, y))
            x0, y0, x1, y1 = (v * side for v in probe.boxes[0])
            draw.rectangle((x + x0, y + y0, x + x1 - 1, y + y1 - 1), outline="white", width=2)
            caption = f"{probe.difficulty}: {probe.question}  {probe.answer}"
            draw.text((x + 3, y + side + 3), caption, "black", font_size=16)
    return sheet


def main(cfg: Config) -> None:
    refuse_old_set(cfg.out)
    if cfg.count < 1:
        raise UserError("--count starts at 1")
    probes = list(itertools.islice(cfg.draw_probes(cfg.seed), cfg.count))
    save_probes(tqdm(probes, desc="probes"), cfg.out)
    with replacing(cfg.out / "sheet.png") as temporary:
        draw_sheet(probes).save(temporary)
    print(f"{cfg.count} probes in {cfg.out}; look at {cfg.out / 'sheet.png'}")


if __name__ == "__main__":
    cli(main, Config)
