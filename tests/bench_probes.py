"""The acceptance gate of the probes: four accuracies that say whether a probe can be answered without a search.

    blind        the question alone: the answer most often right
    overview     the 48 x 48 view of the whole image, as the tiny policy sees it. A strong reader: it knows every cell
                 that holds a plate, has a template of every possible plate at 5 x 5 offsets, drawn and reduced by
                 the same code, and the covariance of what the clutter adds; it weighs all plates and all offsets
    black crop   looks at every plate, but each crop is black: what the crops' positions alone give away
    gold crop    reads the one right crop, 48 x 48, sprite by sprite, least squares over offsets

A kind is admitted when, on hard, the first three are at chance (25 %, within 5 points) and the last is above 97 %.
On easy and medium the plates may be read from afar: extra rows, no gate.

    $ python tests/bench_probes.py                   # about 4 minutes on one core
    $ python tests/bench_probes.py --check           # exit code 1 when the gate fails
"""
import itertools
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import data                                                         # noqa: E402  (found through the line above)
from env import crop_pixels, fit_pixels                             # noqa: E402

CELL, GRID, VIEW = 48, 6, 48                       # pixels per cell, cells per side, pixels per side of the overview
PATCH = VIEW // GRID                               # a cell in the overview: 8 x 8 pixels
OFFSETS = tuple(itertools.product((-2, -1, 0, 1, 2), repeat=2))     # plates lie up to 5 % of a cell off its centre
MARGIN = 8                                         # pixels around a crop, for windows that stick out
GREY = 96                                          # what the clutter is on average


def plates(kind: str) -> list[tuple[tuple, str]]:
    """Every (parts, answer) that a plate of this kind may show."""
    painted = list(itertools.product(data.SHAPES, data.COLORS))
    plain = [(name, None) for name in data.DIGITS]
    if kind == "attribute":
        return [((part,), part[1]) for part in painted]
    if kind == "sign":
        return [(((letter, None), digit), digit[0]) for letter in data.LETTERS for digit in plain]
    right = plain if kind == "conjunction" else painted
    return [((part, other), part[1]) for part in painted for other in right]


def asked(probe: data.Probe, shown: list[tuple[tuple, str]]) -> np.ndarray:
    """(plates,) bool: which of them would be the target of this probe."""
    checks = probe.meta["checks"]
    return np.array([all(parts[i][0] == name for i, name in checks) for parts, _ in shown])


class Overview:
    """The reader of the reduced picture, for one kind and difficulty: P plates, J offsets, D = 8 * 8 * 3 numbers."""

    def __init__(self, kind: str, difficulty: str, training: list[data.Probe]):
        self.shown = plates(kind)
        self.templates = self._draw_templates(difficulty)                                   # (P, J, D)
        index = {plate: i for i, plate in enumerate(self.shown)}
        patches, truth = [], []
        for probe in training:
            patches.append(self.patches(probe))
            truth += [index[tuple(map(tuple, item["parts"])), item["answer"]] for item in probe.meta["items"]]
        patches, templates = np.concatenate(patches), self.templates[truth]                 # (N, D), (N, J, D)
        self.mean, whiten = 0.0, np.eye(patches.shape[1], dtype=np.float32)
        for _ in range(3):            # which offset fits best, then what is left over, then again in its metric
            left = patches[:, None] - templates - self.mean
            best = ((left @ whiten) ** 2).sum(2).argmin(1)
            left = patches - templates[np.arange(len(best)), best]
            self.mean = left.mean(0)
            covariance = np.cov(left.T) + 2 * np.eye(left.shape[1])        # 2: rounding, and few data
            whiten = np.linalg.cholesky(np.linalg.inv(covariance)).astype(np.float32)
        self.whiten = whiten
        flat = ((self.templates + self.mean) @ whiten).reshape(-1, whiten.shape[1])
        self.flat, self.flat_norm = flat, (flat ** 2).sum(1)

    def _draw_templates(self, difficulty: str) -> np.ndarray:
        """(P, J, D): every plate at every offset on plain grey, reduced as the overview is; two cells per plate."""
        columns = 24
        rows = -(-len(self.shown) // columns)
        size = round(data.DIFFICULTIES[difficulty][1] * CELL)
        templates = []
        for dx, dy in OFFSETS:
            canvas = Image.new("RGB", (columns * 2 * CELL, rows * 2 * CELL), (GREY,) * 3)
            for i, (parts, _) in enumerate(self.shown):
                x, y = (2 * (i % columns) + 0.5) * CELL + dx, (2 * (i // columns) + 0.5) * CELL + dy
                data._draw_plate(canvas, parts, x, y, CELL, size, random.Random(0))
            pixels = canvas.width * canvas.height // (CELL // PATCH) ** 2
            small = np.asarray(fit_pixels(canvas, pixels, pixels), np.float32)
            cells = small.reshape(rows, 2, PATCH, columns, 2, PATCH, 3)[:, 0, :, :, 0]      # (rows, 8, columns, 8, 3)
            templates.append(cells.transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)[:len(self.shown)])
        return np.stack(templates, 1)

    def patches(self, probe: data.Probe) -> np.ndarray:
        """(K, D): the cells of the plates, cut from the overview."""
        view = np.asarray(fit_pixels(probe.open(), VIEW * VIEW, VIEW * VIEW), np.float32)
        cells = [item["cell"] for item in probe.meta["items"]]
        return np.stack([view[y * PATCH:(y + 1) * PATCH, x * PATCH:(x + 1) * PATCH].ravel() for x, y in cells])

    def answer(self, probe: data.Probe) -> str:
        """The most probable answer, given the overview."""
        seen = self.patches(probe) @ self.whiten                                            # (K, D)
        fit = seen @ self.flat.T - 0.5 * self.flat_norm                           # (K, P * J), log-likelihood
        fit = np.logaddexp.reduce(fit.reshape(len(seen), len(self.shown), -1), axis=2)      # (K, P)
        return vote(fit, asked(probe, self.shown), [answer for _, answer in self.shown])


def vote(fit: np.ndarray, wanted: np.ndarray, answers: list[str]) -> str:
    """The answer with the largest posterior from log-likelihoods (K plates seen, P plates possible).

    Exactly one plate is the target, each equally likely: the odds of plate k are P(seen | wanted) / P(seen | not).
    """
    yes = np.logaddexp.reduce(fit[:, wanted], axis=1)
    odds = yes - np.logaddexp.reduce(fit[:, ~wanted], axis=1)
    target = np.exp(odds - odds.max())[:, None] * np.exp(fit[:, wanted] - yes[:, None])     # (K, wanted plates)
    score: dict[str, float] = Counter()
    for value, answer in zip(target.sum(0), itertools.compress(answers, wanted)):
        score[answer] += value
    return max(score, key=score.get)


def read_crop(crop: Image.Image, kind: str, difficulty: str) -> np.ndarray:
    """(P,) log-likelihoods of the plates that a crop may show, read sprite by sprite from its native pixels."""
    pixels = np.asarray(fit_pixels(crop, VIEW * VIEW, VIEW * VIEW), np.float32)
    size = round(data.DIFFICULTIES[difficulty][1] * CELL)
    shown = plates(kind)
    slots = len(shown[0][0])
    middle = pixels[CELL // 4:-CELL // 4, CELL // 8:-CELL // 8].reshape(-1, 3).mean(1)
    tone = np.quantile(middle, 0.9)                                              # the plate is the brightest
    pixels = np.pad(pixels, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), mode="edge")
    fits: list[dict] = []
    for slot in range(slots):
        left = MARGIN + round(CELL / 2 + (slot - (slots - 1) / 2) * 0.42 * CELL - size / 2)
        top = MARGIN + round(CELL / 2 - size / 2)
        windows = np.stack([pixels[top + dy:top + dy + size, left + dx:left + dx + size]
                            for dx, dy in itertools.product(range(-4, 5), repeat=2)])       # (81, size, size, 3)
        fit = {}
        for name, color in {parts[slot] for parts, _ in shown}:
            sprite = data._sprite(name, data.COLORS[color] if color else data.INK, size, CELL / 16)
            alpha = np.asarray(sprite, np.float32)[..., 3:] / 255
            ink = np.array(data.COLORS[color] if color else data.INK, np.float32) * tone / 220
            error = (windows - tone * (1 - alpha) - ink * alpha) ** 2
            fit[name, color] = -error.mean((1, 2, 3)).min() / 20                            # 20: grey levels squared
        fits.append(fit)
    return np.array([sum(fit[part] for fit, part in zip(fits, parts)) for parts, _ in shown])


def gold_crop(probe: data.Probe, black: bool = False) -> str:
    """What the reader of crops answers: of the gold crop, or of all K crops where each of them is black."""
    shown = plates(probe.source)
    boxes = [data.cell_box(item["cell"], GRID) for item in probe.meta["items"]] if black else probe.boxes
    fit = []
    for box in boxes:
        crop = probe.open().crop(crop_pixels(probe.open().size, box))
        crop = Image.new("RGB", crop.size) if black else crop
        fit.append(read_crop(crop, probe.source, probe.difficulty))
    return vote(np.stack(fit), asked(probe, shown), [answer for _, answer in shown])


@dataclass(frozen=True)
class Config:
    probes: int = 300                  # per kind and difficulty
    training: int = 150                # more, for the overview reader to learn the clutter from
    kinds: tuple[str, ...] = data.PROBE_KINDS
    difficulties: tuple[str, ...] = ("hard", "medium", "easy")
    check: bool = False                # exit code 1 when a kind fails the gate


def main(cfg: Config) -> None:
    failed = []
    print(f"{'':24s}{'blind':>14s}{'overview':>14s}{'black crop':>14s}{'gold crop':>14s}")
    for difficulty, kind in itertools.product(cfg.difficulties, cfg.kinds):
        training = [data.make_probe(kind, difficulty, 10**6 + seed) for seed in range(cfg.training)]
        probes = [data.make_probe(kind, difficulty, seed) for seed in range(cfg.probes)]
        habit: dict[str, Counter] = {}                         # question -> answers, over the training probes
        for probe in training:
            habit.setdefault(probe.question, Counter())[probe.answer] += 1
        usual = Counter(probe.answer for probe in training).most_common(1)[0][0]
        reader = Overview(kind, difficulty, training)
        readers = {
            "blind": lambda p: habit[p.question].most_common(1)[0][0] if p.question in habit else usual,
            "overview": reader.answer,
            "black crop": lambda p: gold_crop(p, black=True),
            "gold crop": gold_crop,
        }
        row = f"{difficulty:8s}{kind:16s}"
        for name, read in readers.items():
            right = sum(read(probe) == probe.answer for probe in probes) / len(probes)
            error = (right * (1 - right) / len(probes)) ** 0.5
            row += f"{100 * right:8.1f} ±{100 * error:4.1f}"
            good = right >= 0.97 if name == "gold crop" else abs(right - 0.25) <= 0.05
            if difficulty == "hard" and not good:
                failed.append(f"{kind} {name} {100 * right:.1f}")
        print(row, flush=True)
    print("the gate holds" if not failed else "the gate fails: " + ", ".join(failed))
    if cfg.check and failed:
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Config))
