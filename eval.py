"""Accuracy against the turn limit: does a policy that was trained with few turns go on searching when it may?

Avg@K: each question is sampled K times at temperature 1, and the mean over questions comes with its standard error.
One pass at the largest limit gives the whole curve, since the policy does not know its limit: an episode counts at
limit L when it answered within L turns.

The controls are the acceptance gate for a trained policy; all of them should end near chance. With `blind` it sees a
grey picture, with `overview` nothing finer than the first view, with `black_crop` each crop is black. Their last
message is opened for the policy as an answer, and where the possible answers are known the likeliest of them is taken,
so that neither a refusal to answer nor a broken message passes for ignorance.

Nothing is kept before the end, and results.json is written last: after a crash, the same command starts again, and
gives what it would have given.

    $ python eval.py                                       # runs/rl on fresh hard probes -> runs/eval
    $ python eval.py --init runs/sft --out runs/eval_sft --against runs/eval     # both curves in one figure
    $ python eval.py --control blind --out runs/eval_blind
    $ python eval.py --data VisualProbe_Hard --samples 32 --turn_limits 4 8 16 24 32 --judge URL --judge_model NAME
    $ python eval.py --data VisualProbe_Hard --endpoint URL --model NAME         # a policy behind a server, same table

Read next: README.md.
"""
import base64
import dataclasses
import html
import io
import json
import random
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
from data import COLORS, DIGITS, write_atomic
from env import ERROR_CODES, MAX_IMAGE_PIXELS, STOPS, CropEnv, fit_pixels, grade
from model import (
    Policy,
    PolicyFlags,
    Protocol,
    load_policy,
    memory_advice,
    policy_flags,
    token_logprobs,
    worded,
)
from rollout import Episode, draw_search, messages, rollout
from train_rl import Judge, judge_all, open_judge

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (after the choice of a backend without a window)

ANSWER_NOW = "<think>guess</think><answer>"      # how a control opens the last message; the searcher guesses so too


@dataclass(frozen=True)
class Config(PolicyFlags):
    init: Path = Path("runs/rl")       # the policy: a run directory, a Hugging Face directory or id
    out: Path = Path("runs/eval")      # results.json, episodes.jsonl, curve.png, trajectories.html
    count: int | None = None           # fresh probes (default: 400), or the first rows of `data` (default: all)
    kinds: tuple[str, ...] = data.PROBE_KINDS
    difficulties: tuple[str, ...] = ("hard",)  # of fresh probes, drawn evenly
    data: Path | None = None           # probes: our JSONL or a published set; default: fresh ones, never trained on
    max_image_pixels: int = MAX_IMAGE_PIXELS  # width * height: a larger image file of `data` is refused
    samples: int = 1                   # K episodes per probe: Avg@K
    judge: str = "exact"               # of open answers: exact, base (the model below the adapters), or a server's URL
    judge_model: str = ""              # the name of the judge at that server
    endpoint: str = ""                 # a policy behind an OpenAI-compatible server, http://HOST:PORT/v1, not `init`
    model: str = ""                    # its name there
    max_pixels: tuple[int, ...] = ()   # pixel budgets of a view, a pass each, the first in full; default: the policy's
    turn_limits: tuple[int, ...] = (2, 4, 6, 8, 12, 16, 24, 32)  # points of the curve; episodes run to the largest
    trained_limit: int = 6             # marked in the figure
    control: Literal["none", "blind", "overview", "black_crop"] = "none"  # what is hidden from the policy, see above
    temperature: float = 1.0
    max_context: int = 16384           # tokens per episode before its last turn
    max_turn_tokens: int = 48          # tokens per turn; a longer one is cut, and void (real bases: 1024)
    against: tuple[Path, ...] = ()     # other eval directories, for the figure
    label: str = ""                    # of this curve; default: the name of `init`
    slots: int = 128                   # episodes at once
    shown: int = 12                    # episodes in trajectories.html
    seed: int = 1_000_000              # of the fresh probes and of sampling; training draws from others


class BlackCrops(CropEnv):
    """The black-crop control: every observation but the first view is black."""

    def _view(self, image: Image.Image) -> dict:
        part = super()._view(image)
        return part if image is self.image else {**part, "image": Image.new("RGB", part["image"].size)}


class BlackEpisode(Episode):
    """An episode of that control, for those who look at its views again."""

    def views(self) -> list[Image.Image]:
        first, *crops = super().views()
        return [first, *(Image.new("RGB", crop.size) for crop in crops)]


def controlled(probe: data.Probe, control: str, policy: Policy) -> data.Probe:
    """The probe as a control shows it: grey all over, or no finer than the first view."""
    if control in ("none", "black_crop"):
        return probe                                       # its photograph stays on disk until its turn comes
    image = probe.open()
    if control == "blind":
        image = Image.new("RGB", image.size, (128, 128, 128))
    if control == "overview":
        image = fit_pixels(image, policy.protocol.min_pixels, policy.protocol.max_pixels).resize(image.size)
    return dataclasses.replace(probe, image=image)


@dataclass
class Spoken(Episode):
    """An episode of a policy behind a server: texts, no tokens."""
    texts: list[str] = dataclasses.field(default_factory=list)


def spoken(cfg: Config, probes: list[data.Probe], protocol: Protocol, max_turns: int) -> list[Episode]:
    """`cfg.samples` adjacent episodes per probe, as `rollout` gives them, of the policy behind cfg.endpoint."""
    speak = data.speaker(data.Endpoint(cfg.endpoint, cfg.model), temperature=cfg.temperature,
                         max_tokens=cfg.max_turn_tokens)
    asked = [probe for probe in probes for _ in range(cfg.samples)]
    told = {key: value for key, value in vars(protocol).items() if key != "before_question"}     # the server lays out
    played = data.play(asked, speak, cfg.slots, max_turns=max_turns, **told)
    nothing, ended = np.zeros(0), {}
    for number, t in tqdm(played, total=len(asked), desc="episodes", leave=False):
        ended[number] = Spoken(t.probe, nothing, nothing, nothing, t.crops, len(t.texts), t.stop, t.answer, t.reward,
                               t.errors, (protocol.min_pixels, protocol.max_pixels), texts=t.texts)
    return [ended[number] for number in range(len(asked))]


@torch.no_grad()
def choose(policy: Policy, episode: Episode, max_turns: int) -> Episode:
    """A control's episode with its last message, opened by ANSWER_NOW, ended by the likeliest of the possible answers.

    Unchanged if it ended before that message, or if the possible answers are not known (neither options nor ours).
    """
    probe = episode.probe
    ours = () if probe.source not in data.PROBE_KINDS else DIGITS if probe.answer in DIGITS else COLORS
    choices = list(probe.options or ours)
    if episode.turns < max_turns or not choices:
        return episode
    begun = np.diff(episode.assistant_mask, prepend=False) & episode.assistant_mask    # (T,) where messages begin
    opened = episode.token_ids[:np.flatnonzero(begun)[-1]]
    rows = []
    for choice in choices:
        ids = np.append(opened, [*policy.encode(f"{choice}</answer>"), policy.im_end])
        rows.append(dataclasses.replace(
            episode, token_ids=ids, assistant_mask=np.arange(len(ids)) >= len(opened), logprobs=np.zeros(len(ids)),
            stop="answer", answer=choice, reward=grade(choice, probe.answer, probe.options)))
    likeliest = rows[int(token_logprobs(policy, rows).sum(1).argmax())]
    mask = np.append(episode.assistant_mask[:len(opened)], likeliest.assistant_mask[len(opened):])
    return dataclasses.replace(likeliest, assistant_mask=mask)


# ------------------------------------------------------------------------------------------------ numbers

def mean_and_error(per_question: list[list[float]]) -> tuple[float, float]:
    """Mean over questions of the mean over samples, and its standard error over questions (0 for one question).

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

    An unjudged episode counts nowhere but in "unjudged". The four orders of the options of an HR-Bench question are one
    question, so the accuracy is the mean over the four cycles, and the error is that over questions.
    """
    number = {id(e): e.probe.meta.get("cycle_of", i // samples) for i, e in enumerate(episodes)}      # of its question
    scored = [e for e in episodes if e.judged]
    last = limits[-1]
    if not scored:
        raise data.UserError("the judge failed on every episode: nothing to report")

    def accuracy(chosen: list[Episode], limit: int) -> dict:
        groups = defaultdict(list)
        for e in chosen:
            groups[number[id(e)]].append(correct_within(e, limit))
        mean, error = mean_and_error(list(groups.values()))
        return {"accuracy": mean, "error": error, "questions": len(groups)}

    def by(key) -> dict:
        groups = defaultdict(list)
        for e in scored:
            groups[str(key(e.probe))].append(e)
        return {name: accuracy(groups[name], last) for name in sorted(groups, key=lambda n: (len(n), n))}

    edges = [0, *limits]
    return {
        "curve": {str(limit): accuracy(scored, limit) for limit in limits},
        "correct_by_turns": {f"{low + 1}-{high}": statistics.fmean(
            correct_within(e, high) - correct_within(e, low) for e in scored) for low, high in zip(edges, limits)},
        "stops": {name: statistics.fmean(e.stop == name for e in episodes) for name in STOPS},
        "errors": {code: statistics.fmean(e.errors.count(code) for e in episodes) for code in ERROR_CODES[1:]},
        "unjudged": len(episodes) - len(scored),
        "mean_turns": statistics.fmean(e.turns for e in episodes),
        "repeated_crops": (sum(len(e.crops) - len(set(e.crops)) for e in episodes)
                           / max(1, sum(len(e.crops) for e in episodes))),
        "by_source": by(lambda probe: probe.source),
        "by_category": by(lambda probe: probe.meta.get("category") or probe.source),
        "by_cycle": by(lambda probe: probe.meta.get("cycle_category", "unknown")),
        "by_k": by(lambda probe: probe.meta.get("k", "unknown")),
    }


def print_table(results: dict) -> None:
    print("turn limit   " + "".join(f"{limit:>7s}" for limit in results["curve"]))
    print("correct (%)  " + "".join(f"{100 * row['accuracy']:7.1f}" for row in results["curve"].values()))
    print("  +- error   " + "".join(f"{100 * row['error']:7.1f}" for row in results["curve"].values()))
    print("right after  " + "  ".join(
        f"{turns} turns {100 * share:.1f} %" for turns, share in results["correct_by_turns"].items()))
    print("stops        " + "  ".join(f"{name} {100 * share:.1f} %" for name, share in results["stops"].items()))
    print(f"mean turns   {results['mean_turns']:.1f}   repeated crops {100 * results['repeated_crops']:.1f} %   "
          f"unjudged {results['unjudged']}")
    for title in ("by_source", "by_category", "by_cycle", "by_k", "by_pixels"):
        if set(results[title]) != {"unknown"}:
            print(f"{title:12s} " + "  ".join(f"{name} {100 * row['accuracy']:.1f} +- {100 * row['error']:.1f}"
                                              for name, row in results[title].items()))


# ------------------------------------------------------------------------------------------------ pictures

def draw_curves(curves: dict[str, dict], trained_limit: int, path: Path) -> None:
    """Accuracy against the turn limit, one line per run, with standard errors; the training limit is marked."""
    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for label, curve in curves.items():
        limits = [int(limit) for limit in curve]
        axes.errorbar(limits, [100 * row["accuracy"] for row in curve.values()],
                      [100 * row["error"] for row in curve.values()], marker="o", capsize=3, label=label)
    axes.axvline(trained_limit, color="grey", linestyle="--", linewidth=1)
    axes.text(trained_limit + 0.4, 96, "limit in training", color="grey", fontsize=9)
    axes.set(xlabel="turn limit at test", ylabel="correct (%)", ylim=(0, 100))
    axes.set_xticks(sorted({int(limit) for curve in curves.values() for limit in curve}))
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right")
    with data.replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    pyplot.close(figure)


def picture(image: Image.Image, side: int) -> str:
    """An <img> of the image, enlarged or reduced to `side` pixels on its longer side, embedded."""
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    image = image.resize(size, Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def said(policy: Policy | None, episode: Episode) -> list[tuple[str, bool]]:
    """(message, whether a view answers it) of each turn."""
    if isinstance(episode, Spoken):
        env = CropEnv(episode.probe.open(), "", max_turns=len(episode.texts) + 1)
        replies = [env.step(text)[0] for text in episode.texts]
        return [(text, bool(reply) and len(reply["content"]) == 2) for text, reply in zip(episode.texts, replies)]
    begun = np.cumsum(np.diff(episode.assistant_mask, prepend=False) & episode.assistant_mask)       # (T,) messages
    looks = set(begun[episode.token_ids == policy.vision_start].tolist())          # the messages that a view answers
    return [(text, number in looks) for number, text in enumerate(messages(policy, episode), 1)]


def page(policy: Policy | None, episodes: list[Episode]) -> str:
    """A plain page: per episode where it looked, what it saw, and what it said. Model text is escaped."""
    parts = ["<!doctype html><meta charset=utf-8><title>Trajectories</title><style>body{font:14px sans-serif;"
             "max-width:1000px;margin:2em auto}section{border-top:1px solid #ccc;padding:1em 0;overflow:auto}"
             "section>img{float:left;margin:0 1em 1em 0}li{margin:.3em 0;min-height:4em}"
             "li img{vertical-align:middle;margin-left:1em}code{white-space:pre-wrap}</style><h1>Trajectories</h1>"]
    for episode in episodes:
        views = iter(episode.views()[1:])
        verdict = ("unjudged" if not episode.judged else "correct" if episode.reward else
                   f"wrong, the answer is {episode.probe.answer}")
        parts.append(f"<section>{picture(draw_search(episode), 360)}<b>{html.escape(episode.probe.prompt())}</b> "
                     f"{html.escape(verdict)} (stop: {episode.stop}, {episode.turns} turns)<ol>")
        for text, looked in said(policy, episode):
            view = next(views, None) if looked else None
            parts.append(f"<li><code>{html.escape(text)}</code>{picture(view, 64) if view else ''}</li>")
        parts.append("</ol></section>")
    return "\n".join(parts)


def record(policy: Policy | None, episode: Episode) -> dict:
    """One line of episodes.jsonl; "reward" is null where the judge failed."""
    return {"question": episode.probe.question, "answer": episode.probe.answer, "prediction": episode.answer,
            "reward": episode.reward if episode.judged else None, "stop": episode.stop, "turns": episode.turns,
            "errors": episode.errors, "crops": [dataclasses.asdict(crop) for crop in episode.crops],
            "messages": episode.texts if isinstance(episode, Spoken) else messages(policy, episode),
            "source": episode.probe.source, "k": episode.probe.meta.get("k"), "seed": episode.probe.meta.get("seed")}


# ------------------------------------------------------------------------------------------------ the command

def play_all(cfg: Config, policy: Policy | None, protocol: Protocol, probes: list[data.Probe], max_turns: int,
             judge: Judge | None) -> list[Episode]:
    """One pass over all probes, views sized by `protocol`, scored; `cfg.samples` adjacent episodes per probe."""
    if cfg.endpoint:
        episodes = spoken(cfg, probes, protocol, max_turns)
    else:
        policy.protocol = protocol
        episodes = rollout(
            policy, [controlled(probe, cfg.control, policy) for probe in probes], group_size=cfg.samples,
            max_turns=max_turns, max_context=cfg.max_context, max_turn_tokens=cfg.max_turn_tokens,
            temperature=cfg.temperature, seed=cfg.seed, slots=cfg.slots, progress="episodes",
            make_env=BlackCrops if cfg.control == "black_crop" else CropEnv,
            force_answer="" if cfg.control == "none" else ANSWER_NOW)
    if cfg.control == "black_crop":
        episodes = [BlackEpisode(**vars(episode)) for episode in episodes]
    if cfg.control != "none":
        episodes = [choose(policy, episode, max_turns) for episode in episodes]
    judge_all(episodes, judge)
    return episodes


@memory_advice("--slots", "--max_context", "--turn_limits")
def main(cfg: Config) -> None:
    count = 400 if cfg.count is None else cfg.count
    if not cfg.turn_limits or min(*cfg.turn_limits, cfg.samples, cfg.slots, *cfg.max_pixels, count) < 1:
        raise data.UserError("--turn_limits, --samples, --slots, --max_pixels and --count start at 1")
    if cfg.endpoint and (cfg.control != "none" or not cfg.model):
        raise data.UserError("--endpoint needs --model NAME, and plays no --control")
    if cfg.data:
        probes = data.load_probes(cfg.data, cfg.count, cfg.max_image_pixels)
    else:
        stream = data.probe_stream(cfg.kinds, cfg.difficulties, cfg.seed)
        probes = [next(stream) for _ in range(count)]
    limits = tuple(sorted(cfg.turn_limits))
    against = []
    for other in cfg.against:
        if not (other / "results.json").exists():
            raise data.UserError(f"--against: no results.json in {other}")
        against.append(data.read_json(other / "results.json"))
        if not {"label", "curve"} <= against[-1].keys():
            raise data.UserError(f"--against: {other / 'results.json'} holds no label and curve")
    policy = None if cfg.endpoint else load_policy(str(cfg.init), **policy_flags(cfg) | {"max_pixels": None})
    protocol = policy.protocol if policy else worded(Protocol(), system_prompt=cfg.system_prompt,
                                                     observation_prompt=cfg.observation_prompt,
                                                     min_pixels=cfg.min_pixels)
    judge = open_judge(cfg.judge, cfg.judge_model, policy)
    data.lock(cfg.out)
    began, episodes, by_pixels = time.time(), [], {}
    for budget in cfg.max_pixels or (protocol.max_pixels,):
        sized = dataclasses.replace(protocol, max_pixels=budget, min_pixels=min(protocol.min_pixels, budget))
        played = play_all(cfg, policy, sized, probes, limits[-1], judge)
        told = summarise(played, cfg.samples, limits)
        by_pixels[str(budget)] = {**told["curve"][str(limits[-1])], "mean_turns": told["mean_turns"]}
        episodes = episodes or played
    label = cfg.label or cfg.model or cfg.init.name
    results = {"label": label, "init": cfg.endpoint or str(cfg.init), "probes": len(probes), "samples": cfg.samples,
               "seed": cfg.seed, "control": cfg.control, "judge": cfg.judge, "seconds": round(time.time() - began, 1),
               **summarise(episodes, cfg.samples, limits), "by_pixels": by_pixels}
    (cfg.out / "results.json").unlink(missing_ok=True)     # of an earlier evaluation; if it is there, all of it is
    lines = (json.dumps(record(policy, episode)) + "\n" for episode in episodes)
    write_atomic(cfg.out / "episodes.jsonl", "".join(lines).encode())
    curves = {label: results["curve"]}
    for other, theirs in zip(cfg.against, against):
        name = theirs["label"] if theirs["label"] not in curves else f"{theirs['label']} ({other})"
        curves[name] = theirs["curve"]
    draw_curves(curves, cfg.trained_limit, cfg.out / "curve.png")
    shown = random.Random(cfg.seed).sample(episodes, min(cfg.shown, len(episodes)))
    write_atomic(cfg.out / "trajectories.html", page(policy, shown).encode())
    write_atomic(cfg.out / "results.json", json.dumps(results, indent=1).encode())
    print_table(results)
    print(f"{len(episodes)} episodes in {results['seconds']} s; results, curve.png and trajectories.html in {cfg.out}")


REAL = Config(max_turn_tokens=1024, max_context=32_768, slots=4)
PRESETS = {"tiny": Config(), "qwen3b": REAL, "qwen7b": dataclasses.replace(REAL, quantize="nf4"),
           "paper": dataclasses.replace(REAL, max_pixels=(2_000_000,))}


if __name__ == "__main__":
    data.command(main, Config, PRESETS)
