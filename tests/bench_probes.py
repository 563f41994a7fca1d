"""The acceptance gate of the probes: five accuracies that say whether a probe can be answered without a search.

    blind        the question alone: the answer that was most often right
    overview     the 48 x 48 view of the whole image, as the tiny policy sees it. A strong reader: it knows every
                 cell that holds a plate, has a template of every possible plate at 25 offsets, drawn and reduced by
                 the same code, and the covariance of what clutter and light add; it weighs all plates and offsets
    black crops  a crop of every plate, but black: what the positions of crops alone give away
    gold crop    the one right crop at 48 x 48, read glyph by glyph, by correlation over offsets
    all crops    a crop of every plate: the reader has to find the right one too

A kind is admitted when, on hard, the first three are at chance (25 %, within 5 points) and the last two above 97 %.
On easy and medium the overview may help a little: extra rows, no gate.

    $ python tests/bench_probes.py                   # about 2 minutes on one core
    $ python tests/bench_probes.py --check           # exit code 1 when the gate fails
"""

import itertools
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import data  # noqa: E402  (found through the line above)
from env import crop_pixels, fit_pixels  # noqa: E402

CELL, GRID, VIEW = 48, 6, 48  # pixels per cell, cells per side, pixels per side of a view
PATCH = VIEW // GRID  # a cell in the overview: 8 x 8 pixels
GREY, TONE = 96, 220  # what clutter and plates are on average
SHARP = 200.0  # log-likelihood per unit of correlation

Plate = tuple[tuple[str, str, str], str]  # parts, answer


def plates(kind: str) -> list[Plate]:
    """Every plate that a probe of this kind may show."""
    shapes, letters, digits, colors = data.SHAPES, data.LETTERS, data.DIGITS, tuple(data.COLORS)
    parts = {
        "attribute": itertools.product(shapes, letters, colors),
        "sign": itertools.product(letters, digits, colors),
        "conjunction": itertools.product(shapes, digits, colors),
        "relation": [*itertools.product(digits, shapes, colors), *itertools.product(shapes, digits, colors)],
    }[kind]
    return [
        (p, p[2] if kind in ("attribute", "conjunction") else next(name for name in p if name in digits))
        for p in parts
    ]


def templates(shown: list[Plate], difficulty: str, offsets: tuple[float, ...]) -> np.ndarray:
    """(P plates, J offsets, 8 * 8 * 3): cells with a plate on plain grey, drawn as in a probe and then reduced."""
    columns = 24
    rows = -(-len(shown) // columns)
    cells = []
    for dx, dy in itertools.product(offsets, repeat=2):
        canvas = Image.new(
            "RGB", (columns * 2 * CELL, rows * 2 * CELL), (GREY,) * 3
        )  # every second cell is empty
        for i, (parts, _) in enumerate(shown):
            x, y = (2 * (i % columns) + 0.5) * CELL + dx, (2 * (i // columns) + 0.5) * CELL + dy
            data._draw_plate(canvas, parts, x, y, CELL, round(data.DIFFICULTIES[difficulty][1] * CELL), TONE)
        pixels = rows * columns * 4 * PATCH * PATCH
        small = np.asarray(fit_pixels(canvas, pixels, pixels), np.float32)
        small = small.reshape(rows, 2, PATCH, columns, 2, PATCH, 3)[:, 0, :, :, 0].transpose(0, 2, 1, 3, 4)
        cells.append(small.reshape(rows * columns, -1)[: len(shown)])
    return np.stack(cells, 1)


def asked(probe: data.Probe, shown: list[Plate]) -> np.ndarray:
    """(P,) bool: which plates would be the target of this probe."""
    return np.array([all(parts[i] == name for i, name in probe.meta["checks"]) for parts, _ in shown])


def vote(fit: np.ndarray, probe: data.Probe, shown: list[Plate]) -> str:
    """The most probable answer from log-likelihoods (K plates seen, P plates possible).

    One of the K is the target, each equally likely: the odds of plate k are P(seen | wanted) / P(seen | not wanted).
    """
    wanted = asked(probe, shown)
    yes = np.logaddexp.reduce(fit[:, wanted], axis=1)
    odds = yes - np.logaddexp.reduce(fit[:, ~wanted], axis=1)
    target = np.exp(odds - odds.max())[:, None] * np.exp(fit[:, wanted] - yes[:, None])  # (K, wanted plates)
    score: Counter = Counter()
    for weight, (_, answer) in zip(target.sum(0), itertools.compress(shown, wanted)):
        score[answer] += weight
    return max(score, key=score.get)


class OverviewReader:
    """Knows the plates of one kind and difficulty, reduced to D = 8 * 8 * 3 numbers, and what clutter adds."""

    def __init__(self, kind: str, difficulty: str, training: list[data.Probe]):
        self.shown = plates(kind)
        known = templates(self.shown, difficulty, (-1, -0.5, 0, 0.5, 1))  # (P, J, D)
        index = {parts: i for i, (parts, _) in enumerate(self.shown)}
        truth = known[
            [index[item["parts"]] for probe in training for item in probe.meta["items"]]
        ]  # (N, J, D)
        patches = np.concatenate([self.patches(probe) for probe in training])  # (N, D)
        mean, self.whiten = 0.0, np.eye(patches.shape[1], dtype=np.float32)
        for _ in range(2):  # which offset fits best, what is left over; then again in its metric
            best = (((patches[:, None] - truth - mean) @ self.whiten) ** 2).sum(2).argmin(1)
            left = patches - truth[np.arange(len(best)), best]
            mean = left.mean(0)
            covariance = np.cov(left.T) + 0.5 * np.eye(left.shape[1])  # 0.5: rounding
            self.whiten = np.linalg.cholesky(np.linalg.inv(covariance)).astype(np.float32)
        self.known = ((known + mean) @ self.whiten).reshape(-1, patches.shape[1])  # (P * J, D)
        self.norm = 0.5 * (self.known**2).sum(1)

    def patches(self, probe: data.Probe) -> np.ndarray:
        """(K, D): the cells of the plates, cut from the overview."""
        view = np.asarray(fit_pixels(probe.open(), VIEW * VIEW, VIEW * VIEW), np.float32)
        cells = [item["cell"] for item in probe.meta["items"]]
        return np.stack(
            [view[y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH].ravel() for x, y in cells]
        )

    def answer(self, probe: data.Probe) -> str:
        fit = (self.patches(probe) @ self.whiten) @ self.known.T - self.norm  # (K, P * J)
        return vote(
            np.logaddexp.reduce(fit.reshape(len(fit), len(self.shown), -1), axis=2), probe, self.shown
        )


class CropReader:
    """Reads crops in native pixels, each glyph by the best correlation over offsets, then the color of the bar.

    A crop that is black all over fits every plate alike.
    """

    def __init__(self, kind: str, difficulty: str):
        self.shown = plates(kind)
        self.size = round(data.DIFFICULTIES[difficulty][1] * CELL)
        self.glyphs = data.SHAPES + data.LETTERS + data.DIGITS
        inks = [
            np.asarray(data._sprite(name, self.size, CELL / 16), np.float32)[..., 3] for name in self.glyphs
        ]
        self.inks = _normal(-np.stack(inks).reshape(len(inks), -1))  # (glyphs, size * size)
        self.colors = np.array(list(data.COLORS.values()), np.float32)
        colors, names = list(data.COLORS), self.glyphs
        self.columns = np.array(
            [[names.index(p[0]), names.index(p[1]), colors.index(p[2])] for p, _ in self.shown]
        )

    def read(self, crop: Image.Image) -> np.ndarray:
        """(P,) log-likelihoods of the plates that the crop may show."""
        pixels = np.asarray(crop.resize((VIEW, VIEW), Image.Resampling.LANCZOS), np.float32)
        grey = np.pad(pixels.mean(2), 8, mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(grey, (self.size, self.size))
        top = 8 + round(VIEW / 2 - 0.07 * CELL - self.size / 2)
        fits = []
        for center in (VIEW / 2 - 0.22 * CELL, VIEW / 2 + 0.22 * CELL):
            left = 8 + round(center - self.size / 2)
            near = windows[top - 3 : top + 4, left - 3 : left + 4].reshape(49, -1)
            fits.append((self.inks @ _normal(near).T).max(1))  # (glyphs,)
        bar = pixels[33:37, 8:40].mean((0, 1))
        fits.append(_normal(self.colors) @ _normal(bar))
        return SHARP * sum(fit[column] for fit, column in zip(fits, self.columns.T))

    def answer(self, probe: data.Probe, boxes: list, black: bool = False) -> str:
        """What the crops say together."""
        crops = [probe.open().crop(crop_pixels(probe.open().size, box)) for box in boxes]
        crops = [Image.new("RGB", crop.size) if black else crop for crop in crops]
        return vote(np.stack([self.read(crop) for crop in crops]), probe, self.shown)


def _normal(rows: np.ndarray) -> np.ndarray:
    """Mean 0 and length 1 along the last axis; a constant row becomes 0."""
    rows = rows - rows.mean(-1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-3)


def readers(kind: str, difficulty: str, training: list[data.Probe]) -> dict[str, Callable[[data.Probe], str]]:
    """The five columns of the table: probe -> answer."""
    habit: dict[str, Counter] = {}  # question -> its answers in the training probes
    for probe in training:
        habit.setdefault(probe.question, Counter())[probe.answer] += 1
    usual = sum(habit.values(), Counter())
    overview, crops = OverviewReader(kind, difficulty, training), CropReader(kind, difficulty)

    def all_boxes(probe: data.Probe) -> list:
        return [
            data.cell_box(item["cell"], GRID) for item in probe.meta["items"][::-1]
        ]  # items[0] is the target

    return {
        "blind": lambda p: habit.get(p.question, usual).most_common(1)[0][0],
        "overview": overview.answer,
        "black crops": lambda p: crops.answer(p, all_boxes(p), black=True),
        "gold crop": lambda p: crops.answer(p, p.boxes),
        "all crops": lambda p: crops.answer(p, all_boxes(p)),
    }


@dataclass(frozen=True)
class Config:
    probes: int = 300  # per kind and difficulty
    training: int = 150  # more, for the overview reader to learn the clutter from
    kinds: tuple[str, ...] = data.PROBE_KINDS
    difficulties: tuple[str, ...] = ("hard", "medium", "easy")
    check: bool = False  # exit code 1 when a kind fails the gate


def main(cfg: Config) -> None:
    failed = []
    for difficulty, kind in itertools.product(cfg.difficulties, cfg.kinds):
        training = [data.make_probe(kind, difficulty, 10**6 + seed) for seed in range(cfg.training)]
        columns = readers(kind, difficulty, training)
        right = Counter()
        for seed in range(cfg.probes):
            probe = data.make_probe(kind, difficulty, seed)
            right.update(name for name, read in columns.items() if read(probe) == probe.answer)
        if not failed and (difficulty, kind) == (cfg.difficulties[0], cfg.kinds[0]):
            print(" " * 24 + "".join(f"{name:>15s}" for name in columns))
        row = f"{difficulty:8s}{kind:16s}"
        for name in columns:
            share = right[name] / cfg.probes
            row += f"{100 * share:9.1f} ±{100 * (share * (1 - share) / cfg.probes) ** 0.5:4.1f}"
            good = share >= 0.97 if name in ("gold crop", "all crops") else abs(share - 0.25) <= 0.05
            if difficulty == "hard" and not good:
                failed.append(f"{kind} {name} {100 * share:.1f}")
        print(row, flush=True)
    print("the gate holds" if not failed else "the gate fails: " + ", ".join(failed))
    if cfg.check and failed:
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Config))
