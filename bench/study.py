"""The study: which claims of the paper hold at this size, and at what cost? Question by question, run by run.

The plan is a table in docs/study.md, written before its runs. A line of it is a setting, and each seed of a
setting is a chain of three commands: cold start, GRPO, evaluation. The study adds no training code. A
finished evaluation is a row of docs/results/study.json and is not made again, and training goes on where it
stopped, so the same command finishes an interrupted study. The tables of docs/study.md and README.md, and
the curve, are made from the rows alone.

    $ python bench/study.py --photos photos     # all of it, about 7 hours on two cores
    $ python bench/study.py --only 1 5
    $ python bench/study.py --report            # no runs: the tables and the curve once more
"""

import collections
import contextlib
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import UserError, cli, find_commit, lock, write_atomic

from tqdm import tqdm

from data import PROBE_KINDS, make_scene, probe_stream, save_probes, write_search
from env import OVER_TURN
from eval import draw_curves, mean_and_error

ROOT, COMMIT = Path(__file__).resolve().parents[1], find_commit()  # before the pages change
RESULTS = ROOT / "docs/results/study.json"
PAGES = (ROOT / "README.md", ROOT / "docs/study.md")
LIMITS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48)  # of turns, at test; one pass at the largest gives all


@dataclass(frozen=True)
class Config:
    only: tuple[int, ...] = ()  # questions; default: all
    out: Path = Path("runs/study")  # policies and evaluations
    photos: Path | None = None  # folder of photographs, for question 11
    jobs: int = 2  # chains side by side, each with one thread
    report: bool = False  # no runs


@dataclass(frozen=True)
class Chain:
    """One seed of one setting."""

    question: int
    setting: str
    seed: int
    flags: tuple[str, str, str]  # of cold start, GRPO, evaluation; "-": left out


def read_plan() -> list[Chain]:
    """The chains of the table at the end of docs/study.md, in order."""
    table, chains = PAGES[1].read_text().partition("## The plan")[2], []
    for line in re.findall(r"(?m)^\| (\d.*)\|$", table):
        question, setting, seeds, *flags = (cell.strip() for cell in line.split("|"))
        chains += [Chain(int(question), setting, seed, tuple(flags)) for seed in range(int(seeds))]
    return chains


# ---------------------------------------------------------------------------------------------- making runs

folder_locks: dict[Path, threading.Lock] = collections.defaultdict(threading.Lock)


def find_set(cfg: Config, name: str) -> Path:
    """The photographs, or a cold start of answers without a search, made when it is first needed."""
    if name == "photos":
        if not cfg.photos:
            raise UserError("question 11 needs --photos DIR, a folder of photographs; --only leaves it out")
        return cfg.photos.absolute()
    folder = (cfg.out / name).absolute()
    with folder_locks[folder]:
        if not folder.exists():
            probes = [make_scene(kind, "hard", n) for n in range(100) for kind in PROBE_KINDS]
            for probe in probes:
                probe.meta["texts"] = [f"<think>guess</think><answer>{probe.answer}</answer>"]
            save_probes(probes, folder)
    return folder


def run_command(cfg: Config, folder: Path, command: str) -> None:
    """Runs it with --out FOLDER unless it has ended before; goes on if it was interrupted.

    UserError if it fails or is stopped. What was trained is saved, and the next call goes on.
    """
    marker = folder / f"done{re.sub(r'[^a-z0-9]+', '-', command)[-150:]}"
    if marker.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, *shlex.split(command), "--out", str(folder)]
    words += ["--resume"] if (folder / "run.json").exists() else []
    threads = {"OMP_NUM_THREADS": "1"} if cfg.jobs > 1 else {}
    with open(folder / "log.txt", "ab") as log:
        code = subprocess.call(words, cwd=ROOT, stdout=log, stderr=log, env=os.environ | threads)
    stopped = "go on with:" in (folder / "log.txt").read_text()[-500:]  # by Ctrl-C: the exit code is 0
    if code or stopped:
        raise UserError(f"{command} was stopped, or failed (exit code {code}); see {folder}/log.txt")
    marker.touch()


def make_row(cfg: Config, chain: Chain) -> dict:
    """Makes what is missing of a chain. Its row: the outcome of each probe, and what training was like."""
    folder, policy, commands = cfg.out.absolute() / f"seed{chain.seed}", "tiny", []
    with contextlib.ExitStack() as locked:  # nobody trains a policy further while it is evaluated
        for script, flags in zip(("train_sft.py", "train_rl.py", "eval.py"), chain.flags):
            if flags == "-":
                continue
            begin = f"{script} --init {policy} " if script != "train_sft.py" else f"{script} "
            begin += f"--seed {chain.seed}" if script != "eval.py" else "--shown 1"
            if script == "eval.py" and "--turn_limits" not in flags:
                begin += f" --turn_limits {' '.join(map(str, LIMITS))}"
            given = re.sub(r"\{(\w+)\}", lambda name: str(find_set(cfg, name[1])), flags)
            name = re.sub(r"--steps [0-9]+", "", f"{script[:-3]} {flags}")
            name = f"eval {chain.question} {chain.setting}" if script == "eval.py" else name
            folder /= re.sub(r"[^\w.]+", "-", name).strip("-")
            locked.enter_context(folder_locks[folder])
            commands.append(f"{begin} {given}".strip())
            run_command(cfg, folder, commands[-1])
            policy = str(folder)
    results = json.loads((folder / "results.json").read_text())
    episodes = [json.loads(line) for line in (folder / "episodes.jsonl").open()]
    steps = [json.loads(line) for line in (folder.parent / "metrics.jsonl").open()]
    row = {"question": chain.question, "setting": chain.setting, "seed": chain.seed}
    row["commands"] = [c.replace(f"{cfg.out.absolute()}/", "") for c in commands]
    row |= {"commit": COMMIT, "machine": f"{platform.machine()}, {os.cpu_count()} CPUs"}
    names = ("stops", "mean_turns", "repeated_crops", "mean_tokens", "seconds", "peak_gb")
    row |= {name: results[name] for name in names}
    row["training_seconds"] = round(sum(step["time/step"] for step in steps))
    row["training_over_turn"] = [round(step["over_turn"], 3) for step in steps if "over_turn" in step]
    return row | {"right_at": [e["turns"] if e["reward"] else 0 for e in episodes]}  # turns; 0: not right


def make_rows(cfg: Config, rows: list[dict]) -> Iterator[dict]:
    """Makes the rows that are missing, in the order of the plan. UserError if a command fails."""
    done = {(row["question"], row["setting"], row["seed"]) for row in rows}
    chains = [c for c in read_plan() if (c.question, c.setting, c.seed) not in done]
    chains = [chain for chain in chains if not cfg.only or chain.question in cfg.only]
    with ThreadPoolExecutor(cfg.jobs) as pool:
        futures = [pool.submit(make_row, cfg, chain) for chain in chains]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc="study", unit="row"):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# ---------------------------------------------------------------------------------------------- the report


def score(row: dict, limit: int = 10**6) -> float:
    """Right answers (%) within a turn limit."""
    return 100 * statistics.fmean(0 < turns <= limit for turns in row["right_at"])


def average(values: list[float], digits: int = 1) -> str:
    """Mean over seeds ± its standard error; empty for no seeds."""
    if not values:
        return ""
    mean, error = mean_and_error([[value] for value in values])
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if len(values) > 1 else "")


def format_table(header: list, lines: list[list]) -> str:
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (header, rule, *lines))


def pick(rows: list[dict], question: int, seeds: int = 5) -> dict[str, list[dict]]:
    """The rows of a question, by setting, in the order of the plan."""
    found = {(row["question"], row["setting"], row["seed"]): row for row in rows}
    groups: dict[str, list[dict]] = {}
    for chain in read_plan():
        row = found.get((question, chain.setting, chain.seed))
        if chain.question == question and row and chain.seed < seeds:
            groups.setdefault(chain.setting, []).append(row)
    return groups


MEASURES = ("wrong", "over-turn", "turns", "over-turn in training")


def tabulate(groups: dict[str, list[dict]], limits: tuple[int, ...], measures: tuple = MEASURES) -> str:
    """Accuracy at the limits; how episodes end at the largest; over-turn at the end of training."""
    lines = []
    for setting, rows in groups.items():
        columns: dict = {limit: [score(row, limit) for row in rows] for limit in limits}
        columns["wrong"] = [100 * row["stops"]["answer"] - score(row) for row in rows]
        columns["over-turn"] = [100 * sum(row["stops"][name] for name in OVER_TURN) for row in rows]
        columns["turns"] = [row["mean_turns"] for row in rows]
        ends = [row["training_over_turn"][-10:] or [0] for row in rows]
        columns["over-turn in training"] = [100 * statistics.fmean(end) for end in ends]
        lines.append([setting, len(rows), *(average(columns[name]) for name in (*limits, *measures))])
    return format_table(["setting", "seeds", *limits, *measures], lines)


def tabulate_pairs(masked: list[dict], others: dict[str, list[dict]]) -> str:
    """Probes that one of two policies of the same seed got right and the other not, with the sign test."""
    lines = []
    for (name, rows), limit in itertools.product(others.items(), (6, 32)):
        pairs = [zip(a["right_at"], b["right_at"]) for a, b in zip(masked, rows) if rows is not masked]
        signs = [(0 < a <= limit) - (0 < b <= limit) for pair in pairs for a, b in pair]
        gained, lost = signs.count(1), signs.count(-1)
        tail = sum(math.comb(gained + lost, i) for i in range(min(gained, lost) + 1))
        p = min(1.0, 2 * tail / 2 ** (gained + lost))
        lines += [[name, limit, len(signs), gained, lost, f"{p:.1g}"]] if signs else []
    return format_table(["masked against", "turn limit", "probes", "gained", "lost", "p"], lines)


def tabulate_probes(rows: list[dict]) -> str:
    """Question 9: by kind and K, beside the scripted searcher, which looks at nothing twice or in vain."""
    probes = list(itertools.islice(probe_stream(PROBE_KINDS, ("hard",), 1_000_000), 400))  # those of eval.py
    masked, lines = pick(rows, 1, seeds=3).get("masked", []), []
    for names in ([probe.source for probe in probes], [f"K {probe.meta['k']}" for probe in probes]):
        for name in sorted(set(names)):
            at = [i for i, other in enumerate(names) if other == name]
            parts = [{"right_at": [row["right_at"][i] for i in at]} for row in masked]
            lines.append((name, parts, [probes[i] for i in at]))
    for name, more in pick(rows, 9).items():
        count = int(name.removeprefix("K "))
        lines.append((name, more, [make_scene("sign", "hard", n, candidates=count) for n in range(100)]))
    cells = []
    for name, parts, asked in lines:
        turns = [len(write_search(p, random.Random(0), pattern="depth_first")) for p in asked]
        best = [f"{score({'right_at': turns}, limit):.1f}" for limit in (6, 32)]
        cells.append([name, *(average([score(r, limit) for r in parts]) for limit in (6, 32)), *best, 25])
    return format_table(["probes", 6, 32, "perfect, 6", "perfect, 32", "guessing"], cells)


# Of a base: weights, the tower's, layers, heads of keys, width (config.json); a head has 128 numbers.
BASES = {"3B": (3.09e9, 0.67e9, 36, 2, 2048), "7B": (7.62e9, 0.67e9, 28, 4, 3584)}
VIEW, TEXT = 1276, 160  # tokens of a view of a megapixel, and of the text of a turn


def tabulate_cost(rows: list[dict]) -> str:
    """Question 10: tiny as measured; the bases as counted, in 16 bits, each token read once."""
    lines = []
    for setting, group in pick(rows, 10).items():
        tokens = [row["mean_tokens"] for row in group]
        right = [100 * row["mean_tokens"] / max(score(row), 1e-9) for row in group]
        seconds = [row["seconds"] / len(row["right_at"]) for row in group]
        lines.append(["tiny", setting, average(tokens, 0), average(right, 0), average(seconds, 3)])
        lines[-1] += [average([row["peak_gb"] for row in group], 2), ""]
    for name, (weights, tower, layers, heads, width) in BASES.items():
        for turns in (6, 12, 24, 48):
            tokens = turns * (VIEW + TEXT)
            flop = 2 * weights * tokens + 2 * layers * width * tokens**2 + 8 * tower * turns * VIEW
            gb = (2 * (weights + tower) + 4 * layers * heads * 128 * tokens) / 1e9
            lines.append([name, f"{turns} turns", tokens, "", "", f"{gb:.1f}", f"{flop / 1e15:.2f}"])
    return format_table(["policy", "limit", "tokens", "per right answer", "seconds", "GB", "petaFLOP"], lines)


def make_tables(rows: list[dict]) -> dict[str, str]:
    """The tables by name. Where a question compares with the default, its first three seeds."""
    first, masked = pick(rows, 1, seeds=3), pick(rows, 1).get("masked", [])
    tables = {str(n): tabulate(first | pick(rows, n), (6, 12, 32, 48)) for n in (3, 4, 5, 6, 7, 11)}
    tables |= {str(n): tabulate(pick(rows, n), LIMITS) for n in (1, 2)}
    tables |= {"9": tabulate_probes(rows), "10": tabulate_cost(rows)}
    tables["summary"] = tabulate(pick(rows, 1), (4, 6, 16, 32), MEASURES[:1])
    pairs = {f"{n} pairs": pick(rows, n) for n in (1, 2, 12)}
    for name, groups in pairs.items():
        tables[name] = tabulate_pairs(groups.get("masked", masked), groups)
    return tables


def fill_page(text: str, tables: dict[str, str]) -> str:
    """The page with each table between its markers, `<!-- table NAME -->` and `<!-- end -->`."""
    marked = r"(?s)(<!-- table ([\w ]+) -->\n).*?(<!-- end -->)"
    return re.sub(marked, lambda found: f"{found[1]}\n{tables[found[2]]}\n\n{found[3]}", text)


def report(rows: list[dict]) -> None:
    """Writes the results, the pages and the curve."""
    write_atomic(RESULTS, ("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n").encode())
    tables, curves = make_tables(rows), {}
    for page in PAGES:
        write_atomic(page, fill_page(page.read_text(), tables).encode())
    for setting, group in pick(rows, 1).items():
        points = {n: mean_and_error([[score(row, n) / 100] for row in group]) for n in LIMITS}
        curves[setting] = {str(n): dict(zip(("accuracy", "error"), point)) for n, point in points.items()}
    draw_curves(curves, 6, RESULTS.with_name("curve.png"))


def main(cfg: Config) -> None:
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    if cfg.report:
        report(rows)
    else:
        lock(cfg.out)
        for row in make_rows(cfg, rows):
            rows.append(row)
            report(rows)
    print(f"{len(rows)} rows of {len(read_plan())} in {RESULTS}")


if __name__ == "__main__":
    cli(main, Config)
