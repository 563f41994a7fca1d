"""Tests of model.py and of make_optimizer: tokens, positions, attention, log-probs, files. No network.

A saved directory is opened with Qwen2VLImageProcessorPil: AutoProcessor needs torchvision, which we do not.

Lines that were flipped, each with the test that then failed:
    encode               control tokens in text are encoded as such    any_text_decodes_back_and_never_...
    render               texts encoded one by one                      neighbouring_texts_are_encoded_as_...
    render               no new line behind end-of-turn                a_conversation_has_the_layout_of_...
    mrope_positions      start + h * w                                 positions_equal_those_of_...
    attend_in_windows    windows come back in another order            ragged_views_are_seen_as_by_...
    encode_views         no deepstack features                         the same
    attend_in_episodes   episodes see those before them                packed_log_probs_equal_a_forward_...
    image_kwargs         layers, or images, in another order           the same
    token_logprobs       a token predicts itself, not the next         the same
    vocabulary_logprobs  no banned tokens, no padding, no temperature  the same
    mask interface       not registered                                a_mask_of_padding_is_heeded
    token_logprobs       given features are ignored                    visual_features_that_are_given_...
    token_logprobs       hidden states detached, chunks cut apart      chunks_of_log_probs_and_activations_...
    micro_batches        no single long episode, the shortest first    micro_batches_are_as_few_as_will_do_...
    save                 the folder inside stays                       the_tiny_policy_follows_the_seed_...
    tiny_model           its own seed                                  the same
    load_policy          the base's protocol before the adapter's      the_wording_comes_from_files_or_the_...
    read_prompt          utf-8, or strip                               the same
    add_adapters         saved dropout, not trainable, other layers    adapters_train_the_language_model_...
    add_adapters         adapters of other layers pass                 weights_that_are_missing_are_refused
    load_weights         missing keys pass                             the same
    load_weights         the tower, or the head, in 4 bits             only_the_language_model_is_in_four_...
    load_weights         small, or large, or cpu are not told apart    away_from_the_cpu_large_checkpoints_...
    load_policy          tiny with adapters, OSError pass              what_cannot_be_loaded_is_one_line
    change_protocol      0 pixels pass                                 the same
    model.py             imports peft at the top                       tiny_needs_neither_bitsandbytes_nor_...
    make_optimizer       no float32, no frozen tower, no betas         without_adapters_weights_are_made_...
    make_optimizer       4 bits alone pass, no 8-bit Adam              only_the_language_model_is_in_four_...
    make_optimizer       no checkpointing                              chunks_of_log_probs_and_activations_...
"""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import common

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
from conftest import RAGGED, noise, noise_probes, run_main, same_weights, with_protocol
from hypothesis import given
from hypothesis import strategies as st

import data
import model as model_module
from env import Crop, format_action
from model import SPECIAL_TOKENS, Policy, Protocol, load_policy, micro_batches, tiny_tokenizer, token_logprobs
from rollout import Episode, replay, rollout
from train_sft import Config

PHRASES = [token for token in tiny_tokenizer().get_added_vocab() if token not in SPECIAL_TOKENS]
# Whole texts, and texts in which phrases and control tokens meet anything.
TEXTS = st.lists(st.one_of(st.text(max_size=20), st.sampled_from(SPECIAL_TOKENS + PHRASES))).map("".join)


def look(*box, source=0) -> str:
    return f"<think>next a1</think>{format_action(Crop(box, source))}"


CORNER, WIDE, TALL = look(0.0, 0.0, 0.5, 0.5), look(0.0, 0.0, 1.0, 0.2), look(0.3, 0.0, 0.5, 1.0)
SCRIPTS = [  # a crop of a crop, an answer at once, a failed call and no action at the end
    [CORNER, look(0.1, 0.2, 0.9, 0.4, source=1), TALL, "<answer>4</answer>"],
    ["<think>read 7</think><answer>7</answer>"],
    [WIDE, look(0.5, 0.0, 0.6, 1.0, source=7), look(0.2, 0.1, 1.0, 0.9, source=1), "<think>no"],
]
PROBES = noise_probes((288, 288), (200, 120), (90, 300))


def written_episodes(policy: Policy) -> list:
    return [replay(policy, probe, texts) for probe, texts in zip(PROBES, SCRIPTS)]


@torch.no_grad()
def plain_logprobs(policy: Policy, model, episode, temperature: float = 1.0) -> torch.Tensor:
    """(T,): log-probs of an episode's sampled tokens by plain transformers, one token after the other."""
    ids = torch.from_numpy(episode.token_ids)[None]
    batch = policy.image_processor(images=episode.views(), return_tensors="pt")
    logits = model(input_ids=ids, mm_token_type_ids=(ids == policy.image_pad).int(), **batch).logits[0]
    banned = set(policy.tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)) - {policy.im_end}
    logits[:, [*banned, *range(len(policy.tokenizer), logits.shape[1])]] = -torch.inf
    out = torch.zeros(len(logits))
    for t in np.flatnonzero(episode.assistant_mask):
        out[t] = torch.log_softmax(logits[t - 1] / temperature, -1)[episode.token_ids[t]]
    return out


def assert_equal_rows(logprobs: torch.Tensor, policy: Policy, model, episodes: list, *options) -> None:
    rows = [plain_logprobs(policy, model, episode, *options) for episode in episodes]
    rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    torch.testing.assert_close(logprobs, rows, atol=1e-5, rtol=0)


def gradients_of(policy: Policy, episodes: list) -> dict[str, torch.Tensor]:
    policy.model.zero_grad()
    token_logprobs(policy, episodes).sum().backward()
    return {name: w.grad.clone() for name, w in policy.model.named_parameters() if w.grad is not None}


def user_error(function, *args, **options) -> str:
    """The one line that a mistake leads to."""
    with pytest.raises(common.UserError) as error:
        function(*args, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


@pytest.fixture(scope="module", params=["qwen25_dir", "qwen3_dir"])
def base(request) -> str:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=["tiny", "qwen25_dir", "qwen3_dir"])
def each(request, ragged) -> Policy:
    if request.param == "tiny":
        return ragged
    return with_protocol(load_policy(request.getfixturevalue(request.param), device="cpu"), RAGGED)


@pytest.fixture(scope="module")
def lora(base) -> Policy:
    """Adapters on a base of each family, moved off zero."""
    torch.manual_seed(5)
    policy = load_policy(base, lora_rank=4, device="cpu")
    for name, weight in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return with_protocol(policy, RAGGED)


# ---------------------------------------------------------------------------------------------- tokens


@given(TEXTS)
def test_any_text_decodes_back_and_never_holds_a_control_token(policy, text):
    ids = policy.encode(text)
    assert policy.decode(ids) == text and not set(ids) & set(policy.tokenizer.all_special_ids)


def chat(role: str, *parts) -> dict:
    """A message of texts and images."""
    kinds = ["text" if isinstance(part, str) else "image" for part in parts]
    return {"role": role, "content": [{"type": kind, kind: part} for kind, part in zip(kinds, parts)]}


@given(TEXTS, TEXTS)
def test_what_a_conversation_says_never_becomes_a_control_token(ragged, system, question):
    picture = noise(64, 48)  # 8 x 6 patches of 8 pixels, merged 2 x 2: 12 visual tokens
    ids, views = ragged.render([chat("system", system), chat("user", picture, question)])
    control = ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", *["<|image_pad|>"] * 12]
    control += ["<|vision_end|>", "<|im_end|>", "<|im_start|>"]
    assert [ragged.decode([i]) for i in ids if i in ragged.tokenizer.all_special_ids] == control
    image = f"<|vision_start|>{'<|image_pad|>' * 12}<|vision_end|>"
    opening = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{image}{question}<|im_end|>\n"
    assert ragged.decode(ids) == opening + "<|im_start|>assistant\n" and views == [picture]


def same_layout(policy: Policy) -> bool:
    """Does the checkpoint's chat template give the tokens of `render`, around images and turns?"""
    image, text = noise(64, 64), "a b."
    said = ["system", text], ["user", image, text], ["assistant", text], ["user", text, image]
    talk = [chat(role, *parts) for role, *parts in said]
    theirs = policy.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    tokens = policy.tokenizer(theirs, add_special_tokens=False)["input_ids"]
    ours = [i for i in policy.render(talk)[0] if i != policy.image_pad]
    return ours == [i for i in tokens if i != policy.image_pad] and tokens.count(policy.image_pad) == 2


def test_a_conversation_has_the_layout_of_the_chat_template(each):
    assert same_layout(each)


def test_a_conversation_that_grows_turn_by_turn_has_the_tokens_of_the_whole(ragged):
    picture, crop = noise(96, 40), noise(40, 40)
    talk, reply = [chat("system", "Search."), chat("user", picture, "?")], chat("user", "Look:", crop)
    whole, views = ragged.render([*talk, chat("assistant", CORNER), reply])
    assert views == [picture, crop]
    turn = [*ragged.render(talk)[0], *ragged.encode(CORNER)]
    assert turn + ragged.render([reply], before=(ragged.im_end, "\n"))[0] == whole
    assert [*turn, ragged.im_end] + ragged.render([reply], before=("\n",))[0] == whole


def test_neighbouring_texts_are_encoded_as_one_and_each_phrase_is_one_token(policy):
    assert policy.render([chat("user", "see no", "thing")]) == policy.render([chat("user", "see nothing")])
    assert len(PHRASES) > 80 and all(len(policy.encode(phrase)) == 1 for phrase in PHRASES)


# ------------------------------------------------------------------------------- positions and attention


@given(st.lists(st.tuples(*[st.integers(1, 6)] * 3), min_size=1, max_size=5), st.integers(0, 4), st.data())
def test_positions_equal_those_of_transformers_and_go_on_from_any_cut(policy, pieces, tail, draw):
    """pieces: words before an image, its height and its width in visual tokens."""
    pad = policy.image_pad
    stretches = [[5] * words + [pad] * (h * w) for words, h, w in pieces] + [[5] * tail]
    grids = [(1, 2 * h, 2 * w) for _, h, w in pieces]
    row = torch.tensor([sum(stretches, [])])
    options = {"mm_token_type_ids": (row == pad).int(), "image_grid_thw": torch.tensor(grids)}
    theirs, delta = policy.base.model.get_rope_index(row, **options)
    parts, start = [], 0
    for stretch, grid in zip(stretches, [*grids, None]):
        cut = draw.draw(st.integers(0, stretch.index(pad) if grid else len(stretch)))  # before the image
        for ids, own in ((stretch[:cut], []), (stretch[cut:], [grid])):
            part, start = model_module.mrope_positions(np.array(ids, int), own, pad, 2, start)
            parts.append(part)
    ours, following = model_module.mrope_positions(row[0].numpy(), grids, pad, 2)
    assert np.array_equal(ours, theirs[:, 0]) and np.array_equal(np.concatenate(parts, 1), ours)
    assert start == following == row.shape[1] + int(delta)


@torch.no_grad()
def test_ragged_views_are_seen_as_by_transformers_and_as_if_each_were_alone(each):
    """Qwen3-VL also gives features to each of two layers."""
    text, layers = each.base.config.text_config, 2 * hasattr(each.base.model.visual, "deepstack_merger_list")
    sizes = [(300, 200), (90, 410), (64, 64), (170, 170), (57, 301), (64, 64)]
    views = [noise(*size, seed=i) for i, size in enumerate(sizes)]
    ways = [each.encode_views(views), [each.encode_views([view])[0] for view in views]]
    each.base.set_attn_implementation({"vision_config": "sdpa"})
    ways.append(each.encode_views(views))
    each.base.set_attn_implementation(model_module.OUR_ATTENTION)
    for view, (grid, tokens), *others in zip(views, *ways, strict=True):
        assert tokens.shape == (each.count_visual_tokens(view), (1 + layers) * text.hidden_size)
        for other_grid, other in others:
            assert other_grid == grid and tokens.std() > 0.01
            torch.testing.assert_close(other, tokens, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_mask_of_padding_is_heeded(policy):
    """`generate` of transformers pads on the left."""
    ids, positions = torch.arange(24)[None], (torch.arange(24) - 4).clamp(min=0).expand(3, 1, 24)
    plain = policy.base.model(input_ids=ids[:, 4:], position_ids=positions[..., 4:]).last_hidden_state
    masked = policy.base.model(input_ids=ids, position_ids=positions, attention_mask=(ids > 3).int())
    torch.testing.assert_close(masked.last_hidden_state[:, 4:], plain, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------- log-probs


@torch.no_grad()
def test_packed_log_probs_equal_a_forward_per_row_by_plain_transformers(each, tmp_path):
    each.save(tmp_path)
    plain = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    episodes = written_episodes(each)
    episodes.insert(1, episodes[0])  # neighbours of equal length go into one call
    for temperature in (1.0, 0.6):
        assert_equal_rows(token_logprobs(each, episodes, temperature), each, plain, episodes, temperature)


@torch.no_grad()
def test_visual_features_that_are_given_stand_for_the_views(each):
    episodes = written_episodes(each)
    seen = token_logprobs(each, episodes)
    for episode in episodes:
        episode.features, episode.kept_views = each.encode_views(episode.views()), []
    assert torch.equal(token_logprobs(each, episodes), seen)
    blind = replay(each, PROBES[1], SCRIPTS[1], data.WarmUpEnv)
    assert blind.views() == [] and token_logprobs(each, [blind]).isfinite().all()


def test_chunks_of_log_probs_and_activations_computed_again_change_no_gradient(ragged, monkeypatch):
    policy, episodes = copy.deepcopy(ragged), written_episodes(ragged)
    policy.model.train()
    kept = gradients_of(policy, episodes)
    assert kept.keys() == dict(policy.model.named_parameters()).keys()
    assert all(g.any() for name, g in kept.items() if not name.endswith("k_proj.bias"))  # shifts all keys
    make_optimizer(policy, activation_checkpointing=True)
    monkeypatch.setattr(model_module, "LOGIT_ROWS", 7)
    assert policy.base.is_activation_checkpointing
    for name, gradient in gradients_of(policy, episodes).items():
        torch.testing.assert_close(gradient, kept[name], atol=1e-4, rtol=1e-4)


def of_lengths(*lengths) -> list:
    return [Episode(None, token_ids=[0] * n) for n in lengths]


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_micro_batches_hold_every_episode_once_and_keep_the_budget(lengths, budget):
    episodes = of_lengths(*lengths)
    batches = micro_batches(episodes, budget)
    assert sorted(map(id, sum(batches, []))) == sorted(map(id, episodes))
    assert all(len(b) == 1 or 0 < sum(len(e.token_ids) for e in b) <= budget for b in batches)


def test_micro_batches_are_as_few_as_will_do_and_about_equal():
    episodes = of_lengths(30, 10, 10, 20, 10)
    assert [len(micro_batches(episodes, budget)) for budget in (80, 79, 39, 30, 10)] == [1, 2, 3, 3, 5]
    two = micro_batches(episodes, 40)
    assert [[len(e.token_ids) for e in batch] for batch in two] == [[30, 10], [20, 10, 10]]


# ---------------------------------------------------------------------------------------------- files


def test_the_tiny_policy_follows_the_seed_and_opens_with_plain_transformers(ragged, tmp_path):
    torch.manual_seed(0)
    once, twice = (load_policy("tiny", device="cpu").model.state_dict() for _ in range(2))
    assert same_weights(once, ragged.model.state_dict()) and not same_weights(once, twice)
    (tmp_path / ".partial").mkdir()  # a save that was killed
    ragged.save(tmp_path)
    assert not (tmp_path / ".partial").exists()
    opened = load_policy(str(tmp_path), device="cpu")
    plain = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)
    assert plain.config.vision_config._attn_implementation == "sdpa"  # ours is not written down
    assert all(same_weights(model.state_dict(), once) for model in (opened.model, plain))
    assert (opened.protocol, opened.name) == (RAGGED, str(tmp_path))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    again = Policy(plain, tokenizer, processor, RAGGED, "plain")
    for theirs, ours in zip(written_episodes(again), written_episodes(ragged)):
        assert np.array_equal(theirs.token_ids, ours.token_ids)
    one, two = (p.process_views([noise(90, 50)])["pixel_values"] for p in (again, ragged))
    assert torch.equal(one, two)


def test_adapters_train_the_language_model_alone_and_are_saved_as_peft_has_them(lora, tmp_path):
    episodes = written_episodes(lora)
    gradients, trained = gradients_of(lora, episodes), common.trainable_weights(lora.model)
    assert gradients.keys() == trained.keys() and len(gradients) == 28  # A and B, two layers, 7 matrices
    assert all(".language_model." in name and "lora_" in name and g.any() for name, g in gradients.items())
    lora.save(tmp_path)
    assert not list(tmp_path.glob("model*"))
    plain = transformers.AutoModelForImageTextToText.from_pretrained(lora.name)
    with torch.no_grad(), lora.model.disable_adapter():
        assert_equal_rows(token_logprobs(lora, episodes), lora, plain, episodes)
    with torch.no_grad():
        ours = token_logprobs(lora, episodes)
    assert_equal_rows(ours, lora, peft.PeftModel.from_pretrained(plain, tmp_path), episodes)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('dropout": 0.0', 'dropout": 0.5'))  # as others train
    opened = load_policy(str(tmp_path), lora_rank=16, device="cpu")  # goes on with the adapter that is there
    for policy in (opened, load_policy(lora.name, adapter=str(tmp_path), device="cpu")):
        assert same_weights(common.trainable_weights(policy.model), trained) and policy.name == lora.name
        policy.model.train()
        with torch.no_grad():
            assert torch.equal(token_logprobs(policy, episodes), ours)


def test_the_wording_comes_from_files_or_the_adapter_or_the_base_or_is_the_default(ragged, tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    ragged.save(base)
    (tmp_path / "system").write_text("Find it: é.\n\n", encoding="utf-8")
    (tmp_path / "observation").write_text("See {image}", encoding="utf-8-sig")
    wording = {"system_prompt": tmp_path / "system", "observation_prompt": tmp_path / "observation"}
    wording |= {"error_prompt": None, "min_pixels": 2000}
    policy = load_policy(str(base), lora_rank=2, device="cpu", **wording)
    policy.save(run)
    changed = Protocol("Find it: é.\n", "See {image}", RAGGED.error_prompt, 2000, RAGGED.max_pixels)
    assert policy.protocol == changed
    for wanted, saved in ((changed, run), (RAGGED, base), (Protocol(), None)):
        assert load_policy(str(run), device="cpu").protocol == wanted
        if saved:
            (saved / "protocol.json").unlink()


@pytest.mark.parametrize("size, dtype", [(0, torch.float32), (2 * 10**9, torch.bfloat16)])
def test_away_from_the_cpu_large_checkpoints_are_bfloat16(qwen25_dir, size, dtype, tmp_path):
    shutil.copytree(qwen25_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "more.safetensors").touch()
    os.truncate(tmp_path / "more.safetensors", size)  # a hole: takes no room
    bf16 = torch.bfloat16
    for device, asked, wanted in (("meta", None, dtype), ("cpu", None, torch.float32), ("cpu", bf16, bf16)):
        assert model_module.load_weights(str(tmp_path), None, torch.device(device), asked).dtype == wanted


def test_what_cannot_be_loaded_is_one_line(lora, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lora.save(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace(lora.name, "/moved/away"))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfa")
    for name in ("runs/nothing", "nothing", "/no/such/place", "/moved/away"):
        loaded = str(tmp_path) if name == "/moved/away" else name
        assert user_error(load_policy, loaded, device="cpu").startswith(f"cannot load {name}: ")
    for file in (tmp_path / "bytes", tmp_path / "nothing", tmp_path):
        assert f"{file}: cannot be read" in user_error(load_policy, "tiny", device="cpu", error_prompt=file)
    for sizes in ({"min_pixels": 9999}, {"min_pixels": 0}, {"max_pixels": 1}):
        assert "--min_pixels" in user_error(load_policy, "tiny", device="cpu", **sizes)
    for wanted in ({"lora_rank": 4}, {"quantize": "nf4"}):
        assert "tiny has random weights" in user_error(load_policy, "tiny", device="cpu", **wanted)


def test_weights_that_are_missing_are_refused(lora, tmp_path):
    shutil.copytree(lora.name, tmp_path / "base")
    lora.save(tmp_path / "run")
    for file in tmp_path.glob("*/*.safetensors"):
        weights = safetensors.torch.load_file(file)
        moved = {name.replace("layers.1.mlp.up", "layers.9.mlp.up"): w for name, w in weights.items()}
        safetensors.torch.save_file(moved, file, {"format": "pt"})
    said = user_error(load_policy, str(tmp_path / "base"), device="cpu")
    assert said.endswith("it lacks model.language_model.layers.1.mlp.up_proj.weight")
    assert "missing adapter keys" in user_error(load_policy, str(tmp_path / "run"), device="cpu")
    folder = str(Path(__file__).parent)  # of anything
    assert folder in user_error(load_policy, folder, device="cpu")
    assert "adapter_config.json" in user_error(load_policy, lora.name, adapter=folder, device="cpu")


# ---------------------------------------------------------------------------------- 4 bits and optimizers


def make_optimizer(policy: Policy, **flags) -> torch.optim.Optimizer:
    cfg = Config(**{"lr": 0.01, "weight_decay": 0.3, "out": Path("unused"), **flags})
    return common.make_optimizer(policy, cfg, betas=(0.8, 0.9))


def test_only_the_language_model_is_in_four_bits_and_adapters_on_it_train(base, tmp_path):
    import bitsandbytes

    bare = with_protocol(load_policy(base, quantize="nf4", device="cpu"), RAGGED)
    assert "add adapters: --lora_rank" in user_error(make_optimizer, bare)
    layers = {name: layer for name, layer in bare.model.named_modules() if isinstance(layer, torch.nn.Linear)}
    coarse = {name for name, layer in layers.items() if isinstance(layer, bitsandbytes.nn.Linear4bit)}
    assert coarse == {name for name in layers if name.startswith("model.language_model.")}
    assert len(coarse) == 2 * 7 and {"lm_head", "model.visual.blocks.0.attn.proj"} <= layers.keys()
    policy = with_protocol(load_policy(base, quantize="nf4", lora_rank=4, device="cpu"), RAGGED)
    episodes, optimizer = written_episodes(policy), make_optimizer(policy, adam_8bit=True, lr=0.1)
    assert isinstance(optimizer, bitsandbytes.optim.AdamW8bit)
    before = gradients_of(policy, episodes)
    rollout(policy, noise_probes((64, 64)), max_turns=1, max_turn_tokens=2)  # in eval mode
    after = gradients_of(policy, episodes)  # some processors have a kernel for that, without gradients
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=1e-5, rtol=1e-4)
    optimizer.step()
    for name, weight in common.trainable_weights(policy.model).items():
        assert "lora_A" in name or 0.05 < weight.abs().max() < 0.11  # from 0; Adam's first step is lr
    policy.save(tmp_path)
    again, full = load_policy(str(tmp_path), quantize="nf4", device="cpu"), load_policy(base, device="cpu")
    with torch.no_grad():
        ours, loaded, below, fine = (token_logprobs(p, episodes) for p in (policy, again, bare, full))
    torch.testing.assert_close(loaded, ours, atol=1e-4, rtol=0)
    assert (ours - below).abs().max() > 1 and 0.2 < (below - fine).abs().max() < 10


def test_without_adapters_weights_are_made_float32_and_the_tower_may_be_frozen(base):
    policy = load_policy(base, device="cpu", dtype=torch.bfloat16)
    tower = list(map(id, policy.base.model.visual.parameters()))
    for train_vision, frozen in ((True, []), (False, tower)):
        (group,) = make_optimizer(policy, train_vision=train_vision).param_groups
        assert {w.dtype for w in policy.model.parameters()} == {torch.float32}
        assert {id(w) for w in policy.model.parameters()} - {id(w) for w in group["params"]} == set(frozen)
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.01, (0.8, 0.9), 0.3)
    policy = load_policy(base, lora_rank=2, device="cpu", dtype=torch.bfloat16)
    (group,) = make_optimizer(policy).param_groups
    assert len(group["params"]) == 28 and {w.dtype for w in group["params"]} == {torch.float32}
    assert policy.base.model.visual.dtype == policy.base.lm_head.weight.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------- the command


def test_tiny_needs_neither_bitsandbytes_nor_peft():
    code = "import sys, model; model.load_policy('tiny', device='cpu'); print(*sys.modules)"
    command, folder = [sys.executable, "-c", code], Path(model_module.__file__).parent
    modules = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.split()
    assert "transformers" in modules and not {"bitsandbytes", "peft"} & set(modules)


def test_the_command_counts_weights_and_shows_a_prompt(qwen3_dir, monkeypatch):
    """Adapters of rank 4 on two layers: q, o 64 x 64; k, v 32 x 64; gate, up 128 x 64; down 64 x 128."""
    code, out, _ = run_main(monkeypatch, "model.py", "--base", qwen3_dir, "--lora_rank", 4)
    adapters = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert code == 0 and f"{adapters:,d} trainable" in out[1] and out[0].endswith(" 0 trainable")
    assert out[-1].startswith("'<|im_start|>' 'system\\n' 'A' 'n' 's'") and "image_pad" not in out[-1]
