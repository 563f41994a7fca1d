"""Many multi-turn episodes at once, in waves, with the KV cache kept across turns.

    a wave of B rows that advance turn by turn; `.` is padding, on the left of what is new and masked for good

    row 0   [prompt, image][turn 1        ][observation 1][turn 2   >
    row 1   [prompt, image][turn 1    ]....[observation 1][turn 2   >       ended turn 1 earlier, waited
    row 2   [prompt, image][turn 1      ]..                                 answered in turn 1, left the wave

(1) The prompt of each question is read once; its keys and values are repeated for the G rollouts of its
group. (2) All rows sample one token each, until every row has ended its turn: its action is closed, or it
said end-of-turn. (3) Each row's text goes to its CropEnv, which answers with an observation or ends the
episode; rows that are done leave. (4) The replies are read in one padded forward, and so on from (2). Every
token is read once, every image is encoded once. Each episode has its own random stream, so its result does
not depend on the rows beside it.

    Q questions, G rollouts per question, B rows of a wave, T tokens, K columns of the cache, V vocabulary

    $ python rollout.py                            # a search by checkpoints/tiny_rl, --seed 2 for another
    $ python rollout.py --image photo.jpg --question "What color is the star?" --init Mini-o3/Mini-o3-7B-v1

Read next: train_sft.py.
"""

import base64
import copy
import inspect
import io
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from common import UserError, cli, replacing, write_atomic

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm
from transformers.cache_utils import Cache, CacheLayerMixin

from data import PROBE_KINDS, Probe, probe_stream
from env import OVER_TURN, Crop, CropEnv, format_action, grade, load_image
from model import Policy, PolicyFlags, load_policy, mrope_positions, policy_flags, vocabulary_logprobs

CHECKPOINTS = Path(__file__).parent / "checkpoints"  # the tiny policy after the cold start and after GRPO
CLOSING_TAGS = ("</grounding>", "</answer>")  # a turn ends where its action ends, as behind a server


@dataclass
class Episode:
    """One conversation, as token ids: written by a rollout or a replay, read by training and evaluation.

    token_ids, assistant_mask, logprobs: (T,) the whole conversation with `<|image_pad|>` expanded; the mask
    is True on the tokens of assistant messages; logprobs are those of sampling, 0 elsewhere. Lists while the
    episode is played. crops: the successful crops in order, made at `crop_turns`. turns: assistant messages;
    texts: these messages. stop: one of env.STOPS. reward: 1.0 or 0.0. errors: codes of failed actions.
    features: per view what the tower made of it (Policy.encode_views), where a frozen tower will not change
    it. judged: False if a judge failed, so that the reward means nothing. advantage, masked: see train_rl.py.
    """

    probe: Probe
    token_ids: np.ndarray | list[int] = field(default_factory=list)
    assistant_mask: np.ndarray | list[bool] = field(default_factory=list)
    logprobs: np.ndarray | list[float] = field(default_factory=list)
    crops: list[Crop] = field(default_factory=list)
    turns: int = 0
    stop: str = ""
    answer: str | None = None
    reward: float = 0.0
    errors: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    crop_turns: list[int] = field(default_factory=list)
    env_class: type[CropEnv] = CropEnv
    view_pixels: tuple[int, int] = (40_000, 2_000_000)  # min_pixels, max_pixels of the views
    kept_views: list[Image.Image] | None = None  # where the image of the probe is not kept
    features: list = field(default_factory=list)
    judged: bool = True
    advantage: float = 0.0
    masked: bool = False

    @property
    def over_turn(self) -> bool:
        """A limit ended it while it still asked for a crop, so its outcome is unknown."""
        return self.stop in OVER_TURN

    def views(self) -> list[Image.Image]:
        """The images as shown to the model, in order; made again from the probe and the crops."""
        if self.kept_views is not None:
            return list(self.kept_views)
        env = self.env_class(self.probe.open(), "", len(self.crops) + 1, *self.view_pixels)
        messages = env.reset() + [env.step(format_action(crop))[0] for crop in self.crops]
        parts = [part for message in messages for part in message["content"]]
        return [part["image"] for part in parts if part["type"] == "image"]

    # -- while it is played

    def begin(self, policy: Policy, env: CropEnv, force_answer: str = "") -> None:
        """Writes the opening messages. force_answer: text that begins the last allowed turn, not sampled."""
        self.env, self.env_class, self.force_answer = env, type(env), force_answer
        self.write(policy, env.reset(), before=())

    def fork(self) -> "Episode":
        """Another rollout of the same question: the same opening, an environment and records of its own."""
        other = copy.copy(self)
        other.env, other.new_views = self.env.clone(), []
        for name in ("token_ids", "assistant_mask", "logprobs", "features", "texts"):
            setattr(other, name, list(getattr(self, name)))
        return other

    def write(self, policy: Policy, messages: list[dict], before: tuple[int | str, ...]) -> None:
        """Appends messages of the environment and opens an assistant turn. Sets new_views to their views."""
        ids, self.new_views = policy.render(messages, before)
        self.turn_start, self.turn_text = len(self.token_ids) + len(ids), ""
        if self.force_answer and self.env.turn + 1 == self.env.max_turns:
            ids += policy.encode(self.force_answer)
        self.token_ids += ids
        self.assistant_mask += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)

    def sample(self, policy: Policy, token: int, logprob: float) -> bool:
        """Appends a sampled token. True when the turn is over: its action is closed, or it is end-of-turn."""
        self.token_ids.append(token)
        self.assistant_mask.append(True)
        self.logprobs.append(logprob)
        self.turn_text += policy.decode_token(token)
        return token == policy.im_end or any(tag in self.turn_text for tag in CLOSING_TAGS)

    def end_turn(self, policy: Policy, complete: bool, max_context: int) -> bool:
        """Hands the turn's text to the environment and writes the reply. True if the episode goes on.

        complete: False for a turn cut by the token limit, which is void. A reply that would take the
        conversation beyond `max_context` tokens is taken back. End-of-turn behind an action is written
        here, and not trained.
        """
        env, ended = self.env, self.token_ids[-1] == policy.im_end
        self.texts.append(policy.decode(self.token_ids[self.turn_start : -1 if ended else None]))
        reply = None
        if complete:
            reply, _ = env.step(self.texts[-1])
        else:
            env.turn += 1
            env.end("void")
        if reply:
            length = len(self.token_ids)
            self.write(policy, [reply], before=("\n",) if ended else (policy.im_end, "\n"))
            if len(self.token_ids) > max_context:
                for record in (self.token_ids, self.assistant_mask, self.logprobs):
                    del record[length:]
                env.take_back_reply()
        if env.stop:
            self.finish(env)
        return env.stop is None

    def finish(self, env: CropEnv) -> None:
        """Takes the outcome over from the environment, and grades it."""
        self.token_ids = np.array(self.token_ids, np.int64)
        self.assistant_mask = np.array(self.assistant_mask, bool)
        self.logprobs = np.array(self.logprobs, np.float32)
        self.crops, self.crop_turns, self.errors = env.crops, env.crop_turns, env.errors
        self.turns, self.stop, self.answer = env.turn, env.stop, env.answer
        self.view_pixels = env.min_pixels, env.max_pixels
        self.reward = grade(self.answer, self.probe.answer, self.probe.options)
        self.env, self.new_views = None, []


def replay(policy: Policy, probe: Probe, texts: list[str], env_class: type[CropEnv] = CropEnv) -> Episode:
    """A written search as an episode: renderer, mask and environment are those of a rollout."""
    env = policy.protocol.make_env(probe, max_turns=len(texts), env_class=env_class)
    episode = Episode(probe, kept_views=[])
    episode.begin(policy, env)
    for text in texts:
        episode.kept_views += episode.new_views
        for token in [*policy.encode(text), policy.im_end]:
            if episode.sample(policy, token, 0.0):
                break
        if not episode.end_turn(policy, complete=True, max_context=1 << 30):
            break
    return episode


# ---------------------------------------------------------------------------------------------- the cache

BLOCK = 64  # columns that a cache layer grows by: a token costs one column, not a copy of the whole layer


class BlockLayer(CacheLayerMixin):
    """Keys and values of one layer, (B, H, K, D), K a multiple of BLOCK. All rows share `columns`."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, dim = key_states.shape
        self.keys = key_states.new_zeros(batch, heads, 0, dim)
        self.values = value_states.new_zeros(batch, heads, 0, dim)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        missing = self.capacity - self.keys.shape[2]
        if missing:
            self.keys, self.values = (F.pad(t, (0, 0, 0, missing)) for t in (self.keys, self.values))
        self.keys.index_copy_(2, self.columns, key_states)
        self.values.index_copy_(2, self.columns, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.capacity, 0

    def get_max_length(self) -> int:
        return -1


# ---------------------------------------------------------------------------------------------- the rollout


class Wave:
    """Rows that advance together: their episodes, keys and values, and what each row may attend to."""

    def __init__(self, policy: Policy, rows: list[Episode], compile: bool):
        layers = policy.base.config.text_config.num_hidden_layers
        self.policy, self.rows = policy, rows
        self.cache = Cache(layers=[BlockLayer() for _ in range(layers)])
        self.columns = 0  # columns in use
        self.mask = policy.banned.new_zeros(len(rows), 0, dtype=torch.bool)  # (B, K) False at padding
        self.position = np.zeros(len(rows), np.int64)  # (B,) the next rotary position
        self.cached = np.zeros(len(rows), np.int64)  # (B,) tokens of the episode in the cache
        self.step_model = torch.compile(policy.base.model) if compile else policy.base.model

    def forward(self, ids: np.ndarray, positions: np.ndarray, real: np.ndarray, features: list) -> Tensor:
        """Reads ids (B, L) at positions (3, B, L); real (B, L) is False at padding. Hidden states (B, D)."""
        device, length = self.policy.device, ids.shape[1]
        ids, positions, real = (torch.from_numpy(array).to(device) for array in (ids, positions, real))
        columns = torch.arange(self.columns, self.columns + length, device=device)
        self.columns += length
        capacity = -(-self.columns // BLOCK) * BLOCK
        self.mask = F.pad(self.mask, (0, capacity - self.mask.shape[1]))
        self.mask[:, columns] = real
        for layer in self.cache.layers:
            layer.capacity, layer.columns = capacity, columns
        key = torch.arange(capacity, device=device)
        before = key <= columns[:, None]  # (L, K)
        itself = key == columns[:, None]  # (L, K) padding sees itself, since a softmax over nothing is NaN
        visible = self.mask[:, None, None, :] & before | itself  # (B, 1, L, K)
        model = self.step_model if length == 1 else self.policy.base.model
        return model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=visible,
            past_key_values=self.cache,
            use_cache=True,
            **self.policy.image_kwargs(features),
        ).last_hidden_state[:, -1]

    def read(self, keep_features: bool) -> Tensor:
        """Reads what is new in each row, a prompt or a reply. Returns the hidden states (B, D) at its end."""
        policy, rows = self.policy, self.rows
        features = policy.encode_views([view for row in rows for view in row.new_views])
        new = [np.array(row.token_ids[cached:]) for row, cached in zip(rows, self.cached)]
        length = max(map(len, new))
        ids = np.full((len(rows), length), policy.im_end)
        positions = np.zeros((3, len(rows), length), np.int64)
        real = np.zeros((len(rows), length), bool)
        grids, given = iter([grid for grid, _ in features]), iter(features)
        for i, tokens in enumerate(new):
            start = length - len(tokens)
            ids[i, start:], real[i, start:] = tokens, True
            positions[:, i, start:], self.position[i] = mrope_positions(
                tokens, grids, policy.image_pad, policy.merge, self.position[i]
            )
            self.cached[i] += len(tokens)
            if keep_features:
                own = [next(given) for _ in rows[i].new_views]
                rows[i].features += [(grid, tokens.to("cpu", copy=True)) for grid, tokens in own]
        return self.forward(ids, positions, real, features)

    def step(self, tokens: np.ndarray, live: np.ndarray) -> Tensor:
        """Reads the last token (B,) of the rows that are live (B,); the others get a column of padding."""
        positions = np.broadcast_to(self.position, (3, len(live)))[..., None].copy()
        hidden = self.forward(tokens[:, None], positions, live[:, None], [])
        self.position += live
        self.cached += live
        return hidden

    def select(self, index: list[int]) -> None:
        """Goes on with these rows. They may repeat: the rollouts of a group begin as copies of its prompt."""
        self.rows = [self.rows[i] for i in index]
        self.position, self.cached = self.position[index], self.cached[index]
        index = torch.tensor(index, device=self.policy.device)
        self.mask = self.mask[index]
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[index], layer.values[index]


def sample_tokens(
    logprobs: Tensor, uniform: list[float], temperature: float
) -> tuple[np.ndarray, list[float]]:
    """One token per row of (B, V), by inverting the cumulative distribution at `uniform`; its log-prob."""
    if temperature == 0:
        tokens = logprobs.argmax(-1)  # (B,)
    else:
        cumulative = logprobs.double().exp().cumsum(-1)  # (B, V)
        level = cumulative[:, -1:] * cumulative.new_tensor(uniform)[:, None]  # (B, 1)
        tokens = torch.searchsorted(cumulative, level, right=True)[:, 0].clamp(max=logprobs.shape[1] - 1)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]  # (B,)
    return tokens.cpu().numpy(), chosen.tolist()


@torch.inference_mode()
def rollout(
    policy: Policy,
    probes: list[Probe],
    *,
    group_size: int = 1,
    max_turns: int = 6,
    max_images: int | None = None,
    max_context: int = 32_768,
    max_turn_tokens: int = 1024,
    temperature: float = 1.0,
    seed: int = 0,
    wave_size: int = 128,
    env_class: type[CropEnv] = CropEnv,
    force_answer: str = "",
    keep_features: bool = False,
    compile: bool = False,
    progress: str | None = None,
    verbose: bool = False,
) -> list[Episode]:
    """Plays `group_size` episodes per probe; those of one probe are adjacent in the result.

    max_turns: assistant messages per episode. max_images: images in the bank, the original included; None =
    no limit. max_context: tokens of a conversation before its last turn. max_turn_tokens: a longer turn is
    cut, and void. temperature: 0 takes the most likely token. seed: each episode has its own generator.
    wave_size: rows at once (at least one group); it changes memory and speed, not the result. env_class,
    force_answer: for controls. keep_features: leave the visual features in the episodes, for a training
    that does not change the tower. compile: torch.compile of the one-token step. progress: label of a
    progress bar. verbose: print each message as it comes. UserError for a prompt beyond max_context.
    """
    policy.model.eval()  # a model in training that checkpoints activations keeps no cache
    bar = tqdm(total=len(probes) * group_size, desc=progress, disable=progress is None, leave=False)
    episodes = []
    questions = max(1, wave_size // group_size)
    for first in range(0, len(probes), questions):
        rows = []  # one per question first
        for probe in probes[first : first + questions]:
            env = policy.protocol.make_env(probe, max_turns, max_images, env_class)
            rows.append(Episode(probe))
            rows[-1].begin(policy, env, force_answer)
            if len(rows[-1].token_ids) > max_context:
                length = len(rows[-1].token_ids)
                raise UserError(f"a prompt of {length} tokens exceeds max_context={max_context}")
        wave = Wave(policy, rows, compile)
        hidden = wave.read(keep_features)  # (questions, D)
        wave.select([i for i in range(len(rows)) for _ in range(group_size)])
        hidden = hidden.repeat_interleave(group_size, 0)  # (B, D)
        wave.rows = [row.fork() for row in wave.rows]
        episodes += wave.rows
        for i, row in enumerate(wave.rows):
            row.random = random.Random(f"rollout/{seed}/{first * group_size + i}")
        while True:
            live = np.ones(len(wave.rows), bool)  # (B,) in the middle of a turn
            complete = np.zeros(len(wave.rows), bool)  # (B,) ended its turn before the token limit
            while True:
                logprobs = vocabulary_logprobs(policy, hidden, temperature or 1.0)  # (B, V)
                uniform = [row.random.random() if on else 0.5 for row, on in zip(wave.rows, live)]
                tokens, chosen = sample_tokens(logprobs, uniform, temperature)
                for i in np.flatnonzero(live):
                    row = wave.rows[i]
                    complete[i] = row.sample(policy, int(tokens[i]), chosen[i])
                    live[i] = not complete[i] and len(row.token_ids) - row.turn_start < max_turn_tokens
                if not live.any():
                    break
                hidden = wave.step(tokens, live)
            going = [i for i, row in enumerate(wave.rows) if row.end_turn(policy, complete[i], max_context)]
            for row in wave.rows if verbose else ():
                print(f"{len(row.texts):2d}. {row.texts[-1]}", flush=True)
            bar.update(len(wave.rows) - len(going))
            if not going:
                break
            if len(going) < len(wave.rows):
                wave.select(going)
            hidden = wave.read(keep_features)
    bar.close()
    return episodes


def rollout_flags(cfg) -> dict:
    """The fields of a script's Config that rollout takes."""
    return {name: getattr(cfg, name) for name in inspect.signature(rollout).parameters if hasattr(cfg, name)}


# ------------------------------------------------------------------------------------ reading an episode


def describe(episode: Episode) -> str:
    """One readable trajectory: the question, each message, the stop and the reward."""
    lines = [f"  | {episode.probe.question}  (answer: {episode.probe.answer})"]
    lines += [f"  | {i}. {text}" for i, text in enumerate(episode.texts, 1)]
    lines += [f"  | stop: {episode.stop}  answer: {episode.answer}  reward {episode.reward:.0f}"]
    return "\n".join(lines)


def boxes_in_original(episode: Episode) -> list[tuple[float, float, float, float]]:
    """Each crop's box in the frame of the original image, xyxy relative; a crop of a crop is composed."""
    frames = [(0.0, 0.0, 1.0, 1.0)]
    for crop in episode.crops:
        left, top, right, bottom = frames[crop.source]
        x0, y0, x1, y1 = crop.box
        w, h = right - left, bottom - top
        frames.append((left + x0 * w, top + y0 * h, left + x1 * w, top + y1 * h))
    return frames[1:]


def draw_search(episode: Episode, side: int = 900) -> Image.Image:
    """The image with every look drawn on it, numbered, from yellow to red; longest side `side` pixels."""
    image = episode.probe.open()
    scale = side / max(image.size)
    picture = image.resize([max(1, round(length * scale)) for length in image.size])
    draw = ImageDraw.Draw(picture)
    boxes = boxes_in_original(episode)
    for i, (x0, y0, x1, y1) in enumerate(boxes, 1):
        color = (255, round(220 * (1 - i / len(boxes))), 0)
        left, top = x0 * picture.width, y0 * picture.height
        right, bottom = max(left, x1 * picture.width - 1), max(top, y1 * picture.height - 1)
        draw.rectangle((left, top, right, bottom), outline=color, width=3)
        draw.text((left + 6, top + 3), str(i), fill=color, font_size=20)
    return picture


def embed_image(image: Image.Image, side: int) -> str:
    """The image as a data: URL, reduced to at most `side` pixels on its longer side."""
    image, buffer = image.convert("RGB"), io.BytesIO()
    image.thumbnail((side, side))
    kind = "png" if max(image.size) <= 128 else "jpeg"
    image.save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def describe_card(e: Episode) -> dict:
    """What viewer.html shows of an episode."""
    boxes = dict(zip(e.crop_turns, boxes_in_original(e)))
    views, errors, turns = dict(zip(e.crop_turns, e.views()[1:])), iter(e.errors), []
    for turn, text in enumerate(e.texts, 1):
        thought, _, action = text.rpartition("</think>")
        turns.append({"thought": thought.removeprefix("<think>"), "action": action, "box": boxes.get(turn)})
        turns[-1]["view"] = embed_image(views[turn], 320) if turn in views else None
        failed = turn not in views and not (e.stop == "answer" and turn == e.turns)
        turns[-1]["error"] = next(errors, None) if failed else None
    picture, reward = e.probe.open(), e.reward if e.judged and e.probe.answer else None
    card = {"question": e.probe.prompt(), "answer": e.probe.answer, "prediction": e.answer, "turns": turns}
    card |= {"picture": embed_image(picture, 720), "size": picture.size, "reward": reward}
    card |= {"kind": e.probe.source, "stop": e.stop, "advantage": e.advantage, "masked": e.masked}
    return card | {"verdict": {1.0: "right", 0.0: "wrong"}.get(reward, "unjudged")}


def write_page(path: Path, episodes: list[Episode]) -> None:
    """Writes a page of episodes, viewer.html filled with them: one file that needs no network."""
    template = (Path(__file__).parent / "viewer.html").read_text("utf-8")
    data = json.dumps([describe_card(episode) for episode in episodes]).replace("<", "\\u003c")
    write_atomic(path, template.replace("EPISODES", data, 1).encode())


@dataclass(frozen=True)
class Config(PolicyFlags):
    image: Path | None = None  # a photograph, or any picture; default: a fresh hard probe
    question: str = ""  # what to find out about the image
    init: Path = CHECKPOINTS / "tiny_rl"  # the policy: a run directory, a Hugging Face directory or id
    out: Path = Path("runs/search")  # OUT.png, a picture of where it looked, and OUT.html, the whole search
    max_turns: int = 32  # assistant messages
    max_turn_tokens: int = 1024  # a longer message is cut, and the search ends
    temperature: float = 1.0  # 0 takes the most likely token
    seed: int = 1  # of sampling, and of the probe
    compile: bool = False  # torch.compile of the one-token step; not measured on a GPU yet


def main(cfg: Config) -> None:
    if (cfg.image is None) != (not cfg.question):
        raise UserError("--image and --question go together; without both, it searches a fresh probe")
    probe = next(probe_stream(PROBE_KINDS, ("hard",), cfg.seed))
    if cfg.image:
        probe = Probe(load_image(cfg.image), cfg.question, answer=[])
    policy = load_policy(str(cfg.init), **policy_flags(cfg))
    print(probe.prompt())
    (episode,) = rollout(policy, [probe], verbose=True, **rollout_flags(cfg))
    known = f"   the answer is {probe.answer}" if probe.answer else ""
    print(f"stop: {episode.stop}   it says: {episode.answer}{known}")
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    picture, page = (cfg.out.with_name(cfg.out.name + ending) for ending in (".png", ".html"))
    with replacing(picture) as temporary:
        draw_search(episode).save(temporary)
    write_page(page, [episode])
    print(f"where it looked: {picture}; turn by turn: {page}")


if __name__ == "__main__":
    cli(main, Config)
