"""The acceptance gate of the probes: can one be answered without a search? Five readers, five accuracies.

    blind        the question alone: the answer that was most often right
    overview     the 48 x 48 view of the whole image, as the tiny policy sees it; where there are several
                 regions, the views of all of them, which show more. A strong reader: it knows every cell
                 that holds a plate, has a template of every possible plate at 25 offsets, drawn and
                 reduced by the same code, and the covariance of what clutter and light add; it weighs all
                 plates and offsets
    black crops  a crop of every plate, but black: what the positions of crops alone give away
    gold crop    the one right crop at 48 x 48, read glyph by glyph, by correlation over offsets
    all crops    a crop of every plate: the reader has to find the right one too

A kind is admitted when, on hard, the first three are at chance (25 %, within 5 points) and the last two above
97 %. On easy and medium the overview may help a little: extra rows, no gate.

    $ python bench/bench_probes.py                   # about 10 minutes on one core
    $ python bench/bench_probes.py --check           # exit code 1 when the gate fails
"""

import itertools
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli

import numpy as np
from PIL import Image

import data
from env import crop_pixels, fit_pixels

GRID, VIEW = 6, 48  # cells per side of a region, pixels per side of a view
PATCH = VIEW // GRID  # a cell in a view: 8 x 8 pixels
GREY, TONE = 96, 220  # what clutter and plates are on average
SHARP = 200.0  # log-likelihood per unit of correlation
READ_CROPS = ("gold crop", "all crops")  # the readers that have to succeed

Plate = tuple[tuple[str, str, str], str]  # parts, answer


def list_plates(kind: str) -> list[Plate]:
    """Every plate that a probe of this kind may show."""
    shapes, letters, digits, colors = data.SHAPES, data.LETTERS, data.DIGITS, tuple(data.COLORS)
    plates = {
        "attribute": itertools.product(shapes, letters, colors),
        "sign": itertools.product(letters, digits, colors),
        "conjunction": itertools.product(shapes, digits, colors),
        "relation": [*itertools.product(digits, shapes, colors), *itertools.product(shapes, digits, colors)],
    }[kind]
    colored = kind in ("attribute", "conjunction")
    return [
        (parts, parts[2] if colored else next(name for name in parts if name in digits)) for parts in plates
    ]


def draw_templates(
    plates: list[Plate], difficulty: str, offsets: tuple, ground: tuple, cell: int
) -> np.ndarray:
    """(P plates, J offsets, 8 * 8 * 3): cells with a plate on plain ground, drawn and then reduced."""
    columns = 24
    rows = -(-len(plates) // columns)
    height = data.DIFFICULTIES[difficulty][1]
    cells = []
    for dx, dy in itertools.product(offsets, repeat=2):
        size = columns * 2 * cell, rows * 2 * cell  # every second cell is empty
        canvas = Image.new("RGB", size, ground)
        for i, (parts, _) in enumerate(plates):
            x, y = (2 * (i % columns) + 0.5) * cell + dx, (2 * (i // columns) + 0.5) * cell + dy
            data._draw_plate(canvas, parts, x, y, cell, height, TONE)
        pixels = rows * columns * 4 * PATCH * PATCH
        small = np.asarray(fit_pixels(canvas, pixels, pixels), np.float32)
        small = small.reshape(rows, 2, PATCH, columns, 2, PATCH, 3)[:, 0, :, :, 0].transpose(0, 2, 1, 3, 4)
        cells.append(small.reshape(rows * columns, -1)[: len(plates)])
    return np.stack(cells, 1)


def vote(fit: np.ndarray, probe: data.Probe, plates: list[Plate]) -> str:
    """The most probable answer from log-likelihoods (K plates seen, P plates possible).

    One of the K is the target, each equally likely: the odds of plate k are P(seen | target) / P(seen | not).
    """
    checks = probe.meta["checks"]
    fits_question = np.array([all(parts[i] == name for i, name in checks) for parts, _ in plates])  # (P,)
    yes = np.logaddexp.reduce(fit[:, fits_question], axis=1)
    odds = yes - np.logaddexp.reduce(fit[:, ~fits_question], axis=1)
    # (K, plates that fit the question)
    share = np.exp(odds - odds.max())[:, None] * np.exp(fit[:, fits_question] - yes[:, None])
    score: Counter = Counter()
    for weight, (_, answer) in zip(share.sum(0), itertools.compress(plates, fits_question)):
        score[answer] += weight
    return max(score, key=score.get)


class OverviewReader:
    """Knows the plates of one kind and difficulty, reduced to D = 8 * 8 * 3 numbers, and the clutter."""

    def __init__(self, kind: str, difficulty: str, training: list[data.Probe]):
        self.plates = list_plates(kind)
        ground = data.BOARD if training[0].meta["regions"] > 1 else (GREY,) * 3
        cell = training[0].meta["cell"]
        known = draw_templates(self.plates, difficulty, (-1, -0.5, 0, 0.5, 1), ground, cell)  # (P, J, D)
        index = {parts: i for i, (parts, _) in enumerate(self.plates)}
        names = (item["parts"] for probe in training for item in probe.meta["items"])
        truth = known[[index[parts] for parts in names]]  # (N, J, D)
        patches = np.concatenate([self.cut_patches(probe) for probe in training])  # (N, D)
        mean, self.whiten = 0.0, np.eye(patches.shape[1], dtype=np.float32)
        for _ in range(2):  # which offset fits best, what is left over; then again in its metric
            best = (((patches[:, None] - truth - mean) @ self.whiten) ** 2).sum(2).argmin(1)
            left = patches - truth[np.arange(len(best)), best]
            mean = left.mean(0)
            covariance = np.cov(left.T) + 0.5 * np.eye(left.shape[1])  # 0.5: rounding
            self.whiten = np.linalg.cholesky(np.linalg.inv(covariance)).astype(np.float32)
        self.known = ((known + mean) @ self.whiten).reshape(-1, patches.shape[1])  # (P * J, D)
        self.norm = 0.5 * (self.known**2).sum(1)

    def cut_patches(self, probe: data.Probe) -> np.ndarray:
        """(K, D): the cells of the plates, cut from the overview."""
        cells = GRID * probe.meta["regions"]
        pixels = (cells * PATCH) ** 2
        view = np.asarray(fit_pixels(probe.open(), pixels, pixels), np.float32)
        view = view.reshape(cells, PATCH, cells, PATCH, 3).swapaxes(1, 2)  # (row, column, 8, 8, 3)
        return np.stack([view[y, x].ravel() for x, y in (item["cell"] for item in probe.meta["items"])])

    def answer(self, probe: data.Probe) -> str:
        fit = (self.cut_patches(probe) @ self.whiten) @ self.known.T - self.norm  # (K, P * J)
        fit = np.logaddexp.reduce(fit.reshape(len(fit), len(self.plates), -1), axis=2)  # (K, P)
        return vote(fit, probe, self.plates)


class CropReader:
    """Reads crops in native pixels, each glyph by the best correlation over offsets, then the bar's color.

    A crop that is black all over fits every plate alike.
    """

    def __init__(self, kind: str, difficulty: str):
        self.plates = list_plates(kind)
        self.size = round(data.DIFFICULTIES[difficulty][1] * VIEW)
        glyphs, colors = data.SHAPES + data.LETTERS + data.DIGITS, list(data.COLORS)
        inks = [np.asarray(data._sprite(name, self.size, VIEW / 16), np.float32)[..., 3] for name in glyphs]
        self.inks = normalise(-np.stack(inks).reshape(len(inks), -1))  # (glyphs, size * size)
        self.colors = np.array(list(data.COLORS.values()), np.float32)
        names = ((parts, glyphs.index(parts[0]), glyphs.index(parts[1])) for parts, _ in self.plates)
        self.columns = np.array([[left, right, colors.index(parts[2])] for parts, left, right in names])

    def read(self, crop: Image.Image) -> np.ndarray:
        """(P,) log-likelihoods of the plates that the crop may show."""
        pixels = np.asarray(crop.resize((VIEW, VIEW), Image.Resampling.LANCZOS), np.float32)
        grey = np.pad(pixels.mean(2), 8, mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(grey, (self.size, self.size))
        top = 8 + round(VIEW / 2 - 0.07 * VIEW - self.size / 2)
        fits = []
        for center in (VIEW / 2 - 0.22 * VIEW, VIEW / 2 + 0.22 * VIEW):
            left = 8 + round(center - self.size / 2)
            near = windows[top - 3 : top + 4, left - 3 : left + 4].reshape(49, -1)
            fits.append((self.inks @ normalise(near).T).max(1))  # (glyphs,)
        bar = pixels[33:37, 8:40].mean((0, 1))
        fits.append(normalise(self.colors) @ normalise(bar))
        return SHARP * sum(fit[column] for fit, column in zip(fits, self.columns.T))

    def answer(self, probe: data.Probe, boxes: list, black: bool = False) -> str:
        """What the crops say together."""
        image = probe.open()
        crops = [image.crop(crop_pixels(image.size, box)) for box in boxes]
        crops = [Image.new("RGB", crop.size) if black else crop for crop in crops]
        return vote(np.stack([self.read(crop) for crop in crops]), probe, self.plates)


def normalise(rows: np.ndarray) -> np.ndarray:
    """Mean 0 and length 1 along the last axis; a constant row becomes 0."""
    rows = rows - rows.mean(-1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-3)


def make_readers(kind: str, difficulty: str, training: list[data.Probe]) -> dict[str, Callable]:
    """The five columns of the table: each a function, probe -> answer."""
    habit: dict[str, Counter] = {}  # question -> its answers in the training probes
    for probe in training:
        habit.setdefault(probe.question, Counter())[probe.answer] += 1
    usual = sum(habit.values(), Counter())
    overview, crops = OverviewReader(kind, difficulty, training), CropReader(kind, difficulty)

    def list_boxes(probe: data.Probe) -> list:
        items = reversed(probe.meta["items"])  # items[0] is the target: it must not win by coming first
        return [data.cell_box(item["cell"], GRID * probe.meta["regions"], decimals=4) for item in items]

    return {
        "blind": lambda p: habit.get(p.question, usual).most_common(1)[0][0],
        "overview": overview.answer,
        "black crops": lambda p: crops.answer(p, list_boxes(p), black=True),
        "gold crop": lambda p: crops.answer(p, p.boxes),
        "all crops": lambda p: crops.answer(p, list_boxes(p)),
    }


@dataclass(frozen=True)
class Config:
    probes: int = 600  # per kind and difficulty
    training: int = 150  # more, for the overview reader to learn the clutter from
    kinds: tuple[str, ...] = data.PROBE_KINDS
    difficulties: tuple[str, ...] = ("hard", "medium", "easy")
    regions: int = 1  # per side of a picture; 3: the world of two levels
    check: bool = False  # exit code 1 when a kind fails the gate


def main(cfg: Config) -> None:
    failed = []
    print(" " * 24 + "".join(f"{name:>15s}" for name in ("blind", "overview", "black crops", *READ_CROPS)))
    for difficulty, kind in itertools.product(cfg.difficulties, cfg.kinds):
        size = {"regions": cfg.regions}
        training = [data.make_probe(kind, difficulty, 10**6 + seed, **size) for seed in range(cfg.training)]
        readers = make_readers(kind, difficulty, training)
        right: Counter = Counter()
        for seed in range(cfg.probes):
            probe = data.make_probe(kind, difficulty, seed, **size)
            right.update(name for name, read in readers.items() if read(probe) == probe.answer)
        row = f"{difficulty:8s}{kind:16s}"
        for name in readers:
            share = right[name] / cfg.probes
            row += f"{100 * share:9.1f} ±{100 * (share * (1 - share) / cfg.probes) ** 0.5:4.1f}"
            good = share >= 0.97 if name in READ_CROPS else abs(share - 0.25) <= 0.05
            if difficulty == "hard" and not good:
                failed.append(f"{kind} {name} {100 * share:.1f}")
        print(row, flush=True)
    print("the gate fails: " + ", ".join(failed) if failed else "the gate holds")
    sys.exit(int(cfg.check and bool(failed)))


if __name__ == "__main__":
    cli(main, Config)
