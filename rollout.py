"""Many multi-turn episodes at once; the KV cache is kept across turns, and finished episodes make room for new ones.

    slot 0   [prompt, image][turn 1][observation 1][turn 2 ..>            each row writes at its own length,
    slot 1   [prompt, image][turn 1][observation 1][turn 2][observation 2][turn 3 ..>
    slot 2   [prompt, image][turn ..>                                     what lies beyond it is never attended to
    slot 3   [   copied    ][turn 1 ..>                                   the same question as in slot 2

A loop of three steps: (1) free slots take the next episodes, whose prompts wait to be read; (2) when enough rows
wait, their new tokens (a prompt, or an observation with its image) are read in one padded forward, each row going on
where it stopped; (3) all other rows sample one token each. A row that samples end-of-turn hands its text to its
CropEnv, which answers with an observation or ends the episode. Every image is encoded once, every token read once,
a prompt once for all rollouts of its group. On a GPU, the step of one token per row is recorded once (`Decoder`), and
threads cut and resize images while other rows sample.

    B rows of a batch, T tokens, V vocabulary, K cached keys

    $ python rollout.py --image photo.jpg --question "What color is the star?"     # searches your photo, draws where

Read next: train_sft.py.
"""
import functools
import itertools
import random
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm
from transformers.cache_utils import Cache, CacheLayerMixin

import data
from env import MAX_IMAGE_PIXELS, Crop, CropEnv, crop_pixels, fit_pixels, grade, load_image
from model import (Policy, PolicyFlags, load_policy, memory_advice, mrope_positions, policy_flags, reason,
                   sampled_logprobs)


@dataclass
class Episode:
    """One finished conversation, as token ids: the record that training reads.

    token_ids, assistant_mask, logprobs: (T,) the whole conversation with `<|image_pad|>` expanded; the mask is True
    where the policy sampled, its end-of-turn token included; logprobs are those of sampling, 0 elsewhere.
    crops: the successful crops in order. turns: assistant messages. stop: one of env.STOPS. reward: 1.0 or 0.0.
    """
    probe: data.Probe
    token_ids: np.ndarray
    assistant_mask: np.ndarray
    logprobs: np.ndarray
    crops: list[Crop]
    turns: int
    stop: str
    answer: str | None
    reward: float
    errors: list[str] = field(default_factory=list)
    view_pixels: tuple[int, int] = (40_000, 2_000_000)     # min_pixels, max_pixels of the views
    features: list | None = None       # per view what a frozen tower made of it (Policy.image_features), on the CPU
    shown: list | None = None          # the views, where they are kept: of a written trajectory
    judged: bool = True                                    # False: the judge failed, and the reward means nothing

    @property
    def over_turn(self) -> bool:
        """It still wanted to search when a limit on turns, images or context ended it: its outcome is unknown."""
        return self.stop in ("over_turn", "over_images", "over_context")

    def views(self) -> list[Image.Image]:
        """The images as shown to the model, in order; mostly made again from the probe and the crops."""
        if self.shown is not None:
            return list(self.shown)
        bank = [self.probe.open()]
        for crop in self.crops:
            source = bank[crop.source]
            bank.append(source.crop(crop_pixels(source.size, crop.box)))
        return [fit_pixels(image, *self.view_pixels) for image in bank]


class Transcript:
    """An episode in the making: its environment and its tokens so far. SFT and RL write their tokens through it."""

    def __init__(self, policy: Policy, probe: data.Probe, max_turns: int, max_images: int | None,
                 make_env: type[CropEnv] = CropEnv, force_answer: str = "", opening: list[dict] | None = None):
        p = policy.protocol
        self.policy, self.probe, self.force_answer = policy, probe, force_answer
        self.env = make_env(probe.open(), p.before_question + probe.prompt(), max_turns, p.min_pixels, p.max_pixels,
                           max_images, p.system_prompt, p.observation_prompt, p.error_prompt)
        self.ids: list[int] = []
        self.mask: list[bool] = []
        self.logprobs: list[float] = []
        self.turn_start = 0                        # index of the first token of the current assistant turn
        self.stop: str | None = None
        self.features: list = []                   # of the views that were read so far
        self.opening = opening or self.env.reset()              # of another rollout of the question: one view for all
        self.new_views = self.inject(self.opening)

    def inject(self, messages: list[dict]) -> list[Image.Image]:
        """Appends messages of the environment and opens an assistant turn; returns their views."""
        ids, views = self.policy.render(messages, after_turn=bool(self.ids))
        start = len(self.ids) + len(ids)
        if self.force_answer and self.env.turn + 1 == self.env.max_turns:
            ids += self.policy.encode(self.force_answer)
        self.ids += ids
        self.mask += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.turn_start = start
        return views

    def sample(self, token: int, logprob: float) -> None:
        self.ids.append(token)
        self.mask.append(True)
        self.logprobs.append(logprob)

    def end_turn(self, complete: bool, max_context: int) -> bool:
        """Hands the turn's text to the environment; True if a new turn is open, with its views in `new_views`.

        `complete` is False for a turn cut by the token limit: void. A reply of the environment that would reach
        `max_context` tokens is taken back, and the episode ends over_context.
        """
        text = self.policy.decode(self.ids[self.turn_start:-1])
        if complete:
            message, self.stop = self.env.step(text)
        else:
            self.env.turn, self.stop = self.env.turn + 1, "void"
        if self.stop:
            return False
        before = len(self.ids)
        self.new_views = self.inject([message])
        if len(self.ids) > max_context:
            del self.ids[before:], self.mask[before:], self.logprobs[before:]
            self.stop = "over_context"
        return self.stop is None

    def episode(self) -> Episode:
        images = self.ids.count(self.policy.vision_start)
        answer = self.env.answer if self.stop == "answer" else None
        return Episode(
            self.probe, np.array(self.ids, np.int64), np.array(self.mask, bool), np.array(self.logprobs, np.float32),
            self.env.crops[:images - 1], self.env.turn, self.stop, answer,
            grade(answer, self.probe.answer, self.probe.options), self.env.errors,
            (self.policy.protocol.min_pixels, self.policy.protocol.max_pixels), self.features or None)


def replay(policy: Policy, probe: data.Probe, texts: list[str], make_env: type[CropEnv] = CropEnv) -> Episode:
    """A written trajectory as an episode: the same renderer and mask as a rollout, text in place of sampling."""
    transcript = Transcript(policy, probe, max_turns=len(texts), max_images=None, make_env=make_env)
    shown = list(transcript.new_views)
    for text in texts:
        for token in [*policy.encode(text), policy.im_end]:
            transcript.sample(token, 0.0)
        if not transcript.end_turn(True, max_context=1 << 30):
            break
        shown += transcript.new_views
    return replace(transcript.episode(), shown=shown)


# ------------------------------------------------------------------------------------------------ the slot cache

BUCKET = 256              # the cache grows by so many columns


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (slots, H, S, D); `SlotCache.address` says which rows write, and where."""

    def __init__(self, cache: "SlotCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        _, heads, _, dim = key_states.shape
        shape = (self.cache.slots, heads, self.cache.capacity, dim)
        self.keys, self.values = (key_states.new_zeros(shape), value_states.new_zeros(shape))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, columns, visible = self.cache.rows, self.cache.columns, self.cache.visible
        self.keys[rows[:, None], :, columns] = key_states.transpose(1, 2)               # (B, q, H, D)
        self.values[rows[:, None], :, columns] = value_states.transpose(1, 2)
        keys, values = self.keys[:, :, :visible], self.values[:, :, :visible]
        return (keys, values) if len(rows) == self.cache.slots else (keys[rows], values[rows])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.visible, 0

    def get_seq_length(self) -> int:
        return self.cache.visible

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """A KV cache of `slots` rows of unequal length. Padding is written too, and overwritten by the next write."""

    def __init__(self, layers: int, slots: int):
        self.slots, self.capacity, self.visible = slots, 0, 0
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])

    def address(self, rows: Tensor, starts: list[int], length: int) -> Tensor:
        """The next forward writes `length` tokens of `rows` (B,) from `starts` on. Grows the cache if it must.

        Returns the attention mask (B, 1, length, K): a token sees its own row up to itself. Either all slots in
        order, or any few of them (whose keys are then copied for the forward).
        """
        self.reserve(max(starts) + length)
        columns = torch.tensor(starts, device=rows.device)[:, None] + torch.arange(length, device=rows.device)  # (B, q)
        return self.place(rows, columns, max(starts) + length)

    def place(self, rows: Tensor, columns: Tensor, visible: int) -> Tensor:
        """The same for columns (B, q) on the device, of which all are below `visible`: K."""
        self.rows, self.columns, self.visible = rows, columns, visible
        return torch.arange(visible, device=rows.device) <= columns[:, None, :, None]

    def reserve(self, length: int) -> None:
        """Makes room for rows of this length."""
        if length <= self.capacity:
            return
        self.capacity = -(-length // BUCKET) * BUCKET
        for layer in self.layers:
            if layer.is_initialized:
                room = (0, 0, 0, self.capacity - layer.keys.shape[2])
                layer.keys, layer.values = F.pad(layer.keys, room), F.pad(layer.values, room)

    def read(self, slot: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """A copy of the first `length` keys and values of a slot, (H, length, D) each, per layer."""
        return [(layer.keys[slot, :, :length].clone(), layer.values[slot, :, :length].clone()) for layer in self.layers]

    def write(self, slots: Tensor, prompt: list[tuple[Tensor, Tensor]]) -> None:
        """Puts what `read` gave at the beginning of other slots."""
        for layer, (keys, values) in zip(self.layers, prompt):
            layer.keys[slots, :, :keys.shape[1]], layer.values[slots, :, :keys.shape[1]] = keys, values

    def keep(self, rows: Tensor) -> None:
        """Drops all other slots; the kept ones are renumbered in order."""
        self.slots = len(rows)
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


class Decoder:
    """One token for every slot: the hidden states (slots, 1, D) behind it.

    At one token per row a GPU runs the kernels faster than Python launches them. So there they are recorded once, over
    buffers that stay where they are, for each BUCKET of visible keys (a CUDA graph), and then replayed. A recording
    that does not give what the plain step gives is not used, and no other is tried.
    """
    failed = False                                 # in this process

    def __init__(self, policy: Policy, cache: SlotCache):
        self.policy, self.cache = policy, cache
        self.size, self.recorded, self.pool = None, {}, None
        self.records = policy.device.type == "cuda" and not Decoder.failed

    def __call__(self, ids: np.ndarray, positions: np.ndarray, starts: list[int]) -> Tensor:
        visible = max(starts) + 1
        self.cache.reserve(visible)
        if self.size != (self.cache.slots, self.cache.capacity):                         # keys and values have moved
            self.size, self.recorded, self.pool = (self.cache.slots, self.cache.capacity), {}, None
            empty = torch.zeros(5, self.cache.slots, 1, dtype=torch.long, device=self.policy.device)
            self.ids, self.columns, self.positions = empty[0], empty[1], empty[2:]
            self.inputs, self.rows = empty, torch.arange(self.cache.slots, device=self.policy.device)
        self.inputs.copy_(torch.from_numpy(np.stack([ids, np.array(starts)[:, None], *positions])))
        if not self.records:
            return self.step(visible)
        visible = -(-visible // BUCKET) * BUCKET
        if visible not in self.recorded:
            self.recorded[visible] = self.record(visible)
        return self.recorded[visible]()

    def step(self, visible: int) -> Tensor:
        mask = self.cache.place(self.rows, self.columns, visible)
        return self.policy.base.model(input_ids=self.ids, position_ids=self.positions, attention_mask=mask,
                                      past_key_values=self.cache, use_cache=True).last_hidden_state

    def record(self, visible: int) -> Callable[[], Tensor]:
        """The recorded step. A step may run again: it writes the same keys to the same place."""
        for _ in range(3):                                                               # libraries set themselves up
            expected = self.step(visible)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(torch.cuda.current_stream()):                         # back to it after a failure
                with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                    hidden = self.step(visible)
            graph.replay()
            problem = "" if torch.allclose(hidden, expected, rtol=0.05, atol=0.05) else "it computes something else"
        except RuntimeError as error:
            problem = reason(error)
        if problem:
            warnings.warn(f"decoding without a CUDA graph, which is slower: {problem}")
            self.records, Decoder.failed = False, True
            return functools.partial(self.step, visible)
        self.pool = self.pool or graph.pool()                                            # one for all: they run in turn

        def replay() -> Tensor:
            graph.replay()
            return hidden
        return replay


# ------------------------------------------------------------------------------------------------ the rollout

READ_TOKENS = 16_384      # prompts and observations in one forward, padding included: what is left comes next


class Group:
    """The rollouts of one question. The first in a slot reads the prompt, the others copy its keys and values."""

    def __init__(self, probe: data.Probe, indices: range):
        self.probe, self.waiting = probe, deque(indices)
        self.reader: Row | None = None
        self.opening: list[dict] | None = None     # the messages before the first turn
        self.prompt: tuple | None = None           # (keys and values, position, features) until all have copied them
        self.copies = len(indices) - 1             # rows that are still to copy them


class Row:
    """A slot's occupant: a transcript, how much of it the cache holds, and its own random numbers."""

    def __init__(self, index: int, transcript: Transcript, seed: int, group: Group):
        self.index, self.transcript, self.group = index, transcript, group
        self.cached, self.position = 0, 0              # tokens in the cache; the next rotary position
        self.reply: Future | None = None               # of the world, while a thread makes it: does the episode go on?
        self.random = random.Random(f"rollout/{seed}/{index}")
        group.reader = group.reader or self

    @property
    def unread(self) -> int:
        """Tokens that the model has not seen yet: 1 in the middle of a turn, more when there is something to read."""
        return len(self.transcript.ids) - self.cached

    @property
    def waits(self) -> bool:
        """The prompt is being read by another row."""
        return not self.cached and self.group.reader is not self


def rollout(policy: Policy, probes: list[data.Probe], *, group_size: int = 1, max_turns: int = 6,
            max_images: int | None = None, max_context: int = 32_768, max_turn_tokens: int = 1024,
            temperature: float = 1.0, seed: int = 0, slots: int = 128, make_env: type[CropEnv] = CropEnv,
            force_answer: str = "", keep_features: bool = False, progress: str | None = None) -> list[Episode]:
    """Plays `group_size` episodes per probe; those of one probe are adjacent in the result.

    max_turns: assistant messages per episode. max_images: images in the bank, the original included; None = no limit.
    max_context: tokens of a conversation before its last turn. max_turn_tokens: a longer turn is cut, and void.
    temperature: 0 takes the most likely token. seed: each episode has its own generator, so the result does not
    depend on `slots`. make_env: the world, for controls; `reset` is called once per question. force_answer: how the
    last allowed turn begins, written for the policy and not counted as sampled. keep_features: leave the visual tokens
    in the episodes, for a training that does not change the tower. progress: a label for a progress bar. Raises
    UserError for a prompt beyond max_context.
    """
    policy.model.train(False)               # a model in training keeps no cache when it checkpoints activations
    groups = [Group(probe, range(i * group_size, (i + 1) * group_size)) for i, probe in enumerate(probes)]
    bar = tqdm(total=len(probes) * group_size, desc=progress, disable=progress is None, leave=False)

    def start(index: int, group: Group) -> Row:
        transcript = Transcript(policy, group.probe, max_turns, max_images, make_env, force_answer, group.opening)
        group.opening = transcript.opening if group.waiting else None
        if len(transcript.ids) > max_context:
            raise data.UserError(f"a prompt of {len(transcript.ids)} tokens exceeds max_context={max_context}")
        return Row(index, transcript, seed, group)

    with ThreadPoolExecutor() if policy.device.type != "cpu" else nullcontext() as pool:
        episodes = dict(_play(policy, deque(groups), slots, start, max_context, max_turn_tokens, temperature,
                              keep_features, bar, pool))
    bar.close()
    return [episodes[i] for i in range(len(episodes))]


@torch.inference_mode()
def _play(policy: Policy, queue: deque[Group], slots: int, start: Callable, max_context: int, max_turn_tokens: int,
          temperature: float, keep_features: bool, bar: tqdm,
          pool: ThreadPoolExecutor | None) -> list[tuple[int, Episode]]:
    """(index, episode) of all rollouts of the groups in `queue`, in the order in which they end.

    pool: threads in which the world replies (images are cut and resized) while other rows decode; the replies are
    waited for when there is enough to read, so that what happens does not depend on how fast they are.
    """
    slots = min(slots, sum(len(group.waiting) for group in queue))
    rows: list[Row | None] = [None] * slots
    cache = SlotCache(policy.base.config.text_config.num_hidden_layers, slots)
    decoder, episodes = Decoder(policy, cache), []

    def replied(slot: int, goes_on: bool) -> None:
        rows[slot].reply = None
        if not goes_on:
            episodes.append((rows[slot].index, rows[slot].transcript.episode()))
            rows[slot] = None
            bar.update()

    while True:
        for slot, row in enumerate(rows):
            if row is None and queue:
                rows[slot] = start(queue[0].waiting.popleft(), queue[0])
                if not queue[0].waiting:
                    queue.popleft()
        live = [slot for slot, row in enumerate(rows) if row]
        if not live:
            cache.layers.clear(), decoder.recorded.clear()     # they refer to themselves: memory would wait for Python
            return episodes
        if len(live) <= len(rows) // 2:                        # the last searches: carry no empty slots along
            cache.keep(torch.tensor(live, device=policy.device))
            rows, live = [rows[slot] for slot in live], list(range(len(live)))
        _share_prompts(policy, cache, rows)
        replies = [slot for slot in live if rows[slot].reply]
        there = [slot for slot in live if not rows[slot].reply]
        reading = [slot for slot in there if rows[slot].unread > 1 and not rows[slot].waits]
        turn = [slot for slot in there if rows[slot].unread == 1]
        unread = len(live) - len(turn)                         # those that wait for a reader of their group, too
        if replies and unread >= len(turn) / 2:
            for slot in replies:
                replied(slot, rows[slot].reply.result())
            continue
        if reading and unread >= len(turn) / 2:                # let readers gather: a forward costs much, a row little
            turn = reading[:max(1, READ_TOKENS // max(rows[slot].unread for slot in reading))]
        logprobs = _forward(policy, cache, decoder, rows, turn, temperature, keep_features)         # (B, V)
        for slot, token, logprob in zip(turn, *_sample(logprobs, [rows[s].random.random() for s in turn], temperature)):
            transcript = rows[slot].transcript
            transcript.sample(token, logprob)
            complete = token == policy.im_end
            if complete or len(transcript.ids) - transcript.turn_start >= max_turn_tokens:
                if pool:
                    rows[slot].reply = pool.submit(transcript.end_turn, complete, max_context)
                else:
                    replied(slot, transcript.end_turn(complete, max_context))


def _share_prompts(policy: Policy, cache: SlotCache, rows: list[Row | None]) -> None:
    """Rows whose prompt another row of their group has read get its keys and values, all but the last token's."""
    waiting: dict[int, tuple[Group, list[int]]] = {}
    for slot, row in enumerate(rows):
        if row and row.waits and row.group.prompt:
            waiting.setdefault(id(row.group), (row.group, []))[1].append(slot)
    for group, slots in waiting.values():
        keys_values, position, features = group.prompt
        cache.write(torch.tensor(slots, device=policy.device), keys_values)
        for slot in slots:
            row = rows[slot]
            row.cached, row.position = keys_values[0][0].shape[1], position
            row.transcript.features += features
        group.copies -= len(slots)
        if not group.copies:
            group.prompt = None


def _forward(policy: Policy, cache: SlotCache, decoder: Decoder, rows: list[Row | None], turn: list[int],
             temperature: float, keep_features: bool) -> Tensor:
    """Reads the unread tokens of the slots in `turn`; log-probs (B, V) of what comes next in each of them."""
    length = max(rows[slot].unread for slot in turn)
    whole = length == 1 and (decoder.records or len(turn) > len(rows) // 2)    # idle slots go along, nothing is copied
    batch = list(range(len(rows))) if whole else turn
    ids = np.zeros((len(batch), length), np.int64)
    positions = np.zeros((3, len(batch), length), np.int64)
    starts = [rows[slot].cached if rows[slot] else 0 for slot in batch]
    views = [rows[slot].transcript.new_views if rows[slot].unread > 1 else [] for slot in turn]
    features = policy.image_features(sum(views, []))
    grids, kept = iter([grid for grid, _ in features]), iter(features)
    for slot, shown in zip(turn, views):
        row, i = rows[slot], slot if whole else turn.index(slot)
        if row.unread == 1:                                    # the common case, and the shortest
            ids[i, 0], positions[:, i, 0] = row.transcript.ids[-1], row.position
            row.cached, row.position = row.cached + 1, row.position + 1
            continue
        new = np.array(row.transcript.ids[row.cached:])
        ids[i, :len(new)] = new
        positions[:, i, :len(new)], row.position = mrope_positions(new, grids, policy.image_pad, policy.merge,
                                                                   row.position)
        row.cached += len(new)
        if keep_features:
            row.transcript.features += [(grid, tokens.to("cpu", copy=True))
                                        for grid, tokens in itertools.islice(kept, len(shown))]
    to = policy.device
    if whole:
        hidden = decoder(ids, positions, starts)
    else:
        mask = cache.address(torch.tensor(batch, device=to), starts, length)
        hidden = policy.base.model(
            input_ids=torch.from_numpy(ids).to(to), position_ids=torch.from_numpy(positions).to(to),
            attention_mask=mask, past_key_values=cache, use_cache=True, **policy.seen(features)).last_hidden_state
    for i, slot in enumerate(turn):
        row = rows[slot]
        if row.group.copies and not starts[slot if whole else i]:                # it was the prompt
            row.group.prompt = (cache.read(slot, row.cached - 1), row.position - 1, list(row.transcript.features))
    last = [rows[slot].cached - starts[slot if whole else i] - 1 for i, slot in enumerate(turn)]
    picked = torch.tensor([slot if whole else i for i, slot in enumerate(turn)], device=to)
    return sampled_logprobs(policy, hidden[picked, torch.tensor(last, device=to)], temperature or 1.0)


def _sample(logprobs: Tensor, uniform: list[float], temperature: float) -> tuple[list[int], list[float]]:
    """One token per row of (B, V) by inverting the cumulative distribution at `uniform`, and its log-prob."""
    if temperature == 0:
        tokens = logprobs.argmax(-1)                                                     # (B,)
    else:
        cumulative = logprobs.double().exp().cumsum(-1)                                  # (B, V)
        level = torch.tensor(uniform, dtype=torch.float64, device=logprobs.device)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, level, right=True)[:, 0].clamp(max=logprobs.shape[1] - 1)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]                                   # (B,)
    tokens, chosen = torch.stack([tokens.double(), chosen.double()]).tolist()            # the GPU is waited for once
    return [int(token) for token in tokens], chosen


# ------------------------------------------------------------------------------------------------ reading an episode

def messages(policy: Policy, episode: Episode) -> list[str]:
    """The assistant messages of an episode as text, in order."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], episode.assistant_mask.astype(np.int8), [0]])))
    return [policy.decode(episode.token_ids[start:stop]).removesuffix("<|im_end|>")
            for start, stop in zip(edges[::2], edges[1::2])]


class Turn:
    """A world of one message, after which it ends: what goes before is given."""
    turn, max_turns, answer, crops, errors = 1, 1, None, (), ()

    def __init__(self, talk: list[dict]):
        self.talk = talk

    def reset(self) -> list[dict]:
        return self.talk

    def step(self, _text: str) -> tuple[None, str]:
        return None, "answer"


def speaker(policy: Policy, **options) -> Callable[[list], list]:
    """A policy as a callable for data.play and data.gather: conversations in, texts out. Options as of `rollout`.

    A conversation is read anew at every turn. A message that is cut comes out empty; one that is too long, as None.
    """
    def speak(talks: list) -> list:
        blank = Image.new("RGB", (1, 1))
        too_long = options.get("max_context", 32_768)
        fit = [len(policy.render(talk)[0]) <= too_long for talk in talks]
        asked = [data.Probe(blank, str(i), "") for i, fits in enumerate(fit) if fits]
        episodes = rollout(policy, asked, make_env=lambda _image, i, *_: Turn(talks[int(i)]),
                           **{**options, "seed": f"{options.get('seed', 0)}/{len(talks)}/{sum(map(len, talks))}"})
        said = iter("" if e.stop == "void" else messages(policy, e)[-1] for e in episodes)
        return [next(said) if fits else None for fits in fit]
    return speak


def describe(policy: Policy, episode: Episode) -> str:
    """One readable trajectory: the question, each message, the stop and the reward."""
    lines = [f"  | {episode.probe.question}  (answer: {episode.probe.answer})"]
    lines += [f"  | {i}. {text}" for i, text in enumerate(messages(policy, episode), 1)]
    return "\n".join([*lines, f"  | stop: {episode.stop}  answer: {episode.answer}  reward {episode.reward:.0f}"])


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
    """The image with every look drawn on it, numbered in order, from yellow to red; longest side `side` pixels."""
    image = episode.probe.open()
    scale = side / max(image.size)
    picture = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    draw = ImageDraw.Draw(picture)
    boxes = boxes_in_original(episode)
    for i, (x0, y0, x1, y1) in enumerate(boxes, 1):
        color = (255, round(220 * (1 - i / len(boxes))), 0)
        left, top = x0 * picture.width, y0 * picture.height
        right, bottom = max(left, x1 * picture.width - 1), max(top, y1 * picture.height - 1)
        draw.rectangle((left, top, right, bottom), outline=color, width=3)
        draw.text((left + 6, top + 3), str(i), fill=color, font_size=20)
    return picture


@dataclass(frozen=True)
class Config(PolicyFlags):
    image: Path                        # a photograph, or any picture
    question: str                      # what to find out
    init: Path = Path("runs/rl")       # the policy: a run directory, a Hugging Face directory or id
    out: Path = Path("runs/search.png")  # where it looked
    max_turns: int = 32                # assistant messages
    temperature: float = 1.0           # 0 takes the most likely token
    max_turn_tokens: int = 1024        # a longer message is cut, and the search ends
    max_image_pixels: int = MAX_IMAGE_PIXELS  # width * height: a larger image file is refused
    seed: int = 0


@memory_advice("--max_turns", "--max_turn_tokens", "--init")
def main(cfg: Config) -> None:
    probe = data.Probe(load_image(cfg.image, cfg.max_image_pixels), cfg.question, answer="")
    policy = load_policy(str(cfg.init), **policy_flags(cfg))
    episode, = rollout(policy, [probe], max_turns=cfg.max_turns, temperature=cfg.temperature, seed=cfg.seed,
                       max_turn_tokens=cfg.max_turn_tokens)
    for i, text in enumerate(messages(policy, episode), 1):
        print(f"{i:2d}. {text}")
    print(f"stop: {episode.stop}   answer: {episode.answer}")
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    with data.replacing(cfg.out) as temporary:
        draw_search(episode).save(temporary)
    print(f"where it looked: {cfg.out}")


if __name__ == "__main__":
    data.command(main, Config)
