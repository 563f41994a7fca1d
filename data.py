"""Probes that force a search, and trajectories that show how to search.

A probe is one image, one question, one right answer. K plates lie scattered over a cluttered picture; all of
them look alike from afar, and only a crop shows what is painted on one. The question names one plate by what is
painted on it and asks for something else on it, so the K plates must be tried one by one: expected looks
(K + 1) / 2, the difficulty dial. The K answers are exactly balanced (K is a multiple of the four possible
answers), so that knowing the colours of all plates, but not which is which, is worth nothing: chance is 25 %.

    kind         on a plate            question                                     answer
    attribute    a coloured shape      What color is the star?                      red, green, blue, yellow
    sign         a letter, a digit     What number is on sign K?                    2, 4, 7, 9
    conjunction  a shape, a digit      What color is the star with number 7?        a colour
    relation     two shapes            What color is the shape left of the star?    a colour

A scripted searcher, which knows the scene, plays probes through env.CropEnv and leaves the cold-start
trajectories: depth-first and trial-and-error searches, the goal restated at every look, slips that it notices,
and an impatience that grows with every miss. Only those that end correct are kept (paper, section 3.2).

    $ python data.py --out probes --count 100                     # draw probes: probes.jsonl, images/, sheet.png
    $ python data.py --out probes --backgrounds ~/photos          # the same, on your own photographs

Read next: model.py.
"""
import functools
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from env import Crop, CropEnv, ImageError, format_action, grade, load_image

PROBE_KINDS = ("attribute", "sign", "conjunction", "relation")
DIFFICULTIES = {                       # our own definition: look-alikes, glyph height in cells, background contrast
    "easy": ((4,), 0.40, 20),
    "medium": ((8,), 0.36, 40),
    "hard": ((12, 16, 20, 24), 0.34, 60),
}
COLORS = {"red": (214, 40, 40), "green": (30, 150, 60), "blue": (40, 80, 220), "yellow": (236, 190, 20)}
SHAPES = ("star", "ring", "cross", "triangle", "square", "heart")
LETTERS = ("A", "C", "H", "K", "T", "X")
DIGITS = ("2", "4", "7", "9")
INK = (30, 30, 36)                     # letters and digits


class UserError(ValueError):
    """A mistake of the person at the keyboard: the message says what, where, and what to do."""


def command(main: Callable, config: type) -> None:
    """Runs a script: command line -> dataclass -> main(config). A user's mistake is one line and exit code 2."""
    try:
        main(tyro.cli(config))
    except (UserError, ImageError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@dataclass
class Probe:
    """One visual-search question.

    image: PIL RGB image, or the path of one. question: text without any image placeholder.
    answer: the right answer, or the right letter when `options` is {letter: text}; a list means aliases.
    boxes: gold boxes, xyxy relative to the image (width = height = 1), one per look that the answer needs.
    source: the published row's `data_source`, or the probe kind. meta: whatever else is known (scene, ids).
    """
    image: Image.Image | str
    question: str
    answer: str | list[str]
    options: dict[str, str] | None = None
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    source: str = ""
    difficulty: str = ""
    meta: dict = field(default_factory=dict)

    def open(self) -> Image.Image:
        """The image as upright RGB; ImageError names the file if it cannot be read."""
        return self.image if isinstance(self.image, Image.Image) else load_image(self.image)

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


@functools.lru_cache(maxsize=4096)
def _sprite(name: str, color: tuple[int, int, int], size: int) -> Image.Image:
    """A shape or a glyph, `size` pixels high, on transparent ground; drawn large and reduced, so edges are soft."""
    big = 8 * size
    sprite = Image.new("RGBA", (big, big), (*color, 0))
    draw = ImageDraw.Draw(sprite)
    if name == "ring":
        draw.ellipse((0, 0, big - 1, big - 1), outline=(*color, 255), width=big // 4)
    elif name in SHAPES:
        draw.polygon([(x * big, y * big) for x, y in _polygon(name)], fill=(*color, 255))
    else:
        font = ImageFont.load_default(size=big * 1.3)       # cap height is about 0.7 of the font size
        draw.text((big / 2, big / 2), name, fill=(*color, 255), font=font, anchor="mm",
                  stroke_width=big // 24, stroke_fill=(*color, 255))
    return sprite.resize((size, size), Image.Resampling.LANCZOS)


def _clutter(side: int, channels: int, rng: np.random.Generator) -> np.ndarray:
    """Low-frequency noise in [-1, 1], (side, side, channels) float32: fine noise would average out when the
    picture is shrunk, this does not (three octaves of random values, the finer the weaker)."""
    noise = np.zeros((side, side, channels), np.float32)
    for octave, strength in ((3, 0.45), (9, 0.32), (27, 0.23)):
        small = rng.integers(0, 256, (octave, octave, channels), dtype=np.uint8)
        bands = [Image.fromarray(small[..., c]).resize((side, side), Image.Resampling.BICUBIC) for c in range(channels)]
        noise += strength * (np.stack(bands, 2).astype(np.float32) / 127.5 - 1)
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
    return part.point(lambda v: min(175, max(0, 96 + (v - 127.5) * contrast / 70)))


# ------------------------------------------------------------------------------------------------ probes

def _other(values: tuple[str, ...], not_this: str, rng: random.Random) -> str:
    return rng.choice([value for value in values if value != not_this])


def _scene(kind: str, count: int, rng: random.Random) -> tuple[str, list[dict], list[tuple], int | None]:
    """(question, items, checks, reads): what is painted on each of `count` plates, items[0] being the target.

    An item is {"parts": [(name, color name or None), ...], "answer": str}. Answers are balanced exactly; the other
    parts make the target unique, and look-alikes share one of them with it where the kind allows. `checks`, (part
    index, wanted name) pairs, tell the target from the others; then `reads` is the part that holds the answer,
    None where a checked part shows it already.
    """
    answers = list(DIGITS if kind == "sign" else COLORS) * (count // 4)
    rng.shuffle(answers)
    shape, letter, digit = rng.choice(SHAPES), rng.choice(LETTERS), rng.choice(DIGITS)
    items = []
    for i, answer in enumerate(answers):
        target, half = i == 0, i % 2 == 0
        if kind == "attribute":
            parts = [(shape if target else _other(SHAPES, shape, rng), answer)]
        elif kind == "sign":
            parts = [(letter if target else _other(LETTERS, letter, rng), None), (answer, None)]
        elif kind == "conjunction":        # look-alikes share the shape or the digit, never both
            parts = [(shape if target or half else _other(SHAPES, shape, rng), answer),
                     (digit if target or not half else _other(DIGITS, digit, rng), None)]
        else:                              # relation: half of the look-alikes hold the named shape, on the wrong side
            right = shape if target else _other(SHAPES, shape, rng)
            left = shape if half and not target else _other(SHAPES, shape, rng)
            parts = [(left, answer), (right, rng.choice(list(COLORS)))]
        items.append({"parts": parts, "answer": answer})
    return {
        "attribute": (f"What color is the {shape}?", items, [(0, shape)], None),
        "sign": (f"What number is on sign {letter}?", items, [(0, letter)], 1),
        "conjunction": (f"What color is the {shape} with number {digit}?", items, [(0, shape), (1, digit)], None),
        "relation": (f"What color is the shape left of the {shape}?", items, [(1, shape)], 0),
    }[kind]


def make_probe(kind: str, difficulty: str, seed: int, *, grid: int = 6, cell: int = 48,
               backgrounds: list[str] | None = None, candidates: int | None = None) -> Probe:
    """Draws one probe; the same arguments give the same probe everywhere (glyph edges may vary with FreeType).

    grid: the image is grid x grid cells, at most one plate in each. cell: pixels per cell side.
    backgrounds: paths of photographs to lie under the plates, one picked at random; None = drawn clutter.
    candidates: K, the number of look-alikes with the target; None = drawn from DIFFICULTIES[difficulty].
    meta: "k", "grid", "goal", and "items", one {"cell": (column, row), "parts", "answer", "target"} per plate.
    Raises ValueError for an unknown kind or difficulty, or a K that does not fit.
    """
    if kind not in PROBE_KINDS or difficulty not in DIFFICULTIES:
        raise ValueError(f"no probe of kind {kind!r}, difficulty {difficulty!r}: choose from {PROBE_KINDS} and "
                         f"{tuple(DIFFICULTIES)}")
    rng = random.Random(f"{kind}/{difficulty}/{seed}/{grid}/{candidates}")   # str seeds hash alike everywhere
    ks, glyph, contrast = DIFFICULTIES[difficulty]
    count = rng.choice(ks) if candidates is None else candidates
    if not 0 < count <= grid * grid or (count % 4 and count != 1):
        raise ValueError(f"{count} look-alikes: needs a multiple of 4 (or 1) that fits a {grid} x {grid} grid")
    question, items, checks, reads = _scene(kind, max(count, 4), rng)
    answer = items[0]["answer"]
    if count == 1:                       # one plate alone, the target or as often a look-alike: a perception warm-up
        items = [items[rng.choice((0, 0, 0, 1, 2, 3))]]
    cells = rng.sample([(x, y) for y in range(grid) for x in range(grid)], count)
    noise = np.random.default_rng(rng.getrandbits(64))
    photo = load_image(rng.choice(backgrounds)) if backgrounds else None
    side = grid * cell
    image = _background(side, contrast, photo, noise)
    size = round(glyph * cell)
    for item, (x, y) in zip(items, cells):
        item["cell"], item["target"] = (x, y), all(item["parts"][i][0] == name for i, name in checks)
        jitter = [rng.uniform(-0.05, 0.05) * cell for _ in range(2)]
        _draw_plate(image, item["parts"], (x + .5) * cell + jitter[0], (y + .5) * cell + jitter[1], cell, size, rng)
    light = 1 + (_clutter(side // 4, 1, noise)[..., 0] - 1) * contrast / 250       # uneven light, plates included
    light = Image.fromarray(np.uint8(255 * np.clip(light, 0, 1))).resize((side, side), Image.Resampling.BICUBIC)
    image = ImageChops.multiply(image, Image.merge("RGB", [light] * 3))
    meta = {"k": count, "grid": grid, "seed": seed, "items": items, "checks": checks, "reads": reads}
    return Probe(image, question, answer, boxes=[cell_box(items[0]["cell"], grid)], source=kind, difficulty=difficulty,
                 meta=meta)


def _draw_plate(image: Image.Image, parts: list, x: float, y: float, cell: int, size: int, rng: random.Random) -> None:
    tone = rng.randint(205, 235)
    w, h = 0.88 * cell, 0.5 * cell
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((x - w / 2, y - h / 2, x + w / 2, y + h / 2), radius=0.12 * cell, fill=(tone,) * 3)
    for i, (name, color) in enumerate(parts):
        sprite = _sprite(name, COLORS[color] if color else INK, size)
        center = x + (i - (len(parts) - 1) / 2) * 0.42 * cell
        image.paste(sprite, (round(center - size / 2), round(y - size / 2)), sprite)


def cell_box(cell: tuple[int, int], grid: int) -> tuple[float, float, float, float]:
    """The box of a cell (column, row), xyxy relative, in the two decimals in which the searcher writes it."""
    x, y = cell
    return tuple(round(v / grid, 2) for v in (x, y, x + 1, y + 1))


def cell_name(cell: tuple[int, int]) -> str:
    """Cells are named as on a chess board, seen from the top: a1 is the left of the first row."""
    return f"{chr(ord('a') + cell[0])}{cell[1] + 1}"


def probe_stream(kinds: tuple[str, ...], difficulties: tuple[str, ...], seed: int, **size) -> Iterator[Probe]:
    """Endless fresh probes, kinds and difficulties in turn at random; the same seed gives the same stream."""
    rng = random.Random(f"stream/{seed}")
    while True:
        yield make_probe(rng.choice(kinds), rng.choice(difficulties), rng.getrandbits(48), **size)


# ------------------------------------------------------------------------------------------------ the scripted searcher

PATTERNS = ("depth_first", "trial_and_error")      # goal maintenance, slips and impatience are mixed into both


def _crop_text(thought: str, box: tuple[float, ...]) -> str:
    return f"<think>{thought}</think>{format_action(Crop(box, 0))}"


def _verdict(probe: Probe, item: dict | None) -> str:
    """What is thought over a crop: each thing wanted beside what is seen, up to the first that is missing."""
    said = []
    for index, wanted in probe.meta["checks"]:
        seen = _part(item["parts"][index]) if item else "nothing"
        found = item is not None and item["parts"][index][0] == wanted
        said.append(f"want {wanted}: see {seen}, {'yes' if found else 'no'}")
        if not found:
            return ", ".join(said)
    if probe.meta["reads"] is not None:
        said.append(f"read {_part(item['parts'][probe.meta['reads']])}")
    return ", ".join(said)


def _part(part: tuple[str, str | None]) -> str:
    name, color = part
    return f"{color} {name}" if color else name


def search_script(probe: Probe, rng: random.Random, *, pattern: str, impatience: float = 0.0,
                  slip: float = 0.0) -> list[str]:
    """The assistant messages of one whole search through a drawn probe, in order (the scene is known).

    pattern: "depth_first" goes through the plates in reading order, "trial_and_error" in random order; neither
    returns to a plate. impatience: after the n-th miss it guesses with probability impatience * n. slip: chance
    at each look of cropping an empty cell instead, noticing it ("see nothing") and going on.
    """
    grid, at = probe.meta["grid"], {item["cell"]: item for item in probe.meta["items"]}
    order = sorted(at, key=lambda cell: (cell[1], cell[0]))
    empty = [(x, y) for y in range(grid) for x in range(grid) if (x, y) not in at]
    if pattern == "trial_and_error":
        rng.shuffle(order)
    verb = "next" if pattern == "depth_first" else "try"
    texts, thought, misses = [], "", 0
    while True:
        cell = rng.choice(empty) if empty and rng.random() < slip else order.pop(0)
        texts.append(_crop_text(f"{thought}{verb} {cell_name(cell)}", cell_box(cell, grid)))
        item = at.get(cell)
        thought = _verdict(probe, item)
        if item is not None and item["target"]:
            return [*texts, f"<think>{thought}</think><answer>{item['answer']}</answer>"]
        misses += 1
        if rng.random() < impatience * misses:
            guess = rng.choice(DIGITS if probe.source == "sign" else list(COLORS))
            return [*texts, f"<think>{thought}, guess</think><answer>{guess}</answer>"]
        thought += ", "


def look_script(probe: Probe) -> list[str]:
    """One message for a picture of a single plate: is it the one? The perception warm-up of the tiny policy."""
    item, = probe.meta["items"]
    if item["target"]:
        return [f"<think>{_verdict(probe, item)}</think><answer>{item['answer']}</answer>"]
    return [_crop_text(f"{_verdict(probe, item)}, next a1", (0.0, 0.0, 1.0, 1.0))]


@dataclass
class Trajectory:
    """A finished conversation: the probe, the assistant messages in order, how it stopped, and its reward."""
    probe: Probe
    texts: list[str]
    stop: str
    reward: float
    pattern: str = ""


def collect(probes: list[Probe], speak: Callable[[list], list], **env_options) -> list[Trajectory]:
    """Plays all probes turn by turn; `speak` takes the conversations (chat messages; None once an episode has
    ended) and returns one assistant text for each. Returns every trajectory, right or wrong: filter by reward.
    """
    envs = [CropEnv(probe.open(), probe.prompt(), **env_options) for probe in probes]
    talks: list = [env.reset() for env in envs]
    texts: list[list[str]] = [[] for _ in probes]
    while any(talk is not None for talk in talks):
        for i, text in enumerate(speak(talks)):
            if talks[i] is None:
                continue
            texts[i].append(text)
            message, stop = envs[i].step(text)
            reply = {"role": "assistant", "content": [{"type": "text", "text": text}]}
            talks[i] = None if stop else [*talks[i], reply, message]
    return [Trajectory(probe, said, env.stop, grade(env.answer, probe.answer, probe.options))
            for probe, said, env in zip(probes, texts, envs)]


def cold_start(probes: Iterator[Probe], seed: int, *, trial_share: float, impatience: float, patient_share: float,
               slip: float, max_turns: int, **env_options) -> Iterator[Trajectory]:
    """Endless correct trajectories of the scripted searcher (paper, section 3.2: only those that end right).

    trial_share: share of trial-and-error searches, the rest being depth-first. patient_share: share of searches
    without impatience, whatever their length: they teach what a long search looks like.
    """
    rng = random.Random(f"cold start/{seed}")
    for probe in probes:
        pattern = PATTERNS[rng.random() < trial_share]
        calm = rng.random() < patient_share
        script = search_script(probe, rng, pattern=pattern, impatience=0.0 if calm else impatience, slip=slip)
        trajectory, = collect([probe], lambda _: [script.pop(0)], max_turns=max_turns, **env_options)
        if trajectory.reward == 1.0:
            trajectory.pattern = pattern
            yield trajectory
