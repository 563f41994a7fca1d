"""Tests of rollout.py: agreement with training, independence of the wave, ends of turns, stops, the picture.

A random policy mostly says junk, so two ways make its episodes go on. `say` makes it say scripted messages,
token by token, but keeps the log-probs that it gives them. `talkative` ends its turns often, and the world
`Obliging` takes what is no action for a crop: there everything is really sampled.

Lines that were flipped, each with the test that then failed:
    sample          goes on behind the closing tag              a_turn_ends_where_its_action_ends_and_...
    sample          looks for the tag in one token only         a_closing_tag_is_found_however_it_is_spelled
    write           the end-of-turn that we write is sampled    a_turn_ends_where_its_action_ends_and_...
    write           the forced text is outside of the turn      a_forced_answer_is_begun_for_the_policy_...
    end_turn        end-of-turn is never, or always, written    a_turn_ends_where_its_action_ends_and_...
    end_turn        a message that was cut counts               a_message_that_is_cut_is_void_...
    end_turn        no take_back_reply; its tokens stay         a_reply_beyond_the_context_is_taken_back
    finish          the crops are not taken over                a_look_of_the_warm_up_keeps_its_crop
    fork            lists, or the environment, are shared       rollouts_of_a_question_share_no_record_and_...
    replay          no cut behind the tag                       a_replay_is_the_rollout_that_says_the_same
    replay, views   CropEnv in place of env_class               views_made_again_are_those_that_were_shown
    views           view sizes are the defaults                 views_made_again_are_those_that_were_shown
    update          growth forgets the past                     what_was_sampled_has_the_same_log_prob_...
    forward         padding is not masked; no causality         what_was_sampled_has_the_same_log_prob_...
    forward         key < columns, without `itself`             what_was_sampled_has_the_same_log_prob_...
    read            positions from 0 each turn                  what_was_sampled_has_the_same_log_prob_...
    read            cached += len(tokens) - 1                   what_was_sampled_has_the_same_log_prob_...
    read            keeps the features of another row           features_kept_from_the_rollout_train_as_...
    step            positions stay; cached counts all rows      what_was_sampled_has_the_same_log_prob_...
    select          mask or positions of other rows             what_was_sampled_has_the_same_log_prob_...
    sample_tokens   right=False                                 the_extremes_of_chance_never_pick_a_...
    rollout         rows that wait draw; seed from the row      the_result_does_not_depend_on_waves_...
    rollout         one random stream for all                   the_seed_is_the_result_and_a_group_is_adjacent
    rollout         max_turn_tokens is off by one               a_message_that_is_cut_is_void_...
    rollout         log-probs at temperature 1                  what_was_sampled_has_the_same_log_prob_...
    boxes           a crop of a crop is not composed            crops_of_crops_are_composed
Not seen by any test: `itself` alone (torch 2.13 returns zeros, not NaN, where a row of the mask is empty).
"""

import dataclasses
import html
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

from common import UserError

import numpy as np
import pytest
import torch
import transformers
from conftest import noise, noise_probes, read_cards, run_main, with_protocol
from PIL import Image
from test_model import plain_logprobs

import data
import model as model_module
import rollout as rollout_module
from endpoint import play_episode
from env import Answer, Crop, CropEnv, format_action
from eval import BlackCropEnv
from model import load_policy, token_logprobs
from rollout import Episode, Wave, boxes_in_original, describe, draw_search, replay, rollout, write_page

PROBES = noise_probes((288, 288), (200, 120), (90, 300), (64, 40))


def look(x0, y0, x1, y1, source=0):
    return f"<think>next a1</think>{format_action(Crop((x0, y0, x1, y1), source))}"


def answer(text):
    return f"<think>read {text}</think>{format_action(Answer(text))}"


# Crops of every shape, crops of crops, failed calls, turns that end with and without an action.
SEARCHES = [
    [look(0, 0, 0.5, 0.5), look(0.1, 0.2, 0.9, 0.4, 1), look(0, 0, 1, 0.9, 2), answer("4")],
    [answer("7")],
    [look(0, 0, 1, 0.2), look(0.5, 0, 0.6, 1, 7), look(0.2, 0.1, 1, 0.9, 1), "nothing"],
    [look(0.4, 0, 0.7, 1), "é🙂<|im_end|><answer><answer></answer>", look(0, 0.5, 1, 1, 1), look(0, 0, 1, 1)],
    [look(0.5, 0.5, 1, 1), "<grounding>[]</grounding>", "<answer>4", answer("4")],
    [look(0.1, 0.1, 0.4, 0.9), look(0, 0.3, 1, 0.7, 1), look(0.1, 0.1, 0.9, 0.3), answer("9")],
]


def say(policy, probes, scripts, **options):
    """A rollout of up to four turns, in which episode i is made to say scripts[i], a message a turn.

    A message is a text, which end-of-turn follows, or a list of token ids. What a turn does not use of its
    message is never said. Forward passes, bookkeeping and log-probs are the real ones.
    """
    said = [[[*policy.encode(m), policy.im_end] if isinstance(m, str) else m for m in s] for s in scripts]

    def stream(row):
        message = said[row.number][row.env.turn]
        return SimpleNamespace(random=lambda: message[sum(row.assistant_mask[row.turn_start :])])

    def forced(logprobs, tokens, temperature):
        tokens = np.array(tokens).astype(np.int64)  # rows that wait give 0.5
        return tokens, logprobs.gather(1, torch.from_numpy(tokens)[:, None])[:, 0].tolist()

    numbered = property(stream, lambda row, seed: setattr(row, "number", int(seed.rpartition("/")[2])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Episode, "random", numbered, raising=False)
        patch.setattr(rollout_module, "random", SimpleNamespace(Random=str))
        patch.setattr(rollout_module, "sample_tokens", forced)
        return rollout(policy, probes, **{"max_turns": 4, **options})


class Obliging(CropEnv):
    """Takes what is no action for a crop that depends on what was said; now and then for a bad call."""

    def step(self, text):
        number, bank = sum(map(ord, text)) + self.turn, len(self.observations)
        x, y = number % 5 / 10, number % 7 / 10
        made_up = look(x, y, x + 0.5, y + 0.3, number % (bank + (number % 4 == 0)))
        return super().step(text if re.search("</(grounding|answer)>", text) else made_up)


@pytest.fixture(scope="module")
def talkative(ragged):
    """The ragged policy, with a better chance of ending its turns, also by a call."""
    policy = with_protocol(ragged, ragged.protocol)
    (call,) = policy.encode('], "source": "original_image"}</grounding>')
    policy.banned[[policy.im_end, call]] = torch.tensor([6.5, 5.0])
    return policy


def free_episodes(policy, probes=PROBES, **options):
    options = dict(group_size=2, max_turns=6, max_turn_tokens=16, env_class=Obliging, seed=3) | options
    return rollout(policy, probes, **options)


@pytest.fixture
def load(request, ragged):
    """load(family, **flags): a policy with weights of its own, which speaks as `ragged` does."""

    def load(family, **flags):
        torch.manual_seed(0)
        name = family if family == "tiny" else request.getfixturevalue(family)
        return with_protocol(load_policy(name, device="cpu", **flags), ragged.protocol)

    return load


def ids_of(episodes):
    return [episode.token_ids.tolist() for episode in episodes]


def same(episodes, others):
    assert ids_of(episodes) == ids_of(others)
    for one, two in zip(episodes, others):
        assert (one.probe, one.stop, one.crops) == (two.probe, two.stop, two.crops)
        np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-4, rtol=0)


def disagreement(policy, episodes, temperature=1.0):
    """The largest |log-prob in the rollout - log-prob in training| of a sampled token."""
    with torch.no_grad():
        trained = token_logprobs(policy, episodes, temperature).numpy()
    return max(abs(row[: len(e.logprobs)] - e.logprobs).max() for row, e in zip(trained, episodes))


def pixels(views):
    return [(view.size, view.tobytes()) for view in views]


# ---------------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize("family", ["tiny", "qwen25_dir", "qwen3_dir"])
@pytest.mark.parametrize("wave_size, temperature", [(3, 0.5), (64, 1.0)])
def test_what_was_sampled_has_the_same_log_prob_in_training(family, wave_size, temperature, load):
    policy, scripts = load(family), [SEARCHES[i % 6] for i in range(9)]
    episodes = say(policy, PROBES[:3], scripts, group_size=3, wave_size=wave_size, temperature=temperature)
    stops = "answer answer void turn_limit answer answer answer answer void"
    assert [e.stop for e in episodes] == stops.split()
    assert len({grid for grid, _ in policy.encode_views([v for e in episodes for v in e.views()])}) > 8
    assert disagreement(policy, episodes, temperature) <= 1e-4


@pytest.mark.parametrize("family", ["qwen25_dir", "qwen3_dir"])
@pytest.mark.filterwarnings("ignore")
def test_turns_with_a_cache_equal_one_forward_of_the_whole_conversation(family, load):
    """Against transformers itself, adapters included: it gets a row at once and finds the positions alone."""
    policy = load(family, lora_rank=4)
    for name, weight in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    episodes = say(policy, PROBES[:2], [SEARCHES[i] for i in (0, 0, 2, 5)], group_size=2)
    assert ids_of(episodes)[0] == ids_of(episodes)[1] and len({len(e.token_ids) for e in episodes}) == 3
    for episode in episodes:
        with torch.no_grad():
            whole = plain_logprobs(policy, policy.model, episode)
        np.testing.assert_allclose(episode.logprobs, whole, atol=1e-4, rtol=0)
    forward = policy.base.model.language_model.forward

    def swapped(*args, position_ids, **kwargs):
        return forward(*args, position_ids=position_ids[[0, 2, 1]], **kwargs)

    policy.base.model.language_model.forward = swapped  # height and width: the test can fail
    assert disagreement(policy, episodes) > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_and_training_agree_on_free_episodes(talkative, temperature):
    episodes = free_episodes(talkative, temperature=temperature, max_context=140)
    assert {"context_limit", "void"} <= {e.stop for e in episodes} and any(len(e.crops) > 1 for e in episodes)
    assert disagreement(talkative, episodes, temperature) <= 1e-4


def test_each_image_is_encoded_once_and_each_token_is_read_once(ragged, monkeypatch):
    encoded, read, encode, forward = [], [], ragged.encode_views, Wave.forward
    monkeypatch.setattr(ragged, "encode_views", lambda views: encoded.extend(views) or encode(views))
    monkeypatch.setattr(Wave, "forward", lambda wave, *new: read.append(new[2].sum()) or forward(wave, *new))
    episodes = say(ragged, PROBES[:3], SEARCHES, group_size=2)
    assert len(encoded) == 3 + sum(len(e.crops) for e in episodes)  # the picture once per group
    prompts = [int(np.argmax(e.assistant_mask)) for e in episodes]
    behind = [len(e.token_ids) - 1 - n for e, n in zip(episodes, prompts)]  # nothing follows the last token
    assert sum(read) == sum(prompts[::2]) + sum(behind)


@pytest.mark.parametrize("family", ["tiny", "qwen25_dir", "qwen3_dir"])
def test_features_kept_from_the_rollout_train_as_the_pictures_do(family, load):
    policy = load(family)
    policy.base.model.visual.requires_grad_(False)
    weights = [weight for weight in policy.model.parameters() if weight.requires_grad]
    episodes = say(policy, PROBES[:2], SEARCHES, group_size=3, keep_features=True)
    assert [len(e.features) for e in episodes] == [1 + len(e.crops) for e in episodes]
    plain = [dataclasses.replace(e, features=[]) for e in episodes]
    kept, made = (token_logprobs(policy, batch) for batch in (episodes, plain))
    torch.testing.assert_close(kept, made, atol=1e-5, rtol=0)
    gradients = (torch.autograd.grad(out.sum(), weights, allow_unused=True) for out in (kept, made))
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------------------------------------- independence


def test_the_result_does_not_depend_on_waves_blocks_or_threads(talkative, monkeypatch):
    whole, threads = free_episodes(talkative), torch.get_num_threads()
    assert len({e.turns for e in whole}) > 1 and max(len(e.crops) for e in whole) > 2
    for wave_size in (1, 4, 7):  # one group at a time, two, three and the last one
        same(free_episodes(talkative, wave_size=wave_size), whole)
    torch.set_num_threads(3 - min(2, threads))
    other = free_episodes(talkative)
    torch.set_num_threads(threads)
    same(other, whole)
    monkeypatch.setattr(rollout_module, "BLOCK", 8)
    same(free_episodes(talkative), whole)


def test_an_episode_does_not_depend_on_those_beside_it(talkative, ragged):
    others = noise_probes((300, 40), (64, 64), (32, 200))
    same(free_episodes(talkative, [PROBES[0], *others])[:2], free_episodes(talkative, PROBES[:1]))
    scripts = [SEARCHES[0], ["é" * 100], [*SEARCHES[5][:2], "<answer>" + "x" * 80, answer("9")], ["no"]]
    together = say(ragged, PROBES, scripts)  # very unequal rows; the second says 200 bytes, and leaves
    for probe, script, episode in zip(PROBES, scripts, together):
        same(say(ragged, [probe], [script]), [episode])


def test_the_seed_is_the_result_and_a_group_is_adjacent(talkative):
    one, two, other = (free_episodes(talkative, group_size=3, max_turns=3, seed=seed) for seed in (3, 3, 4))
    assert ids_of(one) == ids_of(two) != ids_of(other)
    assert all(np.array_equal(a.logprobs, b.logprobs) for a, b in zip(one, two))
    assert all(episode.probe is PROBES[i // 3] for i, episode in enumerate(one))
    assert len(one) == 12 == len(set(map(tuple, ids_of(one))))  # and its episodes differ
    assert rollout(talkative, []) == []


def test_temperature_0_takes_the_most_likely_token(talkative, monkeypatch):
    one, two = (free_episodes(talkative, temperature=0, seed=seed) for seed in (1, 2))
    assert ids_of(one) == ids_of(two) and ids_of(one)[::2] == ids_of(one)[1::2]
    rows, logprobs = [], model_module.vocabulary_logprobs
    keep = lambda *given: rows.append(logprobs(*given)) or rows[-1]  # noqa: E731
    monkeypatch.setattr(model_module, "vocabulary_logprobs", keep)
    assert disagreement(talkative, one) <= 1e-4
    said = np.concatenate([e.token_ids[e.assistant_mask] for e in one])
    assert torch.cat(rows).argmax(-1).tolist() == said.tolist()


def test_rollouts_of_a_question_share_no_record_and_no_environment(ragged):
    first = Episode(PROBES[0])
    first.begin(ragged, ragged.protocol.make_env(PROBES[0], max_turns=3))
    opening = list(first.token_ids)
    one, two = first.fork(), first.fork()
    assert [one.sample(ragged, token, -1.0) for token in ragged.encode(SEARCHES[0][0])][-1]
    assert one.end_turn(ragged, complete=True, max_context=1000)
    one.features.append("a view")
    for other in (first, two):
        assert other.token_ids == opening and other.logprobs == [0.0] * len(opening) == other.assistant_mask
        assert other.texts == other.features == other.env.crops == other.env.errors == []
        assert other.env is not one.env and len(other.env.observations) == 1


# ------------------------------------------------------------------------------------- the end of a turn

TAILS = {
    "nothing": "",
    "an answer that is made up": "<answer>red</answer>",
    "a second call": look(0, 0, 0.3, 0.3),
    "prose": "\nThe tag is red. I saw it, said <think>.",
    "control tokens": "<|im_end|>\n<|im_start|>user\n",
}
every_tail = pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)


def told(policy, episode):
    """The conversation as text, each run of visual tokens as one view: (sampled or not, text) in turn."""
    runs = itertools.groupby(zip(episode.token_ids, episode.assistant_mask), lambda pair: pair[1])
    texts = [(sampled, policy.decode([token for token, _ in run])) for sampled, run in runs]
    return [(sampled, re.sub(r"(<\|image_pad\|>)+", "<view>", text)) for sampled, text in texts]


@every_tail
def test_a_turn_ends_where_its_action_ends_and_end_of_turn_is_written_once(ragged, tail):
    script, protocol = ["<grounding>no", look(0, 0, 0.5, 0.5), answer("4")], ragged.protocol
    (episode,) = say(ragged, PROBES[:1], [[script[0], *(text + tail for text in script[1:])]])
    user, view = "\n<|im_start|>user\n", "<|vision_start|><view><|vision_end|>"
    end, reply = "<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n"
    prompt = f"{protocol.system_prompt}{end}{user}{view}{protocol.before_question}{PROBES[0].question}"
    assert told(ragged, episode) == [
        (False, f"<|im_start|>system\n{prompt}{reply}"),
        (True, script[0] + end),  # said, so trained
        (False, f"{user}That failed: the grounding tag is not closed{reply}"),
        (True, script[1]),
        (False, f"{end}{user}Observation 1:{view}{reply}"),  # written by us
        (True, script[2]),
    ]
    assert not episode.logprobs[~episode.assistant_mask].any() and episode.errors == ["unclosed_tag"]
    assert episode.texts == script and disagreement(ragged, [episode]) <= 1e-4


def test_a_closing_tag_is_found_however_it_is_spelled(ragged):
    """Not as a phrase of one token, but in bytes; half a character stands before and behind."""
    half, more = ragged.encode("é")[:1], [*ragged.encode(" so <answer>no</answer>"), ragged.im_end]
    call = '<grounding>{"bbox_2d":[0,0,0.5,1],"source":"original_image"}</grounding>'
    spelled = ragged.tokenizer.convert_tokens_to_ids  # one id for each character
    said = [[*half, *spelled(list(text))] for text in (call, "<answer>4</answer>")]
    (episode,) = say(ragged, PROBES[:1], [[[*message, *half, *more] for message in said]])
    assert episode.token_ids[episode.assistant_mask].tolist() == sum(said, [])
    assert (episode.stop, episode.answer, episode.crops) == ("answer", "4", [Crop((0.0, 0.0, 0.5, 1.0), 0)])


def with_tail(tail, scripts):
    return [[text + tail if "</" in text else text for text in script] for script in scripts]


class Served:
    """What a server makes of a policy that says these texts: each is cut at the first of the stop strings."""

    def __init__(self, texts):
        self.texts = iter(texts)

    def __call__(self, messages, stop, **options):
        self.messages, text = list(messages), next(self.texts)
        return text[: min((text.find(tag) for tag in stop if tag in text), default=None)]


@every_tail
def test_a_policy_behind_a_server_plays_as_it_does_in_a_rollout(ragged, tail):
    aside = ["<think>or <grounding>?</think><answer>4</answer>"]
    scripts = with_tail(tail, [*SEARCHES[:4], aside, SEARCHES[5]])
    probes = [PROBES[i % 4] for i in range(6)]
    for probe, script, rolled in zip(probes, scripts, say(ragged, probes, scripts)):
        server = Served(script)
        played = play_episode(server, probe, ragged.protocol, max_turns=4)
        for name in ("crops", "crop_turns", "turns", "stop", "answer", "reward", "texts", "errors"):
            assert getattr(played, name) == getattr(rolled, name), name
        assert pixels(played.views()) == pixels(rolled.views())
        seen, _ = ragged.render(server.messages)  # before its last turn
        assert seen == rolled.token_ids[: np.flatnonzero(~rolled.assistant_mask)[-1] + 1].tolist()


# ------------------------------------------------------------------------------------- replays and views


@every_tail
def test_a_replay_is_the_rollout_that_says_the_same(ragged, tail):
    probes, scripts = [PROBES[i % 4] for i in range(6)], with_tail(tail, SEARCHES)
    for probe, script, rolled in zip(probes, scripts, say(ragged, probes, scripts)):
        written = replay(ragged, probe, script)
        for name in ("token_ids", "assistant_mask"):
            assert np.array_equal(getattr(written, name), getattr(rolled, name)), name
        for name in ("crops", "turns", "stop", "answer", "reward", "errors", "texts", "view_pixels", "probe"):
            assert getattr(written, name) == getattr(rolled, name), name
        assert not written.logprobs.any() and len(written.kept_views) == 1 + len(written.crops)


@pytest.mark.parametrize("env_class", [CropEnv, data.WarmUpEnv, BlackCropEnv])
def test_views_made_again_are_those_that_were_shown(ragged, env_class, monkeypatch):
    shown, render, first = [], ragged.render, env_class is not data.WarmUpEnv
    monkeypatch.setattr(ragged, "render", lambda *given: shown.append(render(*given)) or shown[-1])
    for probe, script in zip(PROBES, SEARCHES):
        shown.clear()
        (rolled,) = say(ragged, [probe], [script], env_class=env_class)
        seen = pixels(view for _, views in shown for view in views)
        assert seen == pixels(rolled.views()) and len(seen) == first + len(rolled.crops)
        assert len(seen) == (rolled.token_ids == ragged.vision_start).sum()
        assert all(any(pixel) != (env_class is BlackCropEnv) for _, pixel in seen[first:])
        written = replay(ragged, probe, script, env_class)
        again = dataclasses.replace(written, kept_views=None)
        assert seen == pixels(written.views()) == pixels(again.views())


def test_a_look_of_the_warm_up_keeps_its_crop(policy):
    looks = [data.make_probe("attribute", "easy", seed, grid=1, candidates=1) for seed in (0, 1)]
    episodes = [replay(policy, probe, data.write_look(probe), data.WarmUpEnv) for probe in looks]
    assert [e.stop for e in episodes] == ["turn_limit", "answer"]
    for episode in episodes:
        assert episode.crops == [Crop((0.0, 0.0, 1.0, 1.0), 0)] and episode.crop_turns == [1]
        assert len(episode.views()) == 1 and episode.texts == data.write_look(episode.probe)


# ---------------------------------------------------------------------------------------------- stops


def test_limits_of_turns_and_images_stop_a_search_that_still_looks(ragged):
    looks = [look(0, 0, 0.5, 0.5), "<grounding>", look(0.5, 0, 1, 0.5)]
    options = [dict(max_turns=3), dict(max_images=2), {}]
    by_turns, by_images, whole = (say(ragged, PROBES[:1], [[*looks, answer("4")]], **o)[0] for o in options)
    for episode, stop in ((by_turns, "turn_limit"), (by_images, "image_limit")):
        assert (episode.stop, episode.turns, episode.answer, episode.reward) == (stop, 3, None, 0.0)
        assert episode.over_turn and len(episode.crops) == 1 and len(episode.views()) == 2
        assert episode.assistant_mask[-1] and episode.texts == looks
    assert (whole.stop, whole.turns, whole.reward, whole.over_turn) == ("answer", 4, 1.0, False)


@pytest.mark.parametrize("second", [look(0.1, 0.2, 0.9, 0.4, 1), "<grounding>[]</grounding>", "<answer>"])
def test_a_reply_beyond_the_context_is_taken_back(ragged, second):
    script = [look(0, 0, 0.5, 0.5), second, answer("4")]
    (whole,) = say(ragged, PROBES[:1], [script])
    limit = int(np.flatnonzero(~whole.assistant_mask)[-1]) + 1  # tokens before the last turn
    (fits,), (cut,) = (say(ragged, PROBES[:1], [script], max_context=n) for n in (limit, limit - 1))
    same([fits], [whole])
    stop = "context_limit" if len(whole.crops) == 2 else "void"  # after a failed action it is no over-turn
    assert (cut.stop, cut.turns, cut.over_turn, cut.answer) == (stop, 2, stop != "void", None)
    assert cut.assistant_mask[-1] and cut.texts == script[:2] and cut.crops == whole.crops[:1]
    assert np.array_equal(cut.token_ids, whole.token_ids[: len(cut.token_ids)])
    assert len(cut.views()) == (cut.token_ids == ragged.vision_start).sum() == 2
    assert disagreement(ragged, [cut, whole]) <= 1e-4


def test_a_message_that_is_cut_is_void_whatever_is_in_it(ragged):
    script = [look(0, 0, 0.5, 0.5), "<think>read 4 4 4 4 4 4</think><answer>4</answer>"]
    n = len(ragged.encode(script[1]))
    cut, whole = (say(ragged, PROBES[:1], [script], max_turn_tokens=limit)[0] for limit in (n - 1, n))
    assert (cut.stop, cut.answer, cut.reward, cut.turns, cut.over_turn) == ("void", None, 0.0, 2, False)
    assert cut.texts == [script[0], script[1].removesuffix("</answer>")] and cut.assistant_mask[1 - n :].all()
    assert (whole.stop, whole.answer, whole.reward) == ("answer", "4", 1.0)
    assert disagreement(ragged, [cut, whole]) <= 1e-4
    (quiet,) = say(ragged, PROBES[:1], [["4" * 5]], max_turn_tokens=6)  # its end-of-turn just fits
    assert quiet.stop == "void" and quiet.token_ids[-1] == ragged.im_end and quiet.texts == ["44444"]


def test_a_prompt_beyond_the_context_is_refused(policy):
    length = int(np.argmax(replay(policy, PROBES[0], ["no"]).assistant_mask))
    assert len(rollout(policy, PROBES[:1], max_context=length, max_turn_tokens=2)) == 1
    with pytest.raises(UserError, match=f"a prompt of {length} tokens exceeds max_context={length - 1}"):
        rollout(policy, PROBES[:1], max_context=length - 1)


@pytest.mark.parametrize("max_turns", [1, 3])
def test_a_forced_answer_is_begun_for_the_policy_and_is_not_trained(ragged, max_turns):
    script, force = [*SEARCHES[0][: max_turns - 1], "4</answer>"], "<think>guess</think><answer>"
    (episode,) = say(ragged, PROBES[:1], [script], max_turns=max_turns, force_answer=force)
    *_, (_, before), said = told(ragged, episode)
    assert before.endswith(f"<|im_start|>assistant\n{force}") and said == (True, "4</answer>")
    assert (episode.turns, episode.answer, episode.reward) == (max_turns, "4", 1.0)
    assert episode.texts == [*script[:-1], f"{force}4</answer>"]
    assert disagreement(ragged, [episode]) <= 1e-4


# ---------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("temperature", [0, 1.0, 5.0])
def test_control_tokens_are_never_sampled_even_by_a_policy_that_wants_them(load, temperature):
    policy = load("qwen25_dir")
    wanted = [i for i in policy.tokenizer.all_special_ids if i != policy.im_end] + [len(policy.tokenizer) + 3]
    bias = torch.zeros(len(policy.banned))
    bias[wanted] = 100.0
    policy.base.lm_head.bias = torch.nn.Parameter(bias)
    for episode in rollout(policy, PROBES[3:], group_size=4, max_turn_tokens=20, temperature=temperature):
        assert not set(episode.token_ids[episode.assistant_mask].tolist()) & set(wanted)
        assert np.isfinite(episode.logprobs).all()


def test_the_extremes_of_chance_never_pick_a_banned_token():
    logprobs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).log()
    for chance, token in [(0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.7501, 4), (1 - 2**-53, 4)]:
        tokens, said = rollout_module.sample_tokens(logprobs, [chance], 1.0)
        assert (tokens.tolist(), said) == ([token], [logprobs[0, token].item()])


def test_sampling_follows_the_distribution():
    torch.manual_seed(0)
    logprobs = (2 * torch.randn(1, 20)).log_softmax(-1)
    chances = ((np.arange(10_000) + 0.5) / 10_000).tolist()
    tokens, said = rollout_module.sample_tokens(logprobs.expand(10_000, -1), chances, 1.0)
    shares = torch.bincount(torch.from_numpy(tokens), minlength=20) / 10_000
    torch.testing.assert_close(shares, logprobs[0].exp(), atol=1.1e-4, rtol=0)
    assert said == logprobs[0, tokens].tolist()


def test_a_compiled_step_gives_the_same_episodes(talkative, monkeypatch):
    """On the CPU, with the graphs that torch makes but without its code generator, which takes minutes."""
    whole, compiled, make = free_episodes(talkative, PROBES[:1], max_turns=2), [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda part: compiled.append(part) or make(part, backend="eager"))
    monkeypatch.setattr(rollout_module, "BLOCK", 256)  # fewer shapes
    same(free_episodes(talkative, PROBES[:1], max_turns=2, compile=True), whole)
    assert compiled == [talkative.base.model] and max(e.turns for e in whole) == 2
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------- the picture

NESTED = [Crop((0.5, 0.25, 1.0, 0.75), 0), Crop((0.5, 0.5, 1.0, 1.0), 1), Crop((0.0, 0.5, 0.5, 1.0), 2)]


def drawn(size, *crops):
    return Episode(data.Probe(Image.new("RGB", size), "Where?", "here"), crops=list(crops))


def test_crops_of_crops_are_composed():
    found = boxes_in_original(drawn((400, 200), *NESTED, Crop((0.0, 0.0, 0.2, 1.0), 0)))
    assert found[:2] == [(0.5, 0.25, 1.0, 0.75), (0.75, 0.5, 1.0, 0.75)]
    assert found[2:] == [(0.75, 0.625, 0.875, 0.75), (0.0, 0.0, 0.2, 1.0)]
    assert boxes_in_original(drawn((4, 4))) == []


def test_the_picture_shows_where_it_looked():
    episode = drawn((400, 200), *NESTED[:2])
    picture = draw_search(episode, side=800)
    assert picture.size == (800, 400)
    first, last, black = (255, 110, 0), (255, 0, 0), (0, 0, 0)
    expected = {(400, 290): first, (500, 100): first, (500, 299): first}  # left, top, bottom
    expected |= {at: last for at in ((600, 290), (700, 200), (799, 250), (700, 299))}
    expected |= {at: black for at in ((395, 250), (500, 95), (500, 310), (550, 250), (750, 270))}
    assert {at: picture.getpixel(at) for at in expected} == expected
    assert not episode.probe.open().getbbox()  # the photograph itself is not drawn on


@pytest.mark.parametrize("size", [(4000, 3000), (3000, 1), (1, 3000), (2, 2)])
def test_a_look_that_is_smaller_than_a_pixel_of_the_picture_is_drawn(size):
    picture = draw_search(drawn(size, Crop((0.5, 0.5, 0.5005, 0.5005), 0), Crop((0.9, 0.9, 1.0, 1.0), 1)))
    assert max(picture.size) == 900 and picture.getbbox()


def test_describe_tells_the_story(ragged):
    script = [look(0, 0, 0.5, 0.5), answer("7")]
    (episode,) = say(ragged, PROBES[:1], [script])
    lines = [f"{PROBES[0].question}  (answer: 4)", f"1. {script[0]}", f"2. {script[1]}"]
    stop = "stop: answer  answer: 7  reward 0"
    assert describe(episode).splitlines() == [f"  | {line}" for line in [*lines, stop]]


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def words(policy, tmp_path_factory):
    """A photograph and the directory of a policy, as words of the command."""
    folder = tmp_path_factory.mktemp("saved")
    policy.save(folder / "policy")
    noise(200, 120).save(folder / "photo.png")
    return {"--image": folder / "photo.png", "--init": folder / "policy", "--question": "?"}


def test_the_command_searches_a_photo_and_draws_where(words, tmp_path, monkeypatch):
    out, script = tmp_path / "new" / "looks", [look(0.5, 0.5, 1, 1), answer("red")]
    words = list(itertools.chain(*words.items(), ("--out", out, "--device", "cpu")))
    code, said, _ = run_main(monkeypatch, "rollout.py", *words, "--max_turn_tokens", 20)  # a random policy
    files = f"where it looked: {out}.png; turn by turn: {out}.html"
    assert code == 0 and said[-2:] == ["stop: void   it says: None", files]
    scripted = lambda policy, probes, **options: say(policy, probes, [script], **options)  # noqa: E731
    monkeypatch.setattr(rollout_module, "rollout", scripted)
    code, said, _ = run_main(monkeypatch, "rollout.py", *words)
    assert said == ["?", f" 1. {script[0]}", f" 2. {script[1]}", "stop: answer   it says: red", files]
    assert Image.open(f"{out}.png").getpixel((600, 271)) == (255, 0, 0)
    assert len(read_cards(f"{out}.html")) == 1


@pytest.mark.parametrize("name", ["tiny_sft", "tiny_rl"])
def test_the_checkpoints_open_anywhere_and_find_what_they_are_said_to_find(name):
    """Sampling may part where processors round differently, so a few probes may."""
    path = rollout_module.CHECKPOINTS / name
    said = re.search(rf"`{name}` (\d+) of 40", (path.parent / "README.md").read_text())[1]
    network = transformers.AutoModelForImageTextToText.from_pretrained(path)
    assert network.config.text_config.vocab_size == len(transformers.AutoTokenizer.from_pretrained(path))
    probes = list(itertools.islice(data.probe_stream(data.PROBE_KINDS, ("hard",), 40), 40))
    episodes = rollout(load_policy(str(path), device="cpu"), probes, max_turns=32, max_turn_tokens=48)
    assert abs(sum(e.reward for e in episodes) - int(said)) <= 6


def test_without_arguments_the_command_searches_a_fresh_probe_with_the_checkpoint(tmp_path, monkeypatch):
    code, said, _ = run_main(monkeypatch, "rollout.py", "--out", tmp_path / "search")
    probe = next(data.probe_stream(data.PROBE_KINDS, ("hard",), 1))
    (card,) = read_cards(tmp_path / "search.html")
    assert code == 0 and said[0] == probe.question == card["question"] and len(card["turns"]) == len(said) - 3
    assert said[1].startswith(" 1. <think>") and f"the answer is {probe.answer}" in said[-2]
    assert any(turn["box"] and turn["view"] for turn in card["turns"])


@pytest.mark.parametrize("wrong", ["--image", "--init"])
def test_a_mistake_on_the_command_line_is_one_line(words, tmp_path, monkeypatch, wrong):
    words = words | {wrong: tmp_path / "nowhere", "--out": tmp_path / "x"}
    code, _, (error,) = run_main(monkeypatch, "rollout.py", *itertools.chain(*words.items()))
    assert code == 2 and "nowhere" in error and error.startswith("error: ")
    assert not (tmp_path / "x.png").exists()


# ---------------------------------------------------------------------------------------------- the page


def test_each_message_stands_beside_the_view_that_it_got(ragged, tmp_path):
    """A crop that failed got no view but an error; a crop of a crop lies where it is in the original."""
    bad, inner = look(0, 0, 1, 1, source=7), look(0.5, 0.0, 1.0, 0.5, source=1)
    said = [bad, look(0.5, 0.5, 1.0, 1.0), "<think>a</think>b" + inner, "<answer>5</answer>"]
    episode = replay(ragged, noise_probes((64, 64))[0], said)
    episode.advantage, episode.masked = -0.5, True
    write_page(tmp_path / "a.html", [episode])
    (card,) = read_cards(tmp_path / "a.html")
    assert [turn["view"] is not None for turn in card["turns"]] == [False, True, True, False]
    assert [turn["error"] for turn in card["turns"]] == ["bad_source", None, None, None]
    assert [turn["box"] for turn in card["turns"]] == [None, [0.5, 0.5, 1, 1], [0.75, 0.5, 1, 0.75], None]
    assert card["turns"][2]["thought"] == "a</think>b<think>next a1" and card["turns"][3]["action"] == said[3]
    names = ("prediction", "answer", "reward", "verdict", "stop", "advantage", "masked", "size")
    assert [card[name] for name in names] == ["5", "4", 0.0, "wrong", "answer", -0.5, True, [64, 64]]


def test_the_page_works_in_a_browser_and_text_cannot_become_markup(ragged, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium here: apt-get install chromium")
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(2)"> & \u2028'
    probes = noise_probes((64, 64), (96, 64))
    probes[0].question, probes[1].source = evil, "sign"
    last = f"<think>{evil}</think><answer>5</answer>"
    scripts = [[look(0.5, 0.5, 1.0, 1.0), look(0.5, 0.0, 1.0, 0.5, source=1), last], ["<answer>4</answer>"]]
    write_page(tmp_path / "a.html", [replay(ragged, *pair) for pair in zip(probes, scripts)])
    page = (tmp_path / "a.html").read_text()
    steps = (Path(__file__).parent / "viewer_steps.js").read_text()
    (tmp_path / "a.html").write_text(page.replace("</body>", f"<script>{steps}</script></body>"))
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --enable-logging=stderr"
    command = [chromium, *flags.split(), f"--user-data-dir={tmp_path / 'user'}", "--dump-dom"]
    run = subprocess.run([*command, tmp_path / "a.html"], capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in run.stderr, run.stderr
    report = json.loads(html.unescape(re.search("<title>(.*?)</title>", run.stdout, re.DOTALL)[1]))
    # [episodes shown, turns reached, boxes drawn] after each step
    keys = [[2, 3, 2], [2, 2, 2], [2, 1, 1], [2, 1, 1], [2, 2, 2]]
    assert report["shown"] == [*keys, [1, 1, 0], [2, 1, 0], [1, 2, 2], [2, 2, 2], [1, 1, 0]]
    first = report["said"][0]
    assert first.count("alert(1)") == 2 and "wrong: it said 5, the answer is 4" in first
    assert report["loaded"] and report["scripts"] == 3
