"""Tests of model.py and of make_optimizer: tokens, positions, attention, files, log-probs. No network, no GPU.

A saved directory is opened with Qwen2VLImageProcessorPil: AutoProcessor needs torchvision, which we do not.
"""

import copy
import math
import random
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import common

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import model as model_module
from conftest import RAGGED, noise, noise_probes, run_main, same_weights, with_protocol
from env import Crop, fit_pixels, format_action
from model import (
    SPECIAL_TOKENS,
    Policy,
    Protocol,
    load_policy,
    load_weights,
    micro_batches,
    mrope_positions,
    token_logprobs,
    vocabulary_logprobs,
)
from rollout import replay
from train_sft import Config

TOKENIZER = model_module.tiny_tokenizer()
IMAGE_PAD = TOKENIZER.convert_tokens_to_ids(model_module.IMAGE_PAD)
PHRASES = [token for token in TOKENIZER.get_added_vocab() if token not in SPECIAL_TOKENS]
# Whole texts, and texts in which phrases and control tokens meet anything.
TEXTS = st.lists(st.one_of(st.text(max_size=20), st.sampled_from(SPECIAL_TOKENS + PHRASES))).map("".join)


def look(box, source=0) -> str:
    return f"<think>next a1</think>{format_action(Crop(box, source))}"


SCRIPTS = [
    [
        look((0.0, 0.0, 0.5, 0.5)),
        look((0.1, 0.2, 0.9, 0.4), 1),
        look((0.3, 0.0, 0.5, 1.0)),
        "<answer>4</answer>",
    ],
    ["<think>read 7</think><answer>7</answer>"],
    [look((0.0, 0.0, 1.0, 0.2)), look((0.5, 0.0, 0.6, 1.0), 7), look((0.2, 0.1, 1.0, 0.9), 1), "<think>no"],
]
PROBES = noise_probes((288, 288), (200, 120), (90, 300))


def written_episodes(policy: Policy) -> list:
    """Three conversations: crops of several shapes, a crop of a crop, a failed call, no crop at all."""
    return [replay(policy, probe, texts) for probe, texts in zip(PROBES, SCRIPTS)]


def plain_logits(policy: Policy, model, episode) -> torch.Tensor:
    """(T, V): one row through plain transformers, which makes the positions itself."""
    ids = torch.from_numpy(episode.token_ids)[None]
    batch = policy.image_processor(images=episode.views(), return_tensors="pt")
    return model(input_ids=ids, mm_token_type_ids=(ids == policy.image_pad).int(), **batch).logits[0]


@torch.no_grad()
def plain_logprobs(policy: Policy, model, episode, temperature: float = 1.0) -> torch.Tensor:
    """(T,): the naive log-probs of an episode's sampled tokens, one token after the other."""
    logits = plain_logits(policy, model, episode)
    allowed = torch.zeros(logits.shape[1], dtype=torch.bool)
    allowed[: len(policy.tokenizer)] = True
    allowed[policy.tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)] = False
    allowed[policy.im_end] = True
    logits[:, ~allowed] = -math.inf
    out = torch.zeros(len(logits))
    for t in np.flatnonzero(episode.assistant_mask):
        out[t] = torch.log_softmax(logits[t - 1] / temperature, -1)[episode.token_ids[t]]
    return out


def assert_rows_equal(logprobs: torch.Tensor, rows: list[torch.Tensor], atol: float = 1e-5) -> None:
    """(B, T) holds these rows (t,), then zeros."""
    rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    torch.testing.assert_close(logprobs, rows.to(logprobs.dtype), atol=atol, rtol=0)


def train(policy: Policy, batch: list) -> dict[str, torch.Tensor]:
    """The gradients of the log-probs of a batch, by name."""
    policy.model.zero_grad()
    token_logprobs(policy, batch).sum().backward()
    return {name: w.grad.clone() for name, w in policy.model.named_parameters() if w.grad is not None}


@pytest.fixture(scope="module", params=["qwen25_dir", "qwen3_dir"])
def base_dir(request) -> str:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def real(base_dir) -> Policy:
    """A policy on a random checkpoint of each family."""
    return with_protocol(load_policy(base_dir, device="cpu"), RAGGED)


@pytest.fixture(scope="module")
def lora(base_dir) -> Policy:
    """The same with LoRA adapters, moved off zero."""
    policy = load_policy(base_dir, lora_rank=4, device="cpu")
    move_adapters(policy)
    return with_protocol(policy, RAGGED)


@torch.no_grad()
def move_adapters(policy: Policy) -> None:
    torch.manual_seed(5)
    for name, weight in policy.model.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.1)


# ---------------------------------------------------------------------------------------------- tokens


@given(TEXTS)
def test_any_text_decodes_back_and_never_holds_a_control_token(policy, text):
    ids = policy.encode(text)
    assert policy.decode(ids) == text
    assert not set(ids) & set(policy.tokenizer.all_special_ids)


def chat(role: str, *parts) -> dict:
    """A message: texts, and images where there are any."""
    kinds = ("text" if isinstance(part, str) else "image" for part in parts)
    return {"role": role, "content": [{"type": kind, kind: part} for kind, part in zip(kinds, parts)]}


@given(TEXTS, TEXTS)
def test_what_a_conversation_says_never_becomes_a_control_token(ragged, system, question):
    picture = noise(64, 48)  # 8 x 6 patches of 8 pixels, merged 2 x 2: 12 visual tokens
    ids, views = ragged.render([chat("system", system), chat("user", picture, question)])
    assert views == [picture]
    control = [ragged.decode([i]) for i in ids if i in ragged.tokenizer.all_special_ids]
    assert control == (
        ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", *["<|image_pad|>"] * 12]
        + ["<|vision_end|>", "<|im_end|>", "<|im_start|>"]
    )
    assert ragged.decode(ids).replace("<|image_pad|>" * 12, "<|12|>") == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n<|vision_start|><|12|><|vision_end|>"
        f"{question}<|im_end|>\n<|im_start|>assistant\n"
    ).replace("<|image_pad|>" * 12, "<|12|>")


def same_layout(policy: Policy) -> bool:
    """Does the checkpoint's chat template give the tokens of `render`, around images and turns?"""
    image, text = noise(64, 64), "a b."
    talk = [
        chat("system", text),
        chat("user", image, text),
        chat("assistant", text),
        chat("user", text, image),
    ]
    theirs = policy.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    tokens = policy.tokenizer(theirs, add_special_tokens=False)["input_ids"]
    ours = [i for i in policy.render(talk)[0] if i != policy.image_pad]
    return ours == [i for i in tokens if i != policy.image_pad] and tokens.count(policy.image_pad) == 2


# What the templates of the two families do beyond ours: Qwen2.5-VL's puts a system message before a talk without
# one, and counts images; Qwen3-VL's treats roles in branches of their own, and knows tools.
CONTENT = (
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' or 'image' in part %}{% set images.count = images.count + 1 %}"
    "{% if add_vision_id %}Picture {{ images.count }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
)
START = (
    "{% set images = namespace(count=0) %}{%- if tools %}{{ tools }}{%- endif %}{% for message in messages %}"
)
END = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
QWEN25_TEMPLATE = (
    START
    + "{% if loop.first and message.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n" + CONTENT + END
)
QWEN3_TEMPLATE = (
    START
    + "{%- if message.role in ('system', 'user') %}{{- '<|im_start|>' + message.role + '\n' }}"
    + CONTENT
    + "{% elif message.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}"
    + CONTENT
    + "{% endif %}"
    + END
)


def test_a_conversation_has_the_layout_of_the_chat_template(policy, real, base_dir, tmp_path):
    assert same_layout(policy) and same_layout(real)
    shutil.copytree(base_dir, tmp_path, dirs_exist_ok=True)
    for template in (QWEN25_TEMPLATE, QWEN3_TEMPLATE, QWEN3_TEMPLATE.replace("assistant\n", "assistant\n\n")):
        (tmp_path / "chat_template.jinja").write_text(template)
        opened = load_policy(str(tmp_path), device="cpu")
        assert opened.tokenizer.chat_template == template
        assert same_layout(opened) == ("assistant\n\n" not in template)


def test_a_conversation_that_grows_turn_by_turn_has_the_tokens_of_the_whole(ragged):
    talk = [chat("system", "Search."), chat("user", noise(96, 40), "What color?")]
    text, reply = look((0.0, 0.0, 0.5, 0.5)), chat("user", "Observation 1:", noise(40, 40))
    whole, views = ragged.render([*talk, chat("assistant", text), reply])
    assert views == [talk[1]["content"][0]["image"], reply["content"][1]["image"]]
    turn = [*ragged.render(talk)[0], *ragged.encode(text)]
    assert turn + ragged.render([reply], before=(ragged.im_end, "\n"))[0] == whole
    assert [*turn, ragged.im_end] + ragged.render([reply], before=("\n",))[0] == whole


def test_neighbouring_texts_are_encoded_as_one(policy):
    assert policy.render([chat("user", "see no", "thing", " ?")]) == policy.render(
        [chat("user", "see nothing ?")]
    )
    assert len(policy.encode("nothing")) == 1 and policy.encode("") == ()


def test_each_phrase_is_one_token_and_the_searcher_adds_only_letters_and_digits(policy):
    assert len(PHRASES) > 80 and all(len(policy.encode(phrase)) == 1 for phrase in PHRASES)
    single = {policy.encode(letter)[0] for letter in (*data.LETTERS, *data.DIGITS)}
    for kind in data.PROBE_KINDS:
        for scene in (data.make_scene(kind, "hard", seed) for seed in range(10)):
            for text in data.write_search(
                scene, random.Random(0), pattern="depth_first", impatience=0.1, slip=0.1
            ):
                assert {i for i in policy.encode(text) if i < 256} <= single, text


@given(st.integers(1, 400), st.integers(1, 400))
@settings(max_examples=25)
def test_the_counted_visual_tokens_are_those_that_the_processor_makes(ragged, width, height):
    view = fit_pixels(noise(width, height), 32 * 32, 96 * 96)
    pixels = ragged.process_views([view])
    assert ragged.count_visual_tokens(view) == pixels["image_grid_thw"].prod() // 4
    assert ragged.count_visual_tokens(view) == len(pixels["pixel_values"]) // 4


# ---------------------------------------------------------------------------------------------- positions

# Words before an image, its height and its width in visual tokens.
CONVERSATIONS = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5
)


def tokens_of(pieces) -> tuple[list[list[int]], list[tuple[int, int, int]]]:
    """Stretches of ids, one image in each, and the grids of patches."""
    stretches = [[5] * words + [IMAGE_PAD] * (h * w) for words, h, w in pieces]
    return stretches, [(1, 2 * h, 2 * w) for _, h, w in pieces]


def test_positions_by_hand():
    """Two words, an image of 1 x 3, a word: the image moves the count on by 3."""
    ids = np.array([5, 5, IMAGE_PAD, IMAGE_PAD, IMAGE_PAD, 5])
    positions, following = mrope_positions(ids, [(1, 2, 6)], IMAGE_PAD, 2, start=10)
    assert positions.tolist() == [
        [10, 11, 12, 12, 12, 15],
        [10, 11, 12, 12, 12, 15],
        [10, 11, 12, 13, 14, 15],
    ]
    assert following == 16


@given(CONVERSATIONS, st.integers(0, 4))
@settings(max_examples=150)
def test_positions_equal_those_of_transformers(policy, pieces, tail):
    stretches, grids = tokens_of(pieces)
    ids = np.array(sum(stretches, []) + [5] * tail)
    ours, following = mrope_positions(ids, grids, IMAGE_PAD, 2)
    row = torch.from_numpy(ids)[None]
    theirs, delta = policy.base.model.get_rope_index(
        row, mm_token_type_ids=(row == IMAGE_PAD).int(), image_grid_thw=torch.tensor(grids)
    )
    assert torch.equal(torch.from_numpy(ours), theirs[:, 0])
    assert following == len(ids) + int(delta)


@given(CONVERSATIONS, st.data())
def test_positions_go_on_from_any_cut_between_images(pieces, draw):
    stretches, grids = tokens_of(pieces)
    whole, following = mrope_positions(np.array(sum(stretches, [])), grids, IMAGE_PAD, 2)
    parts, start = [], 0
    for stretch, grid in zip(stretches, grids):
        cut = draw.draw(st.integers(0, stretch.index(IMAGE_PAD)))  # somewhere in the text before the image
        for ids, own in ((stretch[:cut], []), (stretch[cut:], [grid])):
            part, start = mrope_positions(np.array(ids, np.int64), own, IMAGE_PAD, 2, start)
            parts.append(part)
    assert np.array_equal(np.concatenate(parts, 1), whole) and start == following


# ---------------------------------------------------------------------------------------------- attention


def test_windows_in_one_call_equal_the_loop_of_transformers(base_dir):
    policy = load_policy(base_dir, device="cpu")
    sizes = [(300, 200), (90, 410), (64, 64), (170, 170), (57, 301)]
    views = [noise(*size, seed=i) for i, size in enumerate(sizes)]
    with torch.no_grad():
        ours = policy.encode_views(views)
        policy.base.set_attn_implementation({"vision_config": "sdpa"})
        theirs = policy.encode_views(views)
    for (grid, tokens), (expected_grid, expected) in zip(ours, theirs, strict=True):
        assert grid == expected_grid and tokens.std() > 0.01
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)


def test_views_together_are_seen_as_if_each_were_alone(real):
    sizes = [(96, 96), (96, 96), (64, 160), (160, 64), (96, 96)]
    views = [noise(*size, seed=i) for i, size in enumerate(sizes)]
    layers = {"qwen2_5_vl": 0, "qwen3_vl": 2}[real.base.config.model_type]  # deepstack
    with torch.no_grad():
        together, alone = real.encode_views(views), [real.encode_views([view])[0] for view in views]
    for (grid, tokens), (expected_grid, expected), view in zip(together, alone, views, strict=True):
        assert grid == expected_grid and math.prod(grid) == 4 * len(tokens)
        assert tokens.shape == (real.count_visual_tokens(view), (1 + layers) * 64)
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)
    assert real.encode_views([]) == [] and real.image_kwargs([]) == {}


def test_without_episodes_a_mask_of_padding_is_heeded(policy):
    """`generate` of transformers pads on the left."""
    ids, positions = torch.arange(5, 25)[None], torch.arange(20).expand(3, 1, 20)
    padded, there = F.pad(ids, (4, 0)), F.pad(torch.ones_like(ids), (4, 0))
    with torch.no_grad():
        plain = policy.base.model(input_ids=ids, position_ids=positions).last_hidden_state
        options = {"attention_mask": there, "position_ids": F.pad(positions, (4, 0))}
        masked = policy.base.model(input_ids=padded, **options).last_hidden_state
    torch.testing.assert_close(masked[:, 4:], plain, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------- log-probs


@pytest.mark.parametrize("name", ["ragged", "real"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_equal_a_forward_per_row_by_plain_transformers(name, temperature, request, tmp_path):
    policy = request.getfixturevalue(name)
    policy.save(tmp_path)
    plain = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    episodes = written_episodes(policy)
    episodes.insert(1, episodes[0])  # neighbours of equal length go into one call
    with torch.no_grad():
        packed = token_logprobs(policy, episodes, temperature)
    assert packed.dtype == torch.float32
    assert_rows_equal(packed, [plain_logprobs(policy, plain, e, temperature) for e in episodes], atol=1e-4)
    for row, episode in zip(packed, episodes):
        mask = F.pad(torch.from_numpy(episode.assistant_mask), (0, len(row) - len(episode.token_ids)))
        assert torch.equal(row != 0, mask)


def test_adapters_are_in_the_log_probs_as_plain_peft_has_them(lora, tmp_path):
    lora.save(tmp_path)
    plain = transformers.AutoModelForImageTextToText.from_pretrained(lora.name)
    episodes = written_episodes(lora)
    with torch.no_grad():
        ours = token_logprobs(lora, episodes)
        with lora.model.disable_adapter():
            below = token_logprobs(lora, episodes)
    assert_rows_equal(below, [plain_logprobs(lora, plain, episode) for episode in episodes], atol=1e-4)
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path)
    assert_rows_equal(ours, [plain_logprobs(lora, adapted, episode) for episode in episodes], atol=1e-4)
    assert (ours - below).abs().max() > 0.01


def test_every_weight_gets_the_gradient_of_the_naive_loop(ragged, monkeypatch):
    policy = copy.deepcopy(ragged)
    episodes = written_episodes(policy)
    ours = train(policy, episodes)
    policy.model.zero_grad()
    for episode in episodes:
        logits = plain_logits(policy, policy.model, episode) + policy.banned
        at = torch.from_numpy(np.flatnonzero(episode.assistant_mask))
        chosen = torch.from_numpy(episode.token_ids)[at]
        logits[at - 1].log_softmax(-1).gather(1, chosen[:, None]).sum().backward()
    for name, weight in policy.model.named_parameters():
        assert ours[name].any() or name.endswith("k_proj.bias"), name  # a shift of all keys changes nothing
        torch.testing.assert_close(ours[name], weight.grad, atol=1e-3, rtol=1e-3)
    monkeypatch.setattr(model_module, "LOGIT_ROWS", 7)
    for name, gradient in train(policy, episodes).items():
        torch.testing.assert_close(gradient, ours[name], atol=1e-4, rtol=1e-4)


def test_visual_features_that_are_given_stand_for_the_views(real):
    episodes = written_episodes(real)
    with torch.no_grad():
        seen = token_logprobs(real, episodes)
        for episode in episodes:
            episode.features, episode.kept_views = real.encode_views(episode.views()), []
        assert torch.equal(token_logprobs(real, episodes), seen)
        blind = replay(real, PROBES[1], SCRIPTS[1], data.WarmUpEnv)  # no picture at all
        plain = plain_logits(real, real.model, SimpleNamespace(token_ids=blind.token_ids, views=list))
    assert blind.views() == []


def test_banned_tokens_have_no_probability_and_the_others_all_of_it(policy, real):
    for tested in (policy, real):
        text = tested.base.config.text_config
        probabilities = vocabulary_logprobs(
            tested, torch.randn(4, 3, text.hidden_size), temperature=0.7
        ).exp()
        assert probabilities.dtype == torch.float32 and probabilities.shape == (4, 3, text.vocab_size)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(4, 3))
        banned = [i for i in tested.tokenizer.all_special_ids if i != tested.im_end]
        assert len(banned) == 7 and not probabilities[..., banned].any()
        assert not probabilities[..., len(tested.tokenizer) :].any()  # rows of the head that are no token
        assert probabilities[..., tested.im_end].all() and probabilities[..., :256].all()


def of_lengths(*lengths) -> list:
    return [SimpleNamespace(token_ids=np.zeros(n)) for n in lengths]


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_micro_batches_hold_every_episode_once_and_keep_the_budget(lengths, budget):
    episodes = of_lengths(*lengths)
    batches = micro_batches(episodes, budget)
    assert sorted(id(e) for batch in batches for e in batch) == sorted(map(id, episodes))
    for batch in batches:
        assert len(batch) == 1 or 0 < sum(len(e.token_ids) for e in batch) <= budget


def test_micro_batches_are_as_few_as_will_do_and_about_equal():
    episodes = of_lengths(30, 10, 10, 20, 10)
    assert [len(micro_batches(episodes, budget)) for budget in (80, 79, 39, 30, 10)] == [1, 2, 3, 3, 5]
    assert [[len(e.token_ids) for e in batch] for batch in micro_batches(episodes, 40)] == [
        [30, 10],
        [20, 10, 10],
    ]
    assert [len(e.token_ids) for (e,) in micro_batches(of_lengths(5, 99), 10)] == [99, 5]  # one always fits


# ---------------------------------------------------------------------------------------------- files


def test_the_tiny_policy_follows_the_seed_and_comes_back_the_same(ragged, tmp_path):
    torch.manual_seed(0)
    again = load_policy("tiny", device="cpu")
    assert same_weights(again.model.state_dict(), ragged.model.state_dict())
    assert not same_weights(load_policy("tiny", device="cpu").model.state_dict(), again.model.state_dict())
    assert 0.5e6 < sum(weight.numel() for weight in again.model.parameters()) < 2e6
    (tmp_path / ".partial").mkdir()  # a save that was killed
    for _ in range(2):
        ragged.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json"),
        *("protocol.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    opened = load_policy(str(tmp_path), device="cpu")
    assert same_weights(opened.model.state_dict(), ragged.model.state_dict())
    assert (opened.protocol, opened.name) == (RAGGED, str(tmp_path)) and torch.equal(
        opened.banned, ragged.banned
    )
    episodes, others = written_episodes(ragged), written_episodes(opened)
    assert [e.token_ids.tolist() for e in others] == [e.token_ids.tolist() for e in episodes]
    with torch.no_grad():
        assert torch.equal(token_logprobs(opened, others), token_logprobs(ragged, episodes))


def test_a_saved_directory_opens_with_plain_transformers(ragged, tmp_path):
    ragged.save(tmp_path)
    (episode, *_), views = written_episodes(ragged), [noise(90, 50)]
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)
    assert model.config.vision_config._attn_implementation == "sdpa"  # ours is not written down
    assert same_weights(model.state_dict(), ragged.model.state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(episode.token_ids) == ragged.decode(episode.token_ids)
    assert tokenizer.get_vocab() == ragged.tokenizer.get_vocab() and tokenizer.eos_token_id == ragged.im_end
    assert tokenizer.chat_template == ragged.tokenizer.chat_template
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    one, two = (p(images=views, return_tensors="pt") for p in (processor, ragged.image_processor))
    assert torch.equal(one["pixel_values"], two["pixel_values"])


def test_lora_trains_the_language_model_and_nothing_else(lora):
    gradients = train(lora, written_episodes(lora))
    assert len(gradients) == 2 * 2 * 7  # A and B, two layers, seven matrices
    assert all(".language_model.layers." in name and "lora_" in name for name in gradients)
    assert all(gradient.any() for gradient in gradients.values())
    assert gradients.keys() == common.trainable_weights(lora.model).keys()
    config = lora.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.0)


def test_a_saved_adapter_comes_back_the_same(lora, tmp_path):
    lora.save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists() and not list(tmp_path.glob("model*"))
    config = tmp_path / "adapter_config.json"  # as others train: with dropout
    config.write_text(config.read_text().replace('"lora_dropout": 0.0', '"lora_dropout": 0.5'))
    episodes = written_episodes(lora)
    with torch.no_grad():
        ours = token_logprobs(lora, episodes)
        opened = load_policy(str(tmp_path), lora_rank=16, device="cpu")  # goes on with the saved adapter
        on_top = load_policy(lora.name, adapter=str(tmp_path), device="cpu")
        for policy in (opened, on_top):
            assert (policy.protocol, policy.name) == (RAGGED, lora.name)
            policy.model.train()
            assert torch.equal(token_logprobs(policy, episodes), ours)
            trained, before = (common.trainable_weights(p.model) for p in (policy, lora))
            assert same_weights(trained, before)


def test_a_protocol_is_the_adapters_or_else_the_bases(ragged, tmp_path):
    ragged.save(tmp_path / "base")
    policy = load_policy(str(tmp_path / "base"), lora_rank=2, device="cpu", min_pixels=2000)
    assert asdict(policy.protocol) == asdict(RAGGED) | {"min_pixels": 2000}
    policy.save(tmp_path / "adapter")
    assert load_policy(str(tmp_path / "adapter"), device="cpu").protocol == policy.protocol
    (tmp_path / "adapter" / "protocol.json").unlink()
    assert load_policy(str(tmp_path / "adapter"), device="cpu").protocol == RAGGED


def test_a_checkpoint_without_protocol_speaks_the_default_one(base_dir):
    policy = load_policy(base_dir, device="cpu")
    assert policy.protocol == Protocol() and policy.protocol.before_question == "\n"
    text = policy.decode(replay(policy, PROBES[1], SCRIPTS[1]).token_ids)
    assert f"<|vision_end|>\n{PROBES[1].question}<|im_end|>\n" in text


def test_another_wording_comes_from_files_and_is_saved_with_the_policy(tmp_path):
    (tmp_path / "system").write_text("Find it: é.\n\n", encoding="utf-8")
    (tmp_path / "observation").write_text("See {image}", encoding="utf-8-sig")
    wording = {"system_prompt": tmp_path / "system", "observation_prompt": tmp_path / "observation"}
    policy = load_policy("tiny", device="cpu", **wording, error_prompt=None, min_pixels=1024, max_pixels=None)
    assert policy.protocol == Protocol("Find it: é.\n", "See {image}", "That failed.", 1024, 48 * 48, "")
    policy.save(tmp_path / "saved")
    assert load_policy(str(tmp_path / "saved"), device="cpu").protocol == policy.protocol


@pytest.mark.parametrize("size, dtype", [(0, torch.float32), (2 * 10**9, torch.bfloat16)])
def test_away_from_the_cpu_large_checkpoints_are_bfloat16(qwen25_dir, size, dtype, tmp_path):
    shutil.copytree(qwen25_dir, tmp_path, dirs_exist_ok=True)
    with open(tmp_path / "more.safetensors", "wb") as file:
        file.truncate(size)  # a hole: takes no room
    cpu, elsewhere = torch.device("cpu"), torch.device("meta")
    assert load_weights(str(tmp_path), None, elsewhere, None).dtype == dtype
    assert load_weights(str(tmp_path), None, cpu, None).dtype == torch.float32
    for wanted in (torch.bfloat16, torch.float32):
        assert load_weights(str(tmp_path), None, cpu, wanted).dtype == wanted


def user_error(function, *args, **options) -> str:
    """The one line that a mistake leads to."""
    with pytest.raises(common.UserError) as error:
        function(*args, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


def test_a_name_of_nothing_is_one_line(lora, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/nothing", "nothing", "/no/such/place"):
        assert user_error(load_policy, name, device="cpu").startswith(f"cannot load {name}: ")
    lora.save(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace(lora.name, "/moved/away"))
    assert user_error(load_policy, str(tmp_path), device="cpu").startswith("cannot load /moved/away: ")


def test_what_cannot_be_meant_is_one_line(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfa")
    for file in (tmp_path / "bytes", tmp_path / "nothing", tmp_path):
        assert f"{file}: cannot be read" in user_error(load_policy, "tiny", device="cpu", error_prompt=file)
    for sizes in ({"min_pixels": 9999}, {"min_pixels": 0}, {"max_pixels": 1}):
        assert "--min_pixels" in user_error(load_policy, "tiny", device="cpu", **sizes)
    for wanted in ({"lora_rank": 4}, {"quantize": "nf4"}):
        assert "tiny has random weights" in user_error(load_policy, "tiny", device="cpu", **wanted)


def change_weights(file: Path, change) -> None:
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file(change(weights), file, {"format": "pt"})


def test_weights_that_are_missing_are_refused(lora, tmp_path):
    shutil.copytree(lora.name, tmp_path / "base")
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    change_weights(tmp_path / "base/model.safetensors", lambda w: {k: v for k, v in w.items() if k != name})
    assert user_error(load_policy, str(tmp_path / "base"), device="cpu").endswith(f"it lacks {name}")
    lora.save(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    change_weights(file, lambda w: {k.replace("layers.1.", "layers.7."): v for k, v in w.items()})
    with pytest.raises((common.UserError, UserWarning), match="missing adapter keys"):
        load_policy(str(tmp_path / "adapter"), device="cpu")


# ---------------------------------------------------------------------------------------------- four bits


@pytest.mark.usefixtures("four_bit_paths")
def test_only_the_language_model_is_in_four_bits_and_adapters_on_it_train(base_dir, real, tmp_path):
    """Tolerances: 2e-2 on log-probs that should be equal, since a kernel may compute in bf16."""
    import bitsandbytes

    policy = with_protocol(load_policy(base_dir, quantize="nf4", lora_rank=4, device="cpu"), RAGGED)
    kinds = {
        name: module for name, module in policy.base.named_modules() if isinstance(module, torch.nn.Linear)
    }
    packed = {name for name, module in kinds.items() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert packed == {name for name in kinds if ".language_model.layers." in name and "lora_" not in name}
    assert len(packed) == 2 * 7
    move_adapters(policy)
    episodes = written_episodes(policy)
    gradients = train(policy, episodes)
    assert len(gradients) == 28 and all(gradient.any() for gradient in gradients.values())
    with torch.no_grad():
        ours = token_logprobs(policy, episodes)
        with policy.model.disable_adapter():
            coarse = token_logprobs(policy, episodes)
        assert 1e-3 < (coarse - token_logprobs(real, episodes)).abs().max() < 10  # not another model
        policy.save(tmp_path)
        again = load_policy(str(tmp_path), quantize="nf4", device="cpu")
        torch.testing.assert_close(token_logprobs(again, episodes), ours, atol=2e-2, rtol=0)


# ---------------------------------------------------------------------------------------------- optimizer


def make_optimizer(policy: Policy, **flags) -> torch.optim.Optimizer:
    cfg = Config(**{"lr": 0.5, "out": Path("unused"), **flags})
    return common.make_optimizer(policy, cfg, betas=(0.8, 0.9), weight_decay=0.3)


def test_without_adapters_every_weight_is_float32_and_the_tower_may_be_frozen(base_dir):
    for train_vision in (True, False):
        policy = load_policy(base_dir, device="cpu", dtype=torch.bfloat16)
        (group,) = make_optimizer(policy, train_vision=train_vision).param_groups
        frozen = [] if train_vision else list(policy.base.model.visual.parameters())
        assert {id(weight) for weight in group["params"]} == (
            {id(weight) for weight in policy.model.parameters()} - {id(weight) for weight in frozen}
        )
        assert {weight.dtype for weight in policy.model.parameters()} == {torch.float32}
        assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.8, 0.9), 0.3)


def test_below_adapters_the_base_keeps_its_type(base_dir):
    policy = load_policy(base_dir, lora_rank=2, device="cpu", dtype=torch.bfloat16)
    (group,) = make_optimizer(policy, adam_8bit=True).param_groups
    assert {weight.dtype for weight in group["params"]} == {torch.float32} and len(group["params"]) == 28
    assert {w.dtype for name, w in policy.model.named_parameters() if "lora_" not in name} == {torch.bfloat16}


@pytest.mark.usefixtures("four_bit_paths")
def test_four_bits_need_adapters_and_8_bit_adam_moves_them(base_dir):
    import bitsandbytes

    bare = load_policy(base_dir, quantize="nf4", device="cpu")
    assert "add adapters: --lora_rank" in user_error(make_optimizer, bare)
    policy = with_protocol(load_policy(base_dir, quantize="nf4", lora_rank=4, device="cpu"), RAGGED)
    optimizer = make_optimizer(policy, adam_8bit=True, lr=0.01)
    assert isinstance(optimizer, bitsandbytes.optim.AdamW8bit)
    before = {name: w.detach().clone() for name, w in common.trainable_weights(policy.model).items()}
    train(policy, written_episodes(policy))
    optimizer.step()
    for name, weight in common.trainable_weights(policy.model).items():  # the first step of Adam is the rate
        if "lora_B" in name:
            assert 0 < (weight - before[name]).abs().max() < 0.011, name


def test_activations_that_are_computed_again_give_the_same_gradients(ragged):
    policy, episodes = copy.deepcopy(ragged), written_episodes(ragged)
    make_optimizer(policy)
    policy.model.train()
    kept = train(policy, episodes)
    make_optimizer(policy, activation_checkpointing=True)
    assert policy.base.is_gradient_checkpointing
    again = train(policy, episodes)
    assert kept.keys() == again.keys()
    for name, gradient in again.items():
        torch.testing.assert_close(gradient, kept[name], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- the command


def test_tiny_needs_neither_bitsandbytes_nor_peft():
    code = "import sys, model; model.load_policy('tiny', device='cpu'); print(sorted(sys.modules))"
    root = Path(model_module.__file__).parent
    modules = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert "'transformers'" in modules.stdout
    assert "'bitsandbytes'" not in modules.stdout and "'peft'" not in modules.stdout


def test_the_command_counts_weights_and_shows_a_prompt(qwen3_dir, monkeypatch):
    """Adapters of rank 4 on two layers: q, o 64 x 64; k, v 32 x 64; gate, up 128 x 64; down 64 x 128."""
    code, out, _ = run_main(monkeypatch, "model.py", "--base", qwen3_dir, "--lora_rank", 4)
    assert code == 0
    adapters = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    model = load_policy(qwen3_dir, device="cpu").base
    total = sum(weight.numel() for weight in model.parameters())
    tower = sum(weight.numel() for weight in model.model.visual.parameters())
    numbers = [[int(word.replace(",", "")) for word in line[16:].split()[::2]] for line in out[:3]]
    assert numbers[0] == [tower, 0] and numbers[2] == [total + adapters, adapters] == numbers[2]
    assert numbers[1][1] == adapters == 8192
    assert out[-1].startswith("'<|im_start|>' 'system\\n' 'A' 'n' 's'") and "image_pad" not in out[-1]
    code, out, err = run_main(monkeypatch, "model.py", "--base", "nothing")
    assert (code, out, len(err)) == (2, [], 1) and err[0].startswith("error: cannot load nothing: ")
