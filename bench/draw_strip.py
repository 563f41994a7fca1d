"""Draws one search as a strip for the README: the picture, what the policy sees of it, its crops, its answer.

It plays fresh hard probes until a search ends right after `looks` crops.

    $ python bench/draw_strip.py --init checkpoints/tiny_rl --out docs/search.png
"""

import re
import sys
import textwrap
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import UserError, cli, replacing

from PIL import Image, ImageDraw

from data import PROBE_KINDS, list_photos, probe_stream
from model import load_policy
from rollout import Episode, draw_search, rollout

SIDE, VIEW, GAP = 288, 144, 12  # pixels of the picture and of an enlarged view, and between two of them


@dataclass(frozen=True)
class Config:
    init: Path = Path("checkpoints/tiny_rl")  # the policy
    out: Path = Path("docs/search.png")
    looks: int = 6  # crops of the search to show
    backgrounds: Path | None = None  # folder of photographs; default: drawn clutter
    seed: int = 5  # of the probes


def draw_strip(episode: Episode) -> Image.Image:
    """The whole search on one canvas, left to right."""
    views, probe = episode.views(), episode.probe
    width = 2 * (SIDE + GAP) + (len(views) - 1) * (VIEW + GAP) + GAP
    strip = Image.new("RGB", (width, SIDE + 4 * GAP + 40), "white")
    draw = ImageDraw.Draw(strip)
    draw.text((GAP, GAP), f"{probe.question}  It answers: {episode.answer}.", "black", font_size=20)
    top, left = 40 + GAP, GAP
    strip.paste(draw_search(episode, SIDE), (left, top))
    left += SIDE + GAP
    strip.paste(views[0].resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top))
    draw.text((left, top + SIDE + 4), "what the policy is given: 48 x 48 pixels", "black", font_size=13)
    thoughts = [re.sub("<[^>]*>", "", text.partition("</think>")[0]) for text in episode.texts[1:]]
    for number, (view, thought) in enumerate(zip(views[1:], thoughts), 1):
        left += (SIDE if number == 1 else VIEW) + GAP
        strip.paste(view.resize((VIEW, VIEW), Image.Resampling.NEAREST), (left, top))
        caption = f"crop {number}\n{textwrap.fill(thought, 22)}"
        draw.text((left, top + VIEW + 4), caption, "black", font_size=13)
    return strip


def main(cfg: Config) -> None:
    policy = load_policy(str(cfg.init))
    photos = list_photos(cfg.backgrounds) if cfg.backgrounds else None
    probes = list(islice(probe_stream(PROBE_KINDS, ("hard",), cfg.seed, backgrounds=photos), 64))
    for episode in rollout(policy, probes, max_turns=32, max_turn_tokens=48, seed=cfg.seed):
        if episode.reward and len(episode.crops) == cfg.looks:
            with replacing(cfg.out) as temporary:
                draw_strip(episode).save(temporary)
            return print(f"{cfg.out}: {episode.probe.question} {episode.answer}")
    raise UserError(f"no right search with {cfg.looks} crops among {len(probes)} probes; try another --seed")


if __name__ == "__main__":
    cli(main, Config)
