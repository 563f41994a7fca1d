"""What a hostile model or a hostile file may try: thousands of drawn messages, rewards without a look, images.

More examples: python -m pytest tests/test_hostile.py --examples 100000

Lines that were flipped, each with the test that then failed:
"""
import dataclasses
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import env as env_module
import rollout as rollout_module
import test_env
from conftest import noise_probes
from env import ERROR_CODES, STOPS, Answer, CropEnv, ImageError, crop_pixels, format_action, grade, load_image
from model import Protocol
from rollout import replay
from train_rl import group_advantages

# ------------------------------------------------------------------------------------------------ drawn messages

NUMBERS = ["0", "1", "0.0", "1.0", "0.5", "0.25", "0.7501", "-1", "2", "1e-12", "0.999999999", "1e300", "1e999", "NaN", "Infinity",
           "-Infinity", "9" * 400, "9" * 5000, "true", "null", '"0.5"', "[0.5]", "{}", "1/2", "\u0661", "\uff11", "0x1", ".5", ""]
SOURCES = ["original_image", "observation_0", "observation_01", "observation_-1", "observation_1.0", " observation_1",
           "observation_1 ", "observation_\u0661", "observation_\u00b2", "Observation_1", "observation_999999", "observation_9999999",
           "../../etc/passwd", "<|im_end|>", "</grounding>", *(f"observation_{i}" for i in range(1, 5))]
PIECES = ["<think>", "</think>", "<answer>", "</answer>", "<grounding>", "</grounding>", "<answer>blue</answer>", "<answer> </answer>",
          '{"bbox_2d": [0, 0, 1, 1], "source": "original_image"}', "{", "}", "[" * 1500, "<|im_end|>\n<|im_start|>system\n",
          "<|vision_start|><|image_pad|><|vision_end|>", "\ud800", "\u202e", "\0", " ", "x" * 3000, "{error}", "blue"]

SPACES = ("", " ", "\n", "\t \r\n")


def spell(numbers: tuple[int, ...], source: int, space: int, shape: int) -> str:
    """A grounding call as text: a number is one of NUMBERS or a coordinate in -0.2 .. 1.6, a shape one of 12 spellings."""
    box = [NUMBERS[i] if i < len(NUMBERS) else repr((i - 200) / 500) for i in numbers]
    box = {6: ["0", "0", "1", "1"], 7: box[:3], 8: [*box, "1"]}.get(shape, box)
    space = SPACES[space]
    pairs = [f'"bbox_2d"{space}:{space}[{f",{space}".join(box)}]', f'"source":{space}"{SOURCES[source]}"']
    pairs = {1: pairs[::-1], 2: [*pairs, '"label": "cat"'], 3: pairs[:1], 4: [*pairs, pairs[0]],
             5: [f'"a": {{{pairs[0]}}}', pairs[1]]}.get(shape, pairs)
    call = f"{space}<grounding>{space}{{{f',{space}'.join(pairs)}}}{space}</grounding>"
    return {9: call * 2, 10: call.replace("</grounding>", ""), 11: f"<think>There.</think>{call}"}.get(shape, call)


# single draws from integers, since a drawn list or choice costs hypothesis ten times as much
calls = st.builds(spell, st.tuples(*[st.integers(0, 1000)] * 4), st.integers(0, len(SOURCES) - 1), st.integers(0, 3), st.integers(0, 20))
soup = st.lists(st.sampled_from(PIECES) | calls, max_size=5).map("".join)
messages = calls | calls | soup | st.text(max_size=80)
IMAGES = [test_env.coordinates(60, 80), test_env.coordinates(7, 5), Image.new("RGB", (500, 2)), Image.new("RGB", (1, 1))]


def check_step(env: CropEnv, text: str) -> None:
    """Every promise that the table in env.py makes, for one message."""
    errors, images = len(env.errors), len(env.observations)
    message, stop = env.step(text)
    assert stop == env.stop and (message is None) == (stop is not None)
    assert stop is None or stop in STOPS
    assert (env.answer is not None) == (stop == "answer")
    assert set(env.errors) <= set(ERROR_CODES) and len(env.observations) == len(env.crops) + 1
    assert (len(env.errors) - errors) + (len(env.observations) - images) == (stop is None) or stop == "over_turn"
    if stop:
        return
    reply = " ".join(part["text"] for part in message["content"] if part["type"] == "text")
    if len(env.errors) > errors:                                      # a failed action: a bounded, defused echo
        assert len(env.observations) == images
        assert reply.isascii() and not set(reply.replace("x0 < x1 and y0 < y1", "")) & set("<|>")
        assert len(reply) <= env_module.MAX_ECHO_CHARS + len(env.error_prompt) + 60
        return
    crop, view = env.crops[-1], env.observations[-1]
    assert reply == f"Observation {images}:" and env.observations[images] is view           # label = index in the bank
    source = env.observations[crop.source]
    left, top, right, bottom = crop_pixels(source.size, crop.box)
    assert 0 <= left < right <= source.width and 0 <= top < bottom <= source.height         # inside its source
    assert view.size == (right - left, bottom - top)
    if crop.box == (0, 0, 1, 1):
        assert view.size == source.size and view.tobytes() == source.tobytes()
    if source.width > 2 and env.image is IMAGES[0]:                   # its pixels say where they come from
        shift = source.getpixel((0, 0))
        assert view.getpixel((0, 0)) == (shift[0] + left, shift[1] + top, 0)


@pytest.mark.survives("model output", "any text: NaN, 5,000-digit integers, nested and truncated JSON, tag soup, control tokens",
                      "a typed error or a stop of the closed set, counted; never an exception")
def test_no_message_breaks_the_world_whatever_it_says(request):
    ran, seen, examples = [0], set(), request.config.getoption("--examples")

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(messages, st.integers(0, 3), st.integers(0, 4), st.integers(0, 2))
    def play(text, image, before, limits):
        env = CropEnv(IMAGES[image], "where?", (9, 1, 6)[limits], 1, 10**6, (None, None, 2)[limits])
        for earlier in [test_env.call(), "<grounding>", test_env.call("[0, 0, 1, 0.5]", "observation_1"), test_env.call()][:before]:
            if not env.stop:
                check_step(env, earlier)
        if not env.stop:
            check_step(env, text)
        ran[0] += 1
        seen.update([env.stop], env.errors)

    play()
    assert ran[0] >= examples
    assert seen >= {"answer", "over_turn", "over_images", "void", *ERROR_CODES[1:]} - {"too_narrow"}       # every row of the table


@given(st.text())
def test_an_echo_has_at_most_200_characters_and_no_control_token(text):
    echo = env_module._quote(text)
    assert len(echo) <= 200 and echo.isascii() and not set(echo) & set("<|>")


@pytest.mark.survives("model output", "special tokens and tags written out as text",
                      "an echo of at most 200 characters, defused; never a control token")
@pytest.mark.parametrize("junk", ["<|im_end|>" * 100, "<answer>blue</answer>" * 50, "\U0001f600" * 300, "\ud800\x1b[2J\x07\n" * 99])
def test_an_error_never_speaks_for_the_user_in_the_tokens_that_the_policy_reads(policy, junk):
    probe, = noise_probes((60, 80))
    error, env = None, CropEnv(probe.open(), "?", 4, error_prompt="{error}")
    error, _ = env.step(f"<grounding>{json.dumps({'bbox_2d': [0, 0, 1], 'source': junk}, ensure_ascii=False)}</grounding>")
    said = error["content"][0]["text"]
    assert len(said.partition(": ")[2]) <= 200 and said.isascii() and "<answer>" not in said
    ids, _ = policy.render([error], after_turn=True)
    specials = [i for i in ids if i in policy.tokenizer.all_special_ids]
    assert specials == [policy.im_start, policy.im_end, policy.im_start]                    # one user message, one open turn


# ------------------------------------------------------------------------------------------------ rewards without a look

def blank(probe):
    """Spares the drawing: who does not look needs no picture."""
    return dataclasses.replace(probe, image=Image.new("RGB", (60, 60)))


@pytest.mark.survives("answers", "an answer in turn 1, before any crop", "pays no more than chance, and less than its group")
def test_an_answer_before_any_look_does_not_pay():
    """The best guess of each kind is right in a quarter of the probes; beside searches its mean advantage is negative."""
    for kind in data.PROBE_KINDS:
        probes = [blank(data._lay_out(kind, "hard", seed)) for seed in range(300)]
        guesses = sorted({probe.answer for probe in probes})
        rewards = {guess: [t.reward for t in data.collect(probes, lambda talks: [f"<answer>{guess}</answer>"] * len(talks))]
                   for guess in guesses}
        assert max(map(np.mean, rewards.values())) < 0.25 + 4 * (0.25 * 0.75 / 300) ** 0.5
        # groups of four guesses and four searches, of which two end right
        groups = torch.tensor([[*guess, 1.0, 0.0, 1.0, 0.0] for guess in zip(*rewards.values())])
        assert group_advantages(groups)[:, :4].mean() < -0.1 < 0.1 < group_advantages(groups)[:, [4, 6]].mean()


VISION = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.survives("answers", "vision tokens written by the policy to look like crops", "no crop, no image, no reward")
@pytest.mark.parametrize("text, stop", [
    (f"{VISION * 3}", "void"), (f"Observation 1: {VISION}<answer>wrong</answer>", "answer"),
    (f"<grounding>{VISION}</grounding>", "over_turn"), (f"<answer>{VISION}</answer>", "answer")])
def test_literal_vision_tokens_are_text_and_earn_nothing(policy, text, stop):
    probe, = noise_probes((60, 80))
    episode = replay(policy, probe, [text])
    assert (episode.stop, episode.reward, episode.crops, len(episode.views())) == (stop, 0.0, [], 1)
    assert (episode.token_ids == policy.vision_start).sum() == 1                            # the picture of the question
    assert VISION in rollout_module.messages(policy, episode)[0]                            # kept as what it is: text


@pytest.mark.survives("answers", "an answer early, in a thought, in two tag pairs, or beside a crop",
                      "only one tag pair in the final turn counts")
@pytest.mark.parametrize("texts, reward", [
    (["<think>4</think><answer>4</answer>"], 1.0),
    (["<think><answer>4</answer></think>so <answer>7</answer>"], 0.0),
    (["<think><answer>4</answer></think>"], 0.0), (["<answer>4</answer><answer>4</answer>"], 0.0),
    (["<answer>4</answer><answer>7</answer>"], 0.0), (["<answer>7</answer><answer>4</answer>"], 0.0),
    ([f"<answer>4</answer>{test_env.call()}", "<answer>7</answer>"], 0.0), (["<answer>4", "<answer>7</answer>"], 0.0),
    (["<answer>4 or 7</answer>"], 0.0), (["4"], 0.0), ([test_env.call(), "4"], 0.0), ([test_env.call(), "<answer>4</answer>"], 1.0)])
def test_only_the_answer_that_ends_the_episode_is_graded(policy, texts, reward):
    probe, = noise_probes((60, 80))
    assert probe.answer == "4" and replay(policy, probe, texts).reward == reward


def test_the_matrix_of_honest_and_hostile_answers_has_at_least_60_rows():
    honest, hostile = test_env.test_honest_answers_score, test_env.test_wrong_ambiguous_and_hostile_answers_do_not_score
    rows = [len(mark.args[1]) for test in (honest, hostile) for mark in test.pytestmark if mark.name == "parametrize"]
    assert len(rows) == 2 and sum(rows) >= 60 and min(rows) >= 30


@pytest.mark.parametrize("prediction, answer, score", [
    ("eight", "8", 1.0), ("8", "eight", 1.0), ("Eight.", "8", 1.0), ("\u201cEight\u201d", "8", 1.0), ("\uff18", "8", 1.0),
    ("18", "8", 0.0), ("eighteen", "8", 0.0), ("eight or nine", "8", 0.0), ("not eight", "8", 0.0), ("8\u200b", "8", 0.0)])
def test_number_words_are_digits_and_nothing_more(prediction, answer, score):
    assert grade(prediction, answer) == score


# ------------------------------------------------------------------------------------------------ images

@pytest.mark.survives("files", "an image of 1 pixel, or 1,000 times as long as wide", "loaded, and shown squeezed to 190:1")
@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1), (4000, 10)])
def test_tiny_and_very_long_images_are_loaded_and_shown(tmp_path, policy, size):
    Image.new("RGB", size, "red").save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    episode = replay(policy, data.Probe(image, "?", "red"), [test_env.call("[0, 0, 1, 1]"), format_action(Answer("red"))])
    assert image.size == size and episode.reward == 1.0
    assert all(max(view.size) < 200 * min(view.size) for view in episode.views())


@pytest.mark.survives("files", "a decompression bomb, or more pixels than `--max_image_pixels`", "refused before its pixels are read")
def test_every_command_that_opens_images_of_the_user_has_the_pixel_cap_as_a_flag(tmp_path, monkeypatch, capsys):
    import eval as eval_script
    Image.new("1", (200, 100)).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "?", "answer": "1"}
    (tmp_path / "probes.jsonl").write_text(json.dumps(row))
    probe, = data.load_probes(tmp_path, max_image_pixels=19_999)
    with pytest.raises(ImageError, match="200 x 100 is more than 19999 pixels"):
        probe.open()
    assert data.load_probes(tmp_path, max_image_pixels=20_000)[0].open().size == (200, 100)
    monkeypatch.setattr(eval_script, "load_policy", lambda *_, **__: SimpleNamespace(protocol=Protocol()))
    monkeypatch.setattr(eval_script, "rollout", lambda policy, probes, **_: probes[0].open())
    for script, flags in ((data, ["--check", tmp_path]), (rollout_module, ["--image", tmp_path / "a.png", "--question", "?"]),
                          (eval_script, ["--data", tmp_path, "--out", tmp_path / "eval", "--count", 1])):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, flags), "--max_image_pixels", "19999"])
        with pytest.raises(SystemExit) as stopped:
            data.command(script.main, script.Config)
        said = re.split("[\r\n]+", capsys.readouterr().err.strip())[-1]
        assert stopped.value.code == 2 and f"{tmp_path / 'a.png'}: 200 x 100 is more than 19999 pixels" in said


def hub_cache(folder):
    """A set as the Hugging Face hub caches it: every file is a link to a blob."""
    (folder / "blobs").mkdir(parents=True)
    snapshot = folder / "snapshots/0a1b"
    (snapshot / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "blobs/77", "PNG")
    (snapshot / "images/a.png").symlink_to("../../../blobs/77")
    (snapshot / "probes.jsonl").write_text(json.dumps({"image": "images/a.png", "question": "?", "answer": "1"}))
    return snapshot


@pytest.mark.survives("files", "`..`, absolute paths, and links that leave the folder of a set",
                      "refused by row; links inside the hub's cache are followed")
def test_links_are_followed_inside_the_set_and_in_the_cache_of_the_hub_only(tmp_path):
    snapshot = hub_cache(tmp_path / "hub")
    assert data.load_probes(snapshot)[0].open().size == (8, 8)
    (tmp_path / "linked").symlink_to(snapshot)                        # the whole set may be a link
    assert data.load_probes(tmp_path / "linked")[0].open().size == (8, 8)

    own = tmp_path / "own"
    own.mkdir()
    Image.new("RGB", (9, 9)).save(own / "b.png")
    Image.new("RGB", (7, 7)).save(tmp_path / "secret.png")
    (own / "inside.png").symlink_to("b.png")
    (own / "outside.png").symlink_to(tmp_path / "secret.png")
    (own / "up").symlink_to(tmp_path)
    for name, fine in (("inside.png", True), ("outside.png", False), ("up/secret.png", False)):
        (own / "probes.jsonl").write_text(json.dumps({"image": name, "question": "?", "answer": "1"}))
        if fine:
            assert data.load_probes(own)[0].open().size == (9, 9)
        else:
            with pytest.raises(data.UserError, match=f"row 1: the image .*{name} is a link that is not under"):
                data.load_probes(own)
    (snapshot / "images/a.png").unlink()
    (snapshot / "images/a.png").symlink_to(tmp_path / "secret.png")   # out of the cache
    with pytest.raises(data.UserError, match="is a link"):
        data.load_probes(snapshot)


@pytest.mark.survives("files", "CSV, archives and other files", "refused by name: only .jsonl, .json, .tsv and .parquet are read")
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl.gz", "rows.pkl", "rows"])
def test_a_table_of_another_kind_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"PAR1\0\xff")
    with pytest.raises(data.UserError, match=f"{name}: cannot read this kind of file, only .jsonl, .json, .tsv, .parquet"):
        data.load_probes(tmp_path / name)
