"""Cold start in context: any vision-language model is shown written searches, and plays (paper, section 3.2).

The model stands behind an OpenAI-compatible server. Its system prompt ends with the searches of
docs/exemplars.md; the questions come from a set of probes. What ends right is kept, without the exemplars.

    OUT/played.jsonl     what the run depends on; then a line for each search, as soon as it has ended
    OUT/probes.jsonl     the searches that were kept, for train_sft.py --data; images that are files are named
    OUT/report.json      how many there were, and how they ended

After any interruption the same command goes on where it was. The key is read from OPENAI_API_KEY.

    $ python prepare/cold_start.py PROBES --endpoint URL --model NAME --out cold_start
    $ python train_sft.py qwen7b --data cold_start
"""

import hashlib
import json
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from shared import Probe, UserError, cli, load_probes, tqdm, write_atomic

from common import lock, write_lines  # isort: skip  (shared puts the repository on the path)
from endpoint import Endpoint, RefusedRequest, play_episode
from model import Protocol

EXEMPLARS = Path(__file__).resolve().parent.parent / "docs" / "exemplars.md"


@dataclass(frozen=True)
class Config:
    probes: tyro.conf.Positional[Path]  # the questions: a set of probes
    endpoint: str  # an OpenAI-compatible server: http://HOST:PORT/v1
    model: str  # the model's name there
    out: Path  # folder for the searches
    count: int | None = None  # the first rows of the set; default: all
    max_turns: int = 12  # assistant messages per search
    max_turn_tokens: int = 1024  # a longer message is cut, and the search ends
    temperature: float = 1.0
    threads: int = 16  # searches at once
    exemplars: Path = EXEMPLARS  # written searches, each below a line `## NAME`

    def __post_init__(self):
        count = 1 if self.count is None else self.count
        if min(self.max_turns, self.max_turn_tokens, self.threads, count) < 1:
            raise ValueError("--count, --max_turns, --max_turn_tokens and --threads start at 1")


def read_exemplars(file: Path) -> str:
    """What the system prompt ends with: the searches of a file, without the text above the first."""
    shown = file.read_text(encoding="utf-8").partition("\n## ")[2] if file.is_file() else ""
    if not shown:
        raise UserError(f"{file}: holds no search; one begins with a line ## NAME")
    return (
        "\nSome searches as they should go. What a view shows stands in brackets there; you are given the "
        f"image itself.\n\n## {shown}"
    )


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_log(file: Path, about: dict) -> list[dict]:
    """The rows of played.jsonl, a new one if there is none. UserError if it began with something else."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    lines = [line for line in lines if line.endswith("\n")]  # the last may be cut
    before, *rows = map(json.loads, lines or [json.dumps(about)])
    changed = [f"{k} ({before.get(k)}, now {about[k]})" for k in about if about[k] != before.get(k)]
    if changed:
        raise UserError(f"{file} was started with another {', '.join(changed)}: give another --out")
    write_lines(file, [about, *rows])
    return rows


def play_all(cfg: Config, probes: list[Probe], numbers: list[int], rows: list[dict], exemplars: str) -> None:
    """Plays the probes of these numbers; adds each search to `rows` and to played.jsonl.

    A refused first message is wrong set-up if nothing was ever played; else that row is left for next time.
    """
    endpoint, writing = Endpoint(cfg.endpoint, cfg.model), threading.Lock()
    options = {"temperature": cfg.temperature, "max_tokens": cfg.max_turn_tokens}

    def play(number: int) -> None:
        try:
            e = play_episode(endpoint, probes[number], Protocol(), cfg.max_turns, exemplars, **options)
        except RefusedRequest as error:
            if not rows:
                raise
            return tqdm.write(f"row {number + 1} was refused: {error}", file=sys.stderr)
        outcome = "kept" if e.reward else "wrong" if e.stop == "answer" else e.stop
        row = {"row": number, "outcome": outcome, "answer": e.answer, "texts": e.texts}
        with writing, open(cfg.out / "played.jsonl", "a") as file:
            rows.append(row)
            file.write(json.dumps(row) + "\n")

    with ThreadPoolExecutor(cfg.threads) as pool:
        list(tqdm(pool.map(play, numbers), total=len(numbers), desc="searches"))


def main(cfg: Config) -> None:
    probes = load_probes(cfg.probes.absolute())  # so that the images have absolute paths
    exemplars = read_exemplars(cfg.exemplars)
    about = {"model": cfg.model, "max_turns": cfg.max_turns, "max_turn_tokens": cfg.max_turn_tokens}
    about |= {"temperature": cfg.temperature, "exemplars": digest(exemplars)}
    about["probes"] = digest(repr([(probe.image, probe.prompt()) for probe in probes]))
    log = cfg.out / "played.jsonl"
    if (cfg.out / "probes.jsonl").exists() and not log.exists():
        raise UserError(f"{cfg.out} holds another set of probes: give another --out")
    lock(cfg.out)
    rows = open_log(log, about)
    played = {row["row"] for row in rows}
    numbers = [number for number in range(len(probes))[: cfg.count] if number not in played]
    play_all(cfg, probes, numbers, rows, exemplars)
    kept = sorted((row for row in rows if row["outcome"] == "kept"), key=lambda row: row["row"])
    searches = [(probes[row["row"]], {"texts": row["texts"]}) for row in kept]
    write_lines(cfg.out / "probes.jsonl", [vars(replace(p, meta=p.meta | texts)) for p, texts in searches])
    report = {**about, "played": len(rows), "acceptance": len(kept) / max(1, len(rows))}
    report["outcomes"] = dict(Counter(row["outcome"] for row in rows).most_common())
    report["turns"] = dict(sorted(Counter(len(row["texts"]) for row in kept).items()))  # of those kept
    write_atomic(cfg.out / "report.json", json.dumps(report, indent=1).encode())
    print(*(f"{name:12s}{report[name]}" for name in ("played", "acceptance", "outcomes", "turns")), sep="\n")
    print(f"{len(kept)} searches in {cfg.out}; next: python train_sft.py qwen7b --data {cfg.out}")


if __name__ == "__main__":
    cli(main, Config)
