"""Tests of rollout.py: agreement with training, independence of slots, masks, stops, the cache, the picture.

A random policy mostly says junk, so two ways make its episodes go on. `say` forces scripted messages on it, token by
token, but keeps the log-probs that it gives them. `talkative` makes the end of a turn likely, and the world
`Obliging` takes whatever was said for a crop: there everything is really sampled.

Lines worth flipping, each with the test that then fails:
    _forward     positions from 0 each turn              -> what_was_sampled_has_the_same_log_prob_in_training
    _forward     row.cached += len(new) - 1              -> the same, and what_must_be_read_is_read_once
    _forward     last = -1 for all rows                  -> what_was_sampled_..., the_result_does_not_depend_on_slots
    address      `<=` -> `<`; columns without starts     -> what_was_sampled_...
    decoder      no columns, or no bucket, in the key    -> a_recorded_step_in_buckets_...
    reserve      growth forgets the old contents         -> growing_keeps_what_the_cache_holds, what_was_sampled_...
    _sample      right=True -> False; no clamp           -> the_extremes_of_chance_never_pick_a_banned_token
    sample       the end-of-turn token is not masked     -> the_mask_holds_what_was_said_and_nothing_else
    end_turn     no rollback                             -> a_reply_beyond_the_context_is_taken_back
    episode      all of env.crops                        -> the same
    views        crop the view, not the bank             -> views_made_again_are_those_that_were_shown
"""
import dataclasses
import sys
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

import data
import rollout as rollout_module
from conftest import RAGGED, noise, noise_probes, with_protocol
from env import Answer, Crop, CropEnv, format_action
from model import load_policy, mrope_positions, token_logprobs
from rollout import (Config, Decoder, Episode, Group, SlotCache, Transcript, boxes_in_original, describe, draw_search,
                     main, messages, replay, rollout)
from test_model import plain_logprobs

Row = rollout_module.Row
SIZES = ((288, 288), (200, 120), (90, 300), (64, 40))


def look(box, source=0, thought="next a1"):
    return f"<think>{thought}</think>{format_action(Crop(box, source))}"


def answer(text):
    return f"<think>read {text}</think>{format_action(Answer(text))}"


# six turns: every shape of crop, crops of crops, failed calls; the script of rollout i is SEARCHES[i % 6]
SEARCHES = [
    [look((0.0, 0.0, 0.5, 0.5)), look((0.1, 0.2, 0.9, 0.4), 1), look((0.3, 0.0, 0.5, 1.0)), look((0.0, 0.0, 1.0, 0.9), 2),
     look((0.2, 0.2, 0.8, 0.9), 4), answer("4")],
    [answer("7")],
    [look((0.0, 0.0, 1.0, 0.2)), look((0.5, 0.0, 0.6, 1.0), 7), look((0.2, 0.1, 1.0, 0.9), 1), "<think>nothing</think>"],
    [look((0.4, 0.0, 0.7, 1.0), thought="é漢🙂 <|im_end|><|image_pad|>"), f"{answer('1')}{answer('2')}", look((0.0, 0.5, 1.0, 1.0), 1),
     look((0.0, 0.0, 1.0, 1.0)), look((0.1, 0.1, 0.9, 0.3)), look((0.6, 0.6, 0.9, 0.9), 3)],
    [look((0.5, 0.5, 1.0, 1.0)), "<grounding>[]</grounding>", answer("4")],
    [look((0.1, 0.1, 0.4, 0.9)), look((0.0, 0.3, 1.0, 0.7), 1), look((0.0, 0.0, 0.9, 1.0), 2), answer("9")],
]


@pytest.fixture
def say(monkeypatch):
    """say(policy, probes, scripts, **options): a rollout in which episode i is made to say scripts[i].

    A message is followed by the end of the turn; a list of token ids is taken as it is. Forward passes, bookkeeping
    and log-probs are the real ones.
    """
    def play(policy, probes, scripts, **options):
        class Forced(Row):
            def __init__(self, index, *rest):
                super().__init__(index, *rest)
                said = [[*policy.encode(text), policy.im_end] if isinstance(text, str) else text for text in scripts[index]]
                tokens = iter(sum(said, []))
                self.random = SimpleNamespace(random=lambda: next(tokens))

        def forced(logprobs, tokens, temperature):
            return tokens, logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()

        monkeypatch.setattr(rollout_module, "Row", Forced)
        monkeypatch.setattr(rollout_module, "_sample", forced)
        return rollout(policy, probes, **options)

    return play


class Obliging(CropEnv):
    """Takes every complete message for a crop that depends on what was said; now and then for a bad call."""

    def step(self, text):
        number = sum(map(ord, text)) + self.turn
        x, y = number % 5 / 10, number % 7 / 10
        source = number % (len(self.observations) + (number % 4 == 0))
        return super().step(look((x, y, x + 0.5, y + 0.3), source))


@pytest.fixture(scope="module")
def talkative(ragged):
    """The ragged policy, with a better chance of ending its turns."""
    policy = with_protocol(ragged, ragged.protocol)
    policy.banned[policy.im_end] = 4.0
    return policy


def free_episodes(policy, **options):
    options = dict(group_size=2, max_turns=6, max_turn_tokens=16, make_env=Obliging, seed=3) | options
    return rollout(policy, noise_probes(*SIZES), **options)


def disagreement(policy, episodes):
    """The largest |log-prob in the rollout - log-prob in training| over all sampled tokens of the batch."""
    with torch.no_grad():
        trained = token_logprobs(policy, episodes)
    gaps = []
    for row, episode in zip(trained, episodes):
        n = len(episode.token_ids)
        assert not row[n:].any() and not episode.logprobs[~episode.assistant_mask].any()
        gaps.append((row[:n] - torch.from_numpy(episode.logprobs)).abs().max().item())
    return max(gaps)


# ---------------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize("family", ["tiny", "qwen25_dir", "qwen3_dir"])
@pytest.mark.parametrize("slots", [3, 64])
def test_what_was_sampled_has_the_same_log_prob_in_training(family, slots, ragged, say, request):
    policy = ragged
    if family != "tiny":
        policy = with_protocol(load_policy(request.getfixturevalue(family), device="cpu"), ragged.protocol)
    scripts = [SEARCHES[i % 6] for i in range(9)]
    episodes = say(policy, noise_probes(*SIZES[:3]), scripts, group_size=3, max_turns=6, slots=slots)
    assert [e.stop for e in episodes] == ["answer", "answer", "void", "over_turn", "answer", "answer"] + ["answer", "answer", "void"]
    grids = {tuple(grid) for e in episodes for grid in policy.pixels(e.views())["image_grid_thw"].tolist()}
    assert len(grids) > 8 and max(e.turns for e in episodes) == 6
    assert disagreement(policy, episodes) <= 1e-4


@pytest.mark.parametrize("family", ["qwen25_dir", "qwen3_dir"])
@pytest.mark.parametrize("flags", [{"lora_rank": 4}, {"lora_rank": 4, "quantize": "nf4"}], ids=["lora", "nf4"])
@pytest.mark.filterwarnings("ignore")
def test_turns_with_a_cache_equal_one_forward_of_the_whole_conversation(family, flags, ragged, say, request):
    """Against transformers itself, which gets a row at once and finds its positions alone."""
    if "quantize" in flags:
        pytest.importorskip("bitsandbytes")
    policy = load_policy(request.getfixturevalue(family), device="cpu", **flags)
    vision, text = policy.base.config.vision_config, policy.base.config.text_config
    assert family == "qwen25_dir" or vision.deepstack_visual_indexes == [0, 1] and text.rope_parameters["mrope_interleaved"]
    policy = with_protocol(policy, ragged.protocol)
    torch.manual_seed(3)
    for name, weight in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    scripts = [SEARCHES[i] for i in (0, 0, 2, 5)]                   # the first two: a group that says the same
    episodes = say(policy, noise_probes(*SIZES[:2]), scripts, group_size=2, slots=3)
    assert np.array_equal(episodes[0].token_ids, episodes[1].token_ids)
    assert len({len(e.token_ids) for e in episodes}) == 3 and len({v.size for e in episodes for v in e.views()}) >= 5
    for episode in episodes:
        with torch.no_grad():
            whole = plain_logprobs(policy, policy.model, episode)
        np.testing.assert_allclose(episode.logprobs, whole, atol=1e-4, rtol=0)
    if "quantize" not in flags:
        axes = policy.base.model.language_model.forward               # the test can fail: height and width swapped

        def swapped(*args, position_ids, **kwargs):
            return axes(*args, position_ids=position_ids[[0, 2, 1]], **kwargs)

        policy.base.model.language_model.forward = swapped
        assert disagreement(policy, episodes) > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_and_training_agree_on_free_episodes(talkative, temperature):
    episodes = free_episodes(talkative, temperature=temperature, slots=5, max_context=140)
    assert "over_context" in {e.stop for e in episodes} and len({e.stop for e in episodes}) > 1
    with torch.no_grad():
        trained = token_logprobs(talkative, episodes, temperature)
    for row, episode in zip(trained, episodes):
        torch.testing.assert_close(row[:len(episode.logprobs)], torch.from_numpy(episode.logprobs), atol=1e-4, rtol=0)


def test_each_image_is_encoded_once_and_what_must_be_read_is_read_once(ragged, say, monkeypatch):
    shown, read = [], []
    pixels, positions = ragged.pixels, mrope_positions
    monkeypatch.setattr(ragged, "pixels", lambda views: shown.extend(views) or pixels(views))
    monkeypatch.setattr(rollout_module, "mrope_positions", lambda ids, *rest: read.append(len(ids)) or positions(ids, *rest))
    episodes = say(ragged, noise_probes(*SIZES[:3]), SEARCHES, group_size=2, max_turns=6, slots=4)
    assert len(shown) == 3 + sum(len(e.crops) for e in episodes)                # the picture once per group
    prompts = [int(np.flatnonzero(e.assistant_mask)[0]) for e in episodes[1::2]]  # copied, but for the last token
    one_by_one = sum(int(e.assistant_mask.sum()) - e.turns for e in episodes) + len(prompts)     # what ends a turn is read
    assert all(n > 1 for n in read)                                                              # with the reply to it
    assert sum(read) + one_by_one == sum(len(e.token_ids) - 1 for e in episodes) - sum(n - 1 for n in prompts)


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_the_keys_of_a_prompt_are_kept_until_its_group_has_copied_them(ragged, say, monkeypatch, slots):
    groups, copied = [], []
    monkeypatch.setattr(rollout_module, "Group", lambda *given: groups.append(Group(*given)) or groups[-1])
    write = SlotCache.write
    monkeypatch.setattr(SlotCache, "write", lambda self, slots, prompt: copied.append(len(slots)) or write(self, slots, prompt))
    say(ragged, noise_probes(*SIZES[:2]), SEARCHES, group_size=3, max_turns=6, slots=slots)
    assert sum(copied) == 4 and [group.copies for group in groups] == [0, 0] and not any(group.prompt for group in groups)


@pytest.mark.parametrize("family", ["tiny", "qwen25_dir", "qwen3_dir"])
def test_features_kept_from_the_rollout_train_as_the_pictures_do(family, ragged, say, request):
    policy = ragged if family == "tiny" else with_protocol(load_policy(request.getfixturevalue(family), device="cpu"), RAGGED)
    policy.base.model.visual.requires_grad_(False)
    try:
        weights = [p for p in policy.model.parameters() if p.requires_grad]
        episodes = say(policy, noise_probes(*SIZES[:2]), SEARCHES, group_size=3, max_turns=6, keep_features=True)
        assert [len(e.features) for e in episodes] == [1 + len(e.crops) for e in episodes]
        plain = [dataclasses.replace(e, features=None) for e in episodes]
        kept, made = (token_logprobs(policy, batch) for batch in (episodes, plain))
        torch.testing.assert_close(kept, made, atol=1e-5, rtol=0)
        for one, two in zip(*(torch.autograd.grad(out.sum(), weights, allow_unused=True) for out in (kept, made))):
            torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)
        assert all(e.features is None for e in say(policy, noise_probes(*SIZES[:2]), SEARCHES, group_size=3, max_turns=6))
    finally:
        policy.base.model.visual.requires_grad_(True)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_result_does_not_depend_on_threads(talkative, threads):
    before = torch.get_num_threads()
    whole = free_episodes(talkative)
    torch.set_num_threads(threads)
    try:
        again = free_episodes(talkative)
        assert all((one.logprobs == two.logprobs).all() for one, two in zip(again, free_episodes(talkative)))   # to the bit
    finally:
        torch.set_num_threads(before)
    assert [e.token_ids.tolist() for e in whole] == [e.token_ids.tolist() for e in again]


# ---------------------------------------------------------------------------------------------- independence


@pytest.mark.survives("faults", "more or fewer rollouts at once, in other slots",
                      "the same seed gives the same episodes")
def test_the_result_does_not_depend_on_slots(talkative):
    whole = free_episodes(talkative)
    assert len({e.turns for e in whole}) > 1 and max(len(e.crops) for e in whole) > 2
    for slots in (1, 3, 64):
        for one, two in zip(whole, free_episodes(talkative, slots=slots)):
            assert one.probe.question == two.probe.question
            assert one.token_ids.tolist() == two.token_ids.tolist() and one.stop == two.stop and one.crops == two.crops
            np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-4)


def test_an_episode_does_not_depend_on_those_beside_it(talkative):
    alone = free_episodes(talkative)[:2]
    probes = [*noise_probes(*SIZES)[:1], *noise_probes((300, 40), (64, 64), (32, 200))]       # the first, among others
    among = rollout(talkative, probes, group_size=2, max_turns=6, max_turn_tokens=16, make_env=Obliging, seed=3, slots=5)[:2]
    assert [e.token_ids.tolist() for e in alone] == [e.token_ids.tolist() for e in among]


def test_the_seed_is_the_result(talkative):
    ids = [[e.token_ids.tolist() for e in free_episodes(talkative, seed=seed)] for seed in (3, 3, 4)]
    assert ids[0] == ids[1] and ids[0] != ids[2]


def test_a_group_is_adjacent_and_its_episodes_differ(talkative):
    probes = noise_probes(*SIZES)
    episodes = rollout(talkative, probes, group_size=3, max_turns=3, max_turn_tokens=16, make_env=Obliging, slots=2)
    assert len(episodes) == 12
    assert all(episode.probe is probes[i // 3] for i, episode in enumerate(episodes))
    assert len({tuple(e.token_ids) for e in episodes}) == 12


def test_temperature_0_takes_the_most_likely_token(talkative):
    one, two = (free_episodes(talkative, temperature=0, seed=seed) for seed in (1, 2))
    assert [e.token_ids.tolist() for e in one] == [e.token_ids.tolist() for e in two]
    assert all(one[i].token_ids.tolist() == one[i + 1].token_ids.tolist() for i in range(0, 8, 2))      # whole groups
    with torch.no_grad():
        for episode in one:
            ids = torch.from_numpy(episode.token_ids)
            where = mrope_positions(episode.token_ids, talkative.pixels(episode.views())["image_grid_thw"].tolist(),
                                    talkative.image_pad, talkative.merge)[0]
            hidden = talkative.base.model(input_ids=ids[None], position_ids=torch.from_numpy(where)[:, None], use_cache=False,
                                          **talkative.pixels(episode.views())).last_hidden_state[0]
            best = (talkative.base.lm_head(hidden) + talkative.banned).argmax(-1)
            said = np.flatnonzero(episode.assistant_mask)
            assert torch.equal(best[said - 1], ids[said])


def test_no_probes_are_no_episodes(policy):
    assert rollout(policy, []) == []


# ---------------------------------------------------------------------------------------------- mask, texts, replay


def test_the_mask_holds_what_was_said_and_nothing_else(ragged, say):
    probes = noise_probes(*SIZES[:3])
    for i, episode in enumerate(say(ragged, probes, SEARCHES, group_size=2)):
        said = SEARCHES[i]
        assert episode.token_ids.shape == episode.assistant_mask.shape == episode.logprobs.shape
        assert ragged.decode(episode.token_ids[episode.assistant_mask]) == "".join(f"{text}<|im_end|>" for text in said)
        injected = ragged.decode(episode.token_ids[~episode.assistant_mask])
        assert injected.startswith("<|im_start|>system\nSearch the picture.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>")
        assert f"<|vision_end|>{probes[i // 2].question}<|im_end|>\n<|im_start|>assistant\n" in injected
        assert injected.count("<|im_start|>assistant\n") == episode.turns == len(said)
        assert messages(ragged, episode) == said
        assert (episode.logprobs[episode.assistant_mask] < 0).all()


def test_every_observation_carries_its_label(ragged, say):
    episode, = say(ragged, noise_probes((288, 288)), [SEARCHES[3]])
    text = ragged.decode(episode.token_ids[~episode.assistant_mask])
    assert [f"Observation {i}:<|vision_start|>" in text for i in (1, 2, 3, 4, 5)] == [True] * 4 + [False]
    assert "That failed: the message has more than one action" in text and episode.errors == ["two_actions"]


def test_a_replay_is_the_rollout_that_says_the_same(ragged, say):
    probes = noise_probes(*SIZES[:3])
    for i, sampled in enumerate(say(ragged, probes, SEARCHES, group_size=2)):
        written = replay(ragged, probes[i // 2], SEARCHES[i])
        for name in ("token_ids", "assistant_mask"):
            assert np.array_equal(getattr(written, name), getattr(sampled, name)), name
        for name in ("crops", "turns", "stop", "answer", "reward", "errors", "view_pixels", "probe"):
            assert getattr(written, name) == getattr(sampled, name), name
        assert not written.logprobs.any()
        kept = written.views()
        assert [v.tobytes() for v in kept] == [v.tobytes() for v in sampled.views()] and kept == written.shown != []


def test_a_replay_ends_where_the_world_ends_it(ragged):
    episode = replay(ragged, noise_probes((48, 48))[0], [answer("4"), look((0.0, 0.0, 1.0, 1.0))])
    assert episode.stop == "answer" and episode.turns == 1 and messages(ragged, episode) == [answer("4")]


def test_the_drawn_searches_replay_as_collected(policy):
    probes = data.probe_stream(data.PROBE_KINDS, ("medium",), 0)
    for search, _ in zip(data.cold_start(probes, 0, trial_share=0.5, impatience=(0.1, 0.1), patient_share=0.5, slip=0.2, max_turns=8),
                         range(8)):
        episode = replay(policy, search.probe, search.texts)
        assert messages(policy, episode) == search.texts
        assert (episode.stop, episode.reward, episode.turns) == ("answer", 1.0, len(search.texts))


def test_rewards_are_those_of_the_grader(ragged, say):
    probes = noise_probes((48, 48))
    episodes = say(ragged, probes, [[answer("4")], [answer(" 4. ")], [answer("5")], ["nothing"]], group_size=4)
    assert [e.reward for e in episodes] == [1.0, 1.0, 0.0, 0.0]
    assert [e.answer for e in episodes] == ["4", "4.", "5", None]


class Witness(CropEnv):
    """Remembers the views that it showed."""
    seen: dict = {}

    def _view(self, image):
        part = super()._view(image)
        self.seen.setdefault(self.question, []).append(part["image"])
        return part


def test_the_rollouts_of_a_question_share_its_first_view(ragged, say):
    Witness.seen = {}
    probes = [data.Probe(noise(200, 100, seed=i), f"question {i}", "4") for i in range(2)]
    episodes = say(ragged, probes, [[look((0.0, 0.0, 0.5, 1.0)), answer("4")]] * 6, group_size=3)
    assert len({tuple(e.token_ids) for e in episodes}) == 2 and all(e.reward == 1.0 for e in episodes)
    Witness.seen = {}
    assert say(ragged, probes, [[answer("4")]] * 6, group_size=3, make_env=Witness)
    assert {name: len(views) for name, views in Witness.seen.items()} == {"question 0": 1, "question 1": 1}


def test_views_made_again_are_those_that_were_shown(ragged, say):
    Witness.seen = {}
    probes = [data.Probe(noise(*SIZES[i % 4], seed=i), f"question {i}", "4") for i in range(6)]
    for episode in say(ragged, probes, SEARCHES, make_env=Witness):
        shown, again = Witness.seen[episode.probe.question], episode.views()
        assert [view.size for view in shown] == [view.size for view in again]
        assert not any(ImageChops.difference(one, two).getbbox() for one, two in zip(shown, again))


def test_views_come_from_the_native_pixels(policy):
    image = noise(2000, 1500)
    episode = replay(policy, data.Probe(image, "?", "4"), [look((0.5, 0.5, 0.6, 0.6)), look((0.2, 0.2, 0.448, 0.5307), 1)])
    sharp = image.crop((1040, 780, 1090, 830)).resize((48, 48), Image.Resampling.LANCZOS)
    assert episode.stop == "over_turn" and len(episode.crops) == 1          # the last turn is out of turns
    episode = replay(policy, data.Probe(image, "?", "4"), [*messages(policy, episode), answer("4")])
    assert ImageChops.difference(episode.views()[2], sharp).getbbox() is None


# ---------------------------------------------------------------------------------------------- stops


def test_over_turn_stops_a_search_at_its_last_turn(ragged, say):
    two, three = look((0.0, 0.0, 0.5, 0.5)), look((0.2, 0.0, 0.5, 0.5))
    episode, = say(ragged, noise_probes((288, 288)), [[two, three, answer("4")]], max_turns=2)
    assert (episode.stop, episode.turns, episode.answer, episode.reward) == ("over_turn", 2, None, 0.0)
    assert episode.over_turn and len(episode.crops) == 1 and episode.token_ids[-1] == ragged.im_end
    episode, = say(ragged, noise_probes((288, 288)), [[two, three, answer("4")]], max_turns=3)
    assert (episode.stop, episode.turns, episode.reward) == ("answer", 3, 1.0)
    assert not episode.over_turn


def test_over_images_stops_a_search_with_a_full_bank(ragged, say):
    said = [look((0.0, 0.0, 0.5, 0.5)), "<grounding>", look((0.5, 0.0, 1.0, 0.5)), answer("4")]
    episode, = say(ragged, noise_probes((288, 288)), [said], max_images=2)
    assert (episode.stop, episode.turns, len(episode.crops), episode.over_turn) == ("over_images", 3, 1, True)
    assert len(episode.views()) == 2 == np.count_nonzero(episode.token_ids == ragged.vision_start)


@pytest.mark.parametrize("second", [look((0.1, 0.2, 0.9, 0.4), 1), "<grounding>nothing</grounding>"])
def test_a_reply_beyond_the_context_is_taken_back(ragged, say, second):
    script, probes = [look((0.0, 0.0, 0.5, 0.5)), second, answer("4")], noise_probes((288, 288))
    whole, = say(ragged, probes, [script])
    start = np.flatnonzero(np.diff(whole.assistant_mask.astype(int)) == 1) + 1    # first token of each message
    limit = int(start[2])                                                         # tokens before the last turn
    fits, = say(ragged, probes, [script], max_context=limit)
    assert fits.stop == "answer" and np.array_equal(fits.token_ids, whole.token_ids)
    cut, = say(ragged, probes, [script], max_context=limit - 1)
    assert (cut.stop, cut.turns, cut.over_turn, cut.answer, cut.reward) == ("over_context", 2, True, None, 0.0)
    assert cut.token_ids[-1] == ragged.im_end and cut.assistant_mask[-1] and messages(ragged, cut) == script[:2]
    assert np.array_equal(cut.token_ids, whole.token_ids[:len(cut.token_ids)])
    assert len(cut.token_ids) == len(cut.assistant_mask) == len(cut.logprobs)
    assert cut.crops == whole.crops[:1] and len(cut.views()) == np.count_nonzero(cut.token_ids == ragged.vision_start) == 2
    assert disagreement(ragged, [cut, whole]) <= 1e-4


def test_a_message_without_an_action_is_void(ragged, say):
    episode, = say(ragged, noise_probes((64, 64)), [[look((0.0, 0.0, 0.5, 0.5)), "nothing"]])
    assert (episode.stop, episode.turns, episode.over_turn, episode.reward) == ("void", 2, False, 0.0)


def test_a_message_cut_by_the_token_limit_is_void(ragged, say):
    first, long = look((0.0, 0.0, 0.5, 0.5)), answer("4" * 30)
    limit = len(ragged.encode(first)) + 1                                         # the first message just fits
    episode, = say(ragged, noise_probes((64, 64)), [[first, long]], max_turn_tokens=limit)
    assert (episode.stop, episode.turns, episode.over_turn, episode.answer) == ("void", 2, False, None)
    assert messages(ragged, episode) == [first, ragged.decode(ragged.encode(long)[:limit])]
    assert episode.assistant_mask[-limit:].all() and not episode.assistant_mask[-limit - 1]
    assert episode.token_ids[-1] != ragged.im_end
    assert disagreement(ragged, [episode]) <= 1e-4


@pytest.mark.survives("model output", "a message cut by the token limit", "void, also with a good action in it")
def test_a_good_action_in_a_cut_message_does_not_count(ragged, say):
    text = answer("4")
    n = len(ragged.encode(text))
    cut, whole = (say(ragged, noise_probes((64, 64)), [[text]], max_turn_tokens=limit)[0] for limit in (n, n + 1))
    assert (cut.stop, cut.answer, cut.reward) == ("void", None, 0.0)
    assert (whole.stop, whole.answer, whole.reward) == ("answer", "4", 1.0)


def test_a_prompt_beyond_the_context_is_refused(policy):
    probe = noise_probes((64, 64))[0]
    length = int(np.argmax(replay(policy, probe, ["no"]).assistant_mask))
    assert len(rollout(policy, [probe], max_context=length, max_turn_tokens=2)) == 1
    with pytest.raises(ValueError, match=f"a prompt of {length} tokens exceeds max_context={length - 1}"):
        rollout(policy, [probe], max_context=length - 1)


@pytest.mark.parametrize("max_turns", [1, 3])
def test_a_forced_answer_is_begun_for_the_policy(ragged, say, max_turns):
    looks = SEARCHES[0][:max_turns - 1]
    episode, = say(ragged, noise_probes((288, 288)), [[*looks, "4</answer>"]], max_turns=max_turns,
                   force_answer="<answer>")
    assert (episode.stop, episode.answer, episode.turns) == ("answer", "4", max_turns)
    assert ragged.decode(episode.token_ids).endswith("<|im_start|>assistant\n<answer>4</answer><|im_end|>")
    assert ragged.decode(episode.token_ids[episode.assistant_mask]).endswith("4</answer><|im_end|>")
    assert "<answer>" not in ragged.decode(episode.token_ids[episode.assistant_mask])
    assert disagreement(ragged, [episode]) <= 1e-4


# ---------------------------------------------------------------------------------------------- sampling


@pytest.mark.survives("model output", "a policy that would sample control tokens", "they have no probability")
def test_control_tokens_are_never_sampled_even_by_a_policy_that_wants_them(qwen25_dir, ragged, monkeypatch):
    policy = with_protocol(load_policy(qwen25_dir, device="cpu"), ragged.protocol)
    wanted = [i for i in policy.tokenizer.all_special_ids if i != policy.im_end] + [len(policy.tokenizer) + 3]
    head = torch.nn.Linear(64, policy.base.lm_head.out_features)
    head.weight = policy.base.lm_head.weight
    head.bias.data.zero_()[wanted] = 100.0
    monkeypatch.setattr(policy.base, "lm_head", head)
    for temperature in (0, 1.0, 5.0):
        episodes = rollout(policy, noise_probes((64, 64)), group_size=4, max_turn_tokens=20, temperature=temperature)
        for episode in episodes:
            assert not set(episode.token_ids[episode.assistant_mask].tolist()) & set(wanted)
            assert np.isfinite(episode.logprobs).all()


def test_the_extremes_of_chance_never_pick_a_banned_token():
    logprobs = torch.tensor([[-torch.inf, 0.25, -torch.inf, 0.5, 0.25, -torch.inf]]).clamp(min=-torch.inf)
    logprobs[0, [1, 3, 4]] = torch.tensor([0.25, 0.5, 0.25]).log()
    for chance, token in [(0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.7501, 4), (np.nextafter(1.0, 0.0), 4)]:
        assert rollout_module._sample(logprobs, [chance], 1.0) == ([token], [logprobs[0, token].item()])


def test_sampling_follows_the_distribution():
    torch.manual_seed(0)
    logprobs = (2 * torch.randn(1, 20)).log_softmax(-1)
    chances = ((np.arange(10_000) + 0.5) / 10_000).tolist()
    tokens, said = rollout_module._sample(logprobs.expand(10_000, -1), chances, 1.0)
    counts = torch.bincount(torch.tensor(tokens), minlength=20) / 10_000
    torch.testing.assert_close(counts, logprobs[0].exp(), atol=1.1e-4, rtol=0)
    assert said == logprobs[0, tokens].tolist()
    assert rollout_module._sample(logprobs, [0.99], 0)[0] == [int(logprobs.argmax())]


# ---------------------------------------------------------------------------------------------- as on a GPU


def same(episodes, others):
    for one, two in zip(episodes, others, strict=True):
        assert one.token_ids.tolist() == two.token_ids.tolist() and (one.stop, one.crops) == (two.stop, two.crops)
        np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-5)


@pytest.mark.parametrize("slots", [2, 64])
def test_replies_made_in_threads_change_nothing(talkative, slots, monkeypatch):
    expected = free_episodes(talkative)
    monkeypatch.setattr(rollout_module, "nullcontext", rollout_module.ThreadPoolExecutor)
    end_turn, where = Transcript.end_turn, set()
    monkeypatch.setattr(Transcript, "end_turn", lambda *args: where.add(threading.get_ident()) or end_turn(*args))
    same(free_episodes(talkative, slots=slots), expected)
    assert threading.get_ident() not in where and where


def test_an_error_in_a_reply_made_in_a_thread_is_raised(talkative, monkeypatch):
    monkeypatch.setattr(rollout_module, "nullcontext", rollout_module.ThreadPoolExecutor)
    monkeypatch.setattr(Transcript, "end_turn", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        free_episodes(talkative)


class FakeGraph:
    """A CUDA graph without CUDA: what is inside the `with` runs once, and replay runs it again."""
    made: list = []

    def __init__(self):
        self.made.append(self)
        self.replays = 0

    def replay(self):
        self.replays += 1

    def pool(self):
        return "a pool"


@pytest.fixture
def recording(monkeypatch):
    """Rollouts on the CPU take the way of a GPU; a replay is a step in place of it."""
    FakeGraph.made = []
    for name, value in {"current_stream": lambda: None, "stream": lambda _: nullcontext(), "CUDAGraph": FakeGraph,
                        "graph": lambda *_, **__: nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Decoder, "failed", False)

    class Recording(Decoder):
        def __init__(self, *args):
            super().__init__(*args)
            self.records = not self.failed

        def record(self, visible):
            super().record(visible)
            return lambda: self.step(visible)                                         # the fake records nothing

    monkeypatch.setattr(rollout_module, "Decoder", Recording)


@pytest.mark.parametrize("slots", [2, 64])
def test_a_recorded_step_in_buckets_gives_what_the_plain_one_gives(talkative, slots, recording, monkeypatch):
    monkeypatch.setattr(rollout_module, "BUCKET", 64)                                 # several of them
    recorded = free_episodes(talkative, slots=slots)
    assert len(FakeGraph.made) > 2
    monkeypatch.setattr(rollout_module, "Decoder", Decoder)
    same(recorded, free_episodes(talkative))


@pytest.mark.parametrize("fault", ["capture", "values"])
def test_a_recording_that_fails_or_lies_is_not_used(talkative, fault, recording, monkeypatch):
    if fault == "capture":
        def broken(*_, **__):
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        monkeypatch.setattr(torch.cuda, "graph", broken)
    else:
        step, runs = Decoder.step, iter(range(10**6))
        monkeypatch.setattr(Decoder, "step", lambda self, visible: step(self, visible) + (next(runs) == 3))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with pytest.warns(UserWarning, match="without a CUDA graph.*(not permitted$|something else)"):
        found = free_episodes(talkative)
        free_episodes(talkative)
    assert len(FakeGraph.made) == 1                                                   # it is not tried again, ever
    monkeypatch.setattr(rollout_module, "Decoder", Decoder)
    same(found, free_episodes(talkative))


# ---------------------------------------------------------------------------------------------- the cache


def write(cache, rows, starts, length):
    """One forward's worth of random keys and values through both layers: (mask, what the layers return)."""
    mask = cache.address(torch.tensor(rows), starts, length)
    new = [torch.randn(2, len(rows), 2, length, 4) for _ in cache.layers]
    return mask, new, [layer.update(*pair) for layer, pair in zip(cache.layers, new)]


def test_a_row_is_written_where_it_stopped_and_sees_its_own_past():
    cache = SlotCache(2, 3)
    _, first, _ = write(cache, [0, 1, 2], [0, 0, 0], 5)
    mask, second, got = write(cache, [0, 2], [5, 2], 3)
    assert mask.shape == (2, 1, 3, 8) and cache.get_seq_length() == 8
    assert mask[:, 0].sum(-1).tolist() == [[6, 7, 8], [3, 4, 5]]                  # itself and all before, no more
    for layer in (0, 1):
        for i, past in enumerate((first[layer][:, 0], torch.cat([first[layer][:, 2, :, :2]], 2))):
            expected = torch.cat([past, second[layer][:, i]], 2)
            n = expected.shape[2]
            assert torch.equal(got[layer][0][i, :, :n], expected[0]) and torch.equal(got[layer][1][i, :, :n], expected[1])
        assert torch.equal(cache.layers[layer].keys[1, :, :5], first[layer][0, 1])  # the row in between is untouched


def test_growing_keeps_what_the_cache_holds():
    cache = SlotCache(2, 2)
    _, first, _ = write(cache, [0, 1], [0, 0], 250)
    capacity = cache.capacity
    _, second, got = write(cache, [0, 1], [250, 240], 300)
    assert cache.capacity > capacity and cache.capacity >= 550
    for layer in (0, 1):
        for kind in (0, 1):
            assert torch.equal(got[layer][kind][0, :, :250], first[layer][kind, 0])
            assert torch.equal(got[layer][kind][0, :, 250:550], second[layer][kind, 0])
            assert torch.equal(got[layer][kind][1, :, :240], first[layer][kind, 1, :, :240])
            assert torch.equal(got[layer][kind][1, :, 240:540], second[layer][kind, 1])


def test_keep_renumbers_the_slots_in_order():
    cache = SlotCache(2, 4)
    _, first, _ = write(cache, [0, 1, 2, 3], [0] * 4, 6)
    cache.keep(torch.tensor([1, 3]))
    assert cache.slots == 2
    _, second, got = write(cache, [0, 1], [6, 6], 1)
    for layer in (0, 1):
        for new, old in enumerate((1, 3)):
            assert torch.equal(got[layer][0][new, :, :6], first[layer][0, old])
            assert torch.equal(got[layer][0][new, :, 6:], second[layer][0, new])


# ---------------------------------------------------------------------------------------------- the picture


def drawn(image, *crops):
    empty = np.zeros(1)
    return Episode(data.Probe(image, "Where?", "here"), empty, empty, empty, list(crops), len(crops), "over_turn", None, 0.0)


def test_crops_of_crops_are_composed():
    episode = drawn(Image.new("RGB", (400, 200)), Crop((0.5, 0.25, 1.0, 0.75), 0), Crop((0.5, 0.5, 1.0, 1.0), 1),
                    Crop((0.0, 0.0, 0.2, 1.0), 0), Crop((0.0, 0.5, 0.5, 1.0), 2))
    expected = [(0.5, 0.25, 1.0, 0.75), (0.75, 0.5, 1.0, 0.75), (0.0, 0.0, 0.2, 1.0), (0.75, 0.625, 0.875, 0.75)]
    np.testing.assert_allclose(boxes_in_original(episode), expected, atol=1e-12)
    assert boxes_in_original(drawn(Image.new("RGB", (4, 4)))) == []


def test_the_picture_shows_where_it_looked():
    episode = drawn(Image.new("RGB", (400, 200)), Crop((0.5, 0.25, 1.0, 0.75), 0), Crop((0.5, 0.5, 1.0, 1.0), 1))
    picture = draw_search(episode, side=800)
    assert picture.size == (800, 400)
    first, last = (255, 110, 0), (255, 0, 0)
    assert [picture.getpixel(at) for at in ((400, 290), (500, 100), (500, 299))] == [first] * 3       # left, top, bottom
    assert [picture.getpixel(at) for at in ((600, 290), (700, 200), (799, 250), (700, 299))] == [last] * 4
    assert [picture.getpixel(at) for at in ((395, 250), (500, 95), (500, 310), (550, 250), (750, 270))] == [(0, 0, 0)] * 5
    assert episode.probe.open().getextrema() == ((0, 0),) * 3                      # the photograph itself is not drawn on


@pytest.mark.parametrize("size", [(4000, 3000), (3000, 1), (1, 3000), (2, 2)])
def test_a_look_that_is_smaller_than_a_pixel_of_the_picture_is_drawn(size):
    picture = draw_search(drawn(Image.new("RGB", size), Crop((0.5, 0.5, 0.5005, 0.5005), 0), Crop((0.9, 0.9, 1.0, 1.0), 1)))
    assert max(picture.size) == 900 and picture.getbbox()


def test_describe_tells_the_story(ragged, say):
    episode, = say(ragged, noise_probes((64, 64)), [[look((0.0, 0.0, 0.5, 0.5)), answer("7")]])
    story = describe(ragged, episode)
    for part in ("What number is on sign A?", f"1. {look((0.0, 0.0, 0.5, 0.5))}", f"2. {answer('7')}", "stop: answer",
                 "answer: 7", "reward 0"):
        assert part in story


# ---------------------------------------------------------------------------------------------- the command


def test_a_policy_speaks_as_a_callable_what_it_would_say_in_a_rollout(ragged):
    """Greedy: the conversations that data.play builds from its texts are those of a rollout, token for token."""
    probes = noise_probes((60, 80), (90, 40), (64, 64))
    greedy = dict(temperature=0, max_turn_tokens=12)
    p = ragged.protocol
    played = data.collect(probes, rollout_module.speaker(ragged, **greedy), max_turns=2, min_pixels=p.min_pixels,
                          max_pixels=p.max_pixels, system_prompt=p.system_prompt, error_prompt=p.error_prompt)
    rolled = rollout(ragged, probes, max_turns=2, **greedy)
    for one, other in zip(played, rolled):
        assert one.stop == other.stop and (one.texts == messages(ragged, other) or (one.texts, one.stop) == ([""], "void"))


def test_a_spoken_message_is_sampled_after_the_whole_conversation_and_a_long_one_is_none(ragged, monkeypatch):
    """What a policy has read when it ends a search as a callable is, token for token, the replay of that search."""
    texts, p = [format_action(Crop((0.0, 0.0, 0.5, 0.5), 0)), "<answer>4</answer>"], ragged.protocol
    ids = [token for text in texts for token in [*ragged.encode(text), ragged.im_end]]
    monkeypatch.setattr(rollout_module, "_sample", lambda logprobs, *_: ([ids.pop(0)], [0.0]))
    original, seen = rollout_module.rollout, []
    monkeypatch.setattr(rollout_module, "rollout", lambda *args, **more: seen.append(original(*args, **more)) or seen[-1])
    probe, = noise_probes((60, 80))
    speak = rollout_module.speaker(ragged)
    played, = data.collect([probe], speak, max_turns=3, min_pixels=p.min_pixels, max_pixels=p.max_pixels,
                           system_prompt=p.system_prompt)
    assert (played.texts, played.reward, len(played.crops)) == (texts, 1.0, 1)
    last, = seen[-1]
    assert last.token_ids.tolist() == replay(ragged, probe, texts).token_ids.tolist()

    talk = CropEnv(probe.open(), "?").reset()
    length = len(ragged.render(talk)[0])
    ids += [*ragged.encode("<answer>4</answer>"), ragged.im_end]
    assert rollout_module.speaker(ragged, max_context=length - 1)([talk]) == [None]
    assert rollout_module.speaker(ragged, max_context=length)([talk]) == ["<answer>4</answer>"] and not ids


@pytest.fixture(scope="module")
def saved(policy, tmp_path_factory):
    """A photograph, and the directory of a policy."""
    folder = tmp_path_factory.mktemp("saved")
    policy.save(folder / "policy")
    noise(200, 120).save(folder / "photo.png")
    return folder


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["rollout.py", *map(str, words)])
    data.command(main, Config)


def test_the_command_searches_a_photo_and_draws_where(saved, tmp_path, monkeypatch, capsys, say, policy):
    out = tmp_path / "new" / "looks.png"
    words = ["--image", saved / "photo.png", "--question", "What color is the star?", "--init", saved / "policy",
             "--max_turn_tokens", 20, "--out", out, "--device", "cpu"]
    run(monkeypatch, *words)                                                       # whatever a random policy says
    assert "stop: void" in capsys.readouterr().out and Image.open(out).size == (900, 540)
    script = [look((0.5, 0.5, 1.0, 1.0)), answer("red")]
    monkeypatch.setattr(rollout_module, "rollout", lambda policy, probes, **options: say(policy, probes, [script], **options))
    run(monkeypatch, *words)
    said = capsys.readouterr().out
    assert f" 1. {script[0]}\n 2. {script[1]}\nstop: answer   answer: red\n" in said and str(out) in said
    assert Image.open(out).getpixel((600, 271)) == (255, 0, 0)


@pytest.mark.parametrize("wrong", ["--image", "--init"])
def test_a_mistake_on_the_command_line_is_one_line(saved, tmp_path, monkeypatch, capsys, wrong):
    words = {"--image": saved / "photo.png", "--question": "?", "--init": saved / "policy", "--out": tmp_path / "x.png"}
    words[wrong] = tmp_path / "nowhere"
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *(word for pair in words.items() for word in pair))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "nowhere" in error and error.startswith("error: ")
    assert not (tmp_path / "x.png").exists()
