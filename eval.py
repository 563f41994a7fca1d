"""Accuracy against the turn limit: does a policy whose GRPO had few turns go on searching when it may?

Avg@K: each question is sampled K times at temperature 1; the mean over questions comes with its standard
error. One pass at the largest limit gives the whole curve, since the policy does not know its limit: an
episode counts at limit L when it answered within L turns.

The controls are the acceptance gate for a trained policy; all of them should end near chance. With `blind`
it sees a grey picture, with `overview` nothing finer than the first view, with `regions` nothing finer than
views of whole regions, with `black_crop` every crop is black. Their last message is opened for the policy
as an answer, and where the possible answers are known the likeliest of them is taken, so that neither a
refusal to answer nor a broken message passes for ignorance.

results.json is written last: after a crash, the same command starts again and gives what it would have given.

    $ python eval.py                                       # runs/rl on fresh hard probes -> runs/eval
    $ python eval.py --init runs/sft --out runs/eval_sft --against runs/eval   # both curves
    $ python eval.py --control blind --out runs/eval_blind
    $ python eval.py qwen7b --data visual_probe --samples 32 --judge URL --judge_model NAME
    $ python eval.py qwen7b --data visual_probe --endpoint URL --model NAME    # a served policy

Read next: README.md.
"""

import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from common import UserError, cli, lock, peak_gb, replacing, write_atomic, write_lines

import matplotlib
import numpy as np
import torch
from PIL import Image

from data import COLORS, DIGITS, PROBE_KINDS, Probe, ProbeFlags, load_probes
from env import ERROR_CODES, STOPS, CropEnv, fit_pixels, grade
from model import (
    Policy,
    PolicyFlags,
    Protocol,
    change_protocol,
    load_policy,
    policy_flags,
    token_logprobs,
    wording_flags,
)
from rollout import Episode, rollout, rollout_flags, write_page
from train_rl import judge_all, open_judge

matplotlib.use("Agg")  # no window
from matplotlib import pyplot  # noqa: E402

ANSWER_NOW = "<think>guess</think><answer>"  # how a control opens the last message, as the searcher guesses


@dataclass(frozen=True)
class Config(PolicyFlags, ProbeFlags):
    init: Path = Path("runs/rl")  # the policy: a run directory, a Hugging Face directory or id
    out: Path = Path("runs/eval")  # results.json, episodes.jsonl, curve.png, trajectories.html
    count: int | None = None  # fresh probes (default: 400), or the first rows of `data` (default: all)
    data: Path | None = None  # a set of probes, as prepare/ makes them; default: fresh ones, never trained on
    samples: int = 1  # K episodes per probe: Avg@K
    judge: str = "exact"  # of open answers: exact, base (the model below the adapters), or a server's URL
    judge_model: str = ""  # the name of the judge at that server
    endpoint: str = ""  # a policy behind an OpenAI-compatible server, http://HOST:PORT/v1, in place of `init`
    model: str = ""  # its name there
    turn_limits: tuple[int, ...] = (2, 4, 6, 8, 12, 16, 24, 32)  # points of the curve, from one pass
    trained_limit: int = 6  # of GRPO, marked in the figure
    control: Literal["none", "blind", "overview", "regions", "black_crop"] = "none"  # see above
    temperature: float = 1.0
    max_context: int = 16384  # tokens per episode before its last turn
    max_turn_tokens: int = 48  # tokens per turn; a longer one is cut, and void (real bases: 1024)
    against: tuple[Path, ...] = ()  # other eval directories, for the figure
    label: str = ""  # of this curve; default: the name of `init`
    wave_size: int = 128  # episodes at once
    shown: int = 12  # episodes in trajectories.html
    seed: int = 1_000_000  # of the fresh probes and of sampling; training draws from others
    compile: bool = False  # torch.compile of the one-token step; not measured on a GPU yet

    def __post_init__(self):
        count = 1 if self.count is None else self.count
        if not self.turn_limits or min(*self.turn_limits, self.samples, self.wave_size, count) < 1:
            raise ValueError("--turn_limits, --samples, --wave_size and --count start at 1")
        if self.endpoint and (self.control != "none" or not self.model):
            raise ValueError("--endpoint needs --model NAME, and plays no --control")


# ---------------------------------------------------------------------------------------------- controls


class BlackCropEnv(CropEnv):
    """The black-crop control: every observation but the first view is black."""

    def _view(self, image: Image.Image) -> dict:
        part = super()._view(image)
        return part if image is self.image else {**part, "image": Image.new("RGB", part["image"].size)}


def hide_image(probe: Probe, control: str, policy: Policy) -> Probe:
    """The probe as a control shows it: grey all over, or no finer than the first view or those of regions."""
    if control in ("none", "black_crop"):
        return probe
    image = probe.open()
    if control == "blind":
        return replace(probe, image=Image.new("RGB", image.size, (128, 128, 128)))
    # Views that together show the whole image.
    views = probe.meta.get("regions", 1) ** 2 if control == "regions" else 1
    coarse = fit_pixels(image, policy.protocol.min_pixels * views, policy.protocol.max_pixels * views)
    return replace(probe, image=coarse.resize(image.size))


@torch.no_grad()
def take_likeliest_answer(policy: Policy, episode: Episode, max_turns: int) -> Episode:
    """A control's episode with its last message, opened by ANSWER_NOW, ended by the likeliest answer.

    Unchanged if it ended before that message, or if the possible answers are not known (neither options nor
    ours).
    """
    probe = episode.probe
    ours = () if probe.source not in PROBE_KINDS else DIGITS if probe.answer in DIGITS else COLORS
    choices = list(probe.options or ours)
    if episode.turns < max_turns or not choices:
        return episode
    begun = np.diff(episode.assistant_mask, prepend=False) & episode.assistant_mask  # (T,) starts of messages
    opened = episode.token_ids[: np.flatnonzero(begun)[-1]]
    rows = []
    for choice in choices:
        ids = np.append(opened, policy.encode(f"{choice}</answer>"))
        mask, reward = np.arange(len(ids)) >= len(opened), grade(choice, probe.answer, probe.options)
        changes = {"stop": "answer", "answer": choice, "reward": reward, "logprobs": np.zeros(len(ids))}
        rows.append(replace(episode, token_ids=ids, assistant_mask=mask, **changes))
    return rows[int(token_logprobs(policy, rows).sum(1).argmax())]


# ---------------------------------------------------------------------------------------------- numbers


def mean_and_error(per_question: list[list[float]]) -> tuple[float, float]:
    """Mean over questions of the mean over samples, and its standard error over questions (0 for one).

    >>> mean, error = mean_and_error([[1, 0], [1, 1], [0, 0]])
    >>> mean, round(error, 6)
    (0.5, 0.288675)
    """
    means = [statistics.fmean(samples) for samples in per_question]
    return statistics.fmean(means), statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0


def correct_within(episode: Episode, limit: int) -> float:
    """1.0 if the episode was answered right in at most `limit` turns."""
    return episode.reward if episode.turns <= limit else 0.0


def summarise(episodes: list[Episode], samples: int, limits: tuple[int, ...]) -> dict:
    """All numbers of results.json; `episodes` holds `samples` adjacent episodes per question.

    An unjudged episode counts nowhere but in "unjudged". Rows with the same "cycle_of" in meta are one
    question (the four orders of the options in HR-Bench), so the error is over questions.
    """
    question = {id(e): e.probe.meta.get("cycle_of", i // samples) for i, e in enumerate(episodes)}
    scored = [e for e in episodes if e.judged]
    if not scored:
        raise UserError("the judge failed on every episode: nothing to report")

    def accuracy(chosen: list[Episode], limit: int) -> dict:
        groups = defaultdict(list)
        for e in chosen:
            groups[question[id(e)]].append(correct_within(e, limit))
        mean, error = mean_and_error(list(groups.values()))
        return {"accuracy": mean, "error": error, "questions": len(groups)}

    def split(key: Callable[[Probe], object]) -> dict:
        groups = defaultdict(list)
        for e in scored:
            groups[str(key(e.probe))].append(e)
        names = sorted(groups, key=lambda name: (len(name), name))
        return {name: accuracy(groups[name], limits[-1]) for name in names}

    crops = sum(len(e.crops) for e in episodes)
    right = [e for e in scored if e.reward]
    deep = sum(any(crop.source for crop in e.crops) for e in right)
    return {
        "curve": {str(limit): accuracy(scored, limit) for limit in limits},
        "stops": {name: statistics.fmean(e.stop == name for e in episodes) for name in STOPS},
        "errors": {
            code: statistics.fmean(e.errors.count(code) for e in episodes) for code in ERROR_CODES[1:]
        },
        "unjudged": len(episodes) - len(scored),
        "mean_turns": statistics.fmean(e.turns for e in episodes),
        "mean_tokens": statistics.fmean(len(e.token_ids) for e in episodes),  # 0 behind a server
        "repeated_crops": sum(len(e.crops) - len(set(e.crops)) for e in episodes) / max(1, crops),
        "crops_of_crops": deep / max(1, len(right)),  # share of the right answers with at least one
        "by_source": split(lambda probe: probe.source),
        "by_category": split(lambda probe: probe.meta.get("category") or probe.source),
        "by_k": split(lambda probe: probe.meta.get("k", "unknown")),
    }


def print_table(results: dict) -> None:
    curve = results["curve"]
    print("turn limit   " + "".join(f"{limit:>7s}" for limit in curve))
    print("correct (%)  " + "".join(f"{100 * row['accuracy']:7.1f}" for row in curve.values()))
    print("  +- error   " + "".join(f"{100 * row['error']:7.1f}" for row in curve.values()))
    stops = (f"{name} {100 * share:.1f} %" for name, share in results["stops"].items())
    print("stops        " + "  ".join(stops))
    line = "mean turns   {mean_turns:.1f}   repeated crops {repeated_crops:.1%}   unjudged {unjudged}"
    print(line.format(**results) + f"   right by a crop of a crop {results['crops_of_crops']:.1%}")
    for title in ("by_source", "by_category", "by_k"):
        rows = results[title].items()
        cells = [f"{name} {100 * row['accuracy']:.1f} +- {100 * row['error']:.1f}" for name, row in rows]
        if len(cells) > 1 and (title != "by_category" or results["by_category"] != results["by_source"]):
            print(f"{title:12s} " + "  ".join(cells))


# ---------------------------------------------------------------------------------------------- pictures


def draw_curves(curves: dict[str, dict], trained_limit: int, path: Path) -> None:
    """Accuracy against the turn limit, each run in a band of standard errors; marks the limit of GRPO."""
    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for label, curve in curves.items():
        limits, rows = [int(limit) for limit in curve], curve.values()
        means, errors = ([100 * row[key] for row in rows] for key in ("accuracy", "error"))
        low, high = np.subtract(means, errors), np.add(means, errors)
        (line,) = axes.plot(limits, means, marker="o", label=label)
        axes.fill_between(limits, low, high, color=line.get_color(), alpha=0.25)
    axes.axvline(trained_limit, color="grey", linestyle="--", linewidth=1)
    axes.text(trained_limit + 0.4, 96, "limit in GRPO", color="grey", fontsize=9)
    axes.set(xlabel="turn limit at test", ylabel="correct (%)", ylim=(0, 100))
    axes.set_xticks(sorted({int(limit) for curve in curves.values() for limit in curve}))
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    pyplot.close(figure)


def make_row(e: Episode) -> dict:
    """One line of episodes.jsonl; "reward" is null where the judge failed."""
    row = {"question": e.probe.question, "answer": e.probe.answer, "prediction": e.answer}
    row |= {
        "messages": e.texts,
        "reward": e.reward if e.judged else None,
        "stop": e.stop,
        "turns": e.turns,
        "errors": e.errors,
    }
    row |= {"source": e.probe.source, "k": e.probe.meta.get("k"), "seed": e.probe.meta.get("seed")}
    return row | {"crops": [asdict(crop) for crop in e.crops]}


# ---------------------------------------------------------------------------------------------- the command


def play_here(cfg: Config, policy: Policy, probes: list[Probe], max_turns: int) -> list[Episode]:
    """`cfg.samples` adjacent episodes per probe, as the control asks for them."""
    controlled = cfg.control != "none"
    options = {"group_size": cfg.samples, "max_turns": max_turns, "progress": "episodes"}
    if controlled:
        options["force_answer"] = ANSWER_NOW
    if cfg.control == "black_crop":
        options["env_class"] = BlackCropEnv
    shown = [hide_image(probe, cfg.control, policy) for probe in probes]
    episodes = rollout(policy, shown, **rollout_flags(cfg) | options)
    return [take_likeliest_answer(policy, e, max_turns) for e in episodes] if controlled else episodes


def play_served(cfg: Config, probes: list[Probe], max_turns: int) -> list[Episode]:
    """The same for a policy behind a server."""
    from endpoint import Endpoint, play_episodes

    return play_episodes(
        Endpoint(cfg.endpoint, cfg.model),
        probes,
        change_protocol(Protocol(), wording_flags(cfg)),
        threads=cfg.wave_size,
        samples=cfg.samples,
        max_turns=max_turns,
        temperature=cfg.temperature,
        max_tokens=cfg.max_turn_tokens,
    )


def read_results(directory: Path) -> dict:
    """results.json of another evaluation. UserError if it is not there or not whole."""
    try:
        results = json.loads((directory / "results.json").read_text())
        return {"label": results["label"], "curve": results["curve"]}
    except (OSError, ValueError, KeyError):
        raise UserError(f"--against: no results.json of an evaluation in {directory}") from None


def main(cfg: Config) -> None:
    stream = cfg.draw_probes(cfg.seed)
    probes = load_probes(cfg.data, cfg.count) if cfg.data else [next(stream) for _ in range(cfg.count or 400)]
    limits = tuple(sorted(cfg.turn_limits))
    others = [read_results(directory) for directory in cfg.against]
    policy = None if cfg.endpoint else load_policy(str(cfg.init), **policy_flags(cfg))
    judge = open_judge(cfg.judge, cfg.judge_model, policy)
    lock(cfg.out)
    began = time.time()
    episodes = play_here(cfg, policy, probes, limits[-1]) if policy else play_served(cfg, probes, limits[-1])
    judge_all(episodes, judge)
    label = cfg.label or cfg.model or cfg.init.name
    results = {
        "label": label,
        "init": cfg.endpoint or str(cfg.init),
        "probes": len(probes),
        "samples": cfg.samples,
        "seed": cfg.seed,
        "control": cfg.control,
        "judge": cfg.judge,
        "seconds": round(time.time() - began, 1),
        "peak_gb": peak_gb(),
        **summarise(episodes, cfg.samples, limits),
    }
    (cfg.out / "results.json").unlink(missing_ok=True)  # of an earlier evaluation; it is written last
    write_lines(cfg.out / "episodes.jsonl", map(make_row, episodes))
    curves = {label: results["curve"]}
    for directory, other in zip(cfg.against, others):
        name = other["label"] if other["label"] not in curves else f"{other['label']} ({directory})"
        curves[name] = other["curve"]
    draw_curves(curves, cfg.trained_limit, cfg.out / "curve.png")
    shown = random.Random(cfg.seed).sample(episodes, min(cfg.shown, len(episodes)))
    write_page(cfg.out / "trajectories.html", shown)
    write_atomic(cfg.out / "results.json", json.dumps(results, indent=1).encode())
    print_table(results)
    print(f"{len(episodes)} episodes in {results['seconds']} s; curve.png, trajectories.html in {cfg.out}")


REAL = Config(max_turn_tokens=1024, max_context=32_768, wave_size=4)
PRESETS = {"tiny": Config(), "qwen3b": REAL, "qwen7b": replace(REAL, quantize="nf4")}


if __name__ == "__main__":
    cli(main, Config, PRESETS)
