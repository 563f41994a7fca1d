"""The policy: a vision-language model, its tokens, its positions, and the log-probs that training differentiates.

Two policies, one code path. "tiny" is the real Qwen2.5-VL classes of transformers at toy size (about 1 M
parameters), from random weights, with a tokenizer built here. Any other name is a Hugging Face id or a directory of
the Qwen2.5-VL or Qwen3-VL family, loaded with LoRA (or QLoRA) adapters from peft. Both are saved in the Hugging Face
layout, so that plain `from_pretrained` opens a run directory. "random:qwen7b" has the shapes of the published
checkpoint and random weights: memory and speed are the same, and nothing is downloaded.

Three rules keep a multi-turn conversation exact (measured in transformers 5.23, see README):
  1. Token ids from the sampler are the record: nothing is decoded and tokenised again.
  2. Positions are always explicit, (3, B, T): time, height and width. A forward that infers them can be silently
     wrong as soon as there is a cache or a second image.
  3. Text from the outside (questions, model output, error messages) is encoded with special tokens disabled, and
     special tokens other than end-of-turn are never sampled.

    Q questions, G rollouts per question, B = Q * G rollouts, T tokens, N tokens of B rollouts end to end, V vocabulary

    $ python model.py --base tiny          # what is in it: parameters by part, vocabulary, an example in tokens
    $ python model.py --base random:qwen7b --quantize nf4 --lora_rank 16 --meta       # the same, nothing allocated
    $ python model.py --merge runs/rl --out merged       # adapters into their base: a directory for a server

Read next: rollout.py.
"""
import ctypes
import functools
import gc
import itertools
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import peft
import safetensors
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import data
import env

IM_START, IM_END, IMAGE_PAD = "<|im_start|>", "<|im_end|>", "<|image_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
SPECIAL_TOKENS = ["<|endoftext|>", IM_START, IM_END, VISION_START, VISION_END, "<|vision_pad|>", IMAGE_PAD,
                  "<|video_pad|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@dataclass
class Protocol:
    """What env.CropEnv needs to speak with this policy: its wording and the sizes of its views, in pixels."""
    system_prompt: str = env.SYSTEM_PROMPT
    observation_prompt: str = env.OBSERVATION_PROMPT
    error_prompt: str = env.ERROR_PROMPT
    min_pixels: int = 40_000
    max_pixels: int = 2_000_000
    before_question: str = ""          # between the first view and the question


# ------------------------------------------------------------------------------------------------ the tiny policy

TINY_PROTOCOL = Protocol("Search the picture.", "Observation {label}:", "That failed.",
                         min_pixels=48 * 48, max_pixels=48 * 48)


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Bytes, plus one token for each phrase of the tiny policy's small world; any text is encoded, and decodes back."""
    coordinates = sorted({str(v) for x in range(6) for v in data.cell_box((x, 0), 6)})
    phrases = [
        "system\n", "user\n", "assistant\n", "Search the picture.", "Observation ", "That failed.",
        "What color is the tag with ", "the ", " and ", "What number is on sign ", "What number is left of the ",
        "<think>", "</think>", "<answer>", "</answer>", '<grounding>{"bbox_2d": [',
        '], "source": "original_image"}</grounding>', '], "source": "observation_', '"}</grounding>',
        "<think>want ", ", want ", ": see ", "nothing", ", yes", ", no", ", read ", "<think>plates", "<think>try",
        ", next", ", after", ", try", ", guess", ", ",
        *data.SHAPES, *data.COLORS, *coordinates, *(f"{c}, " for c in coordinates),
        *(f" {data.cell_name((x, y))}" for y in range(6) for x in range(6))]
    return byte_tokenizer([], phrases, SPECIAL_TOKENS)


def byte_tokenizer(fillers: list[str], phrases: list[str], special: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Ids in this order: the 256 bytes, fillers (which no text is encoded to), phrases, special tokens."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *fillers]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=IM_END, pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE,
        additional_special_tokens=[t for t in special if t not in (IM_END, "<|endoftext|>")],
        clean_up_tokenization_spaces=False, model_max_length=32_768)


def tiny_model(tokenizer, width: int = 128, layers: int = 3, vision_width: int = 96, vision_layers: int = 2):
    """Qwen2_5_VLForConditionalGeneration at toy size, random weights from torch's generator."""
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in [
        ("image_token_id", IMAGE_PAD), ("video_token_id", "<|video_pad|>"), ("vision_start_token_id", VISION_START),
        ("vision_end_token_id", VISION_END)]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
            initializer_range=0.05, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id),
        vision_config=dict(
            depth=vision_layers, hidden_size=vision_width, intermediate_size=3 * vision_width,
            num_heads=vision_width // 16, patch_size=8, spatial_merge_size=2, temporal_patch_size=1, window_size=64,
            out_hidden_size=width,
            fullatt_block_indexes=list(range(vision_layers)), initializer_range=0.05),
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **ids)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    # Queries start equal to keys, so that every head first attends to what looks alike ("mimetic initialization",
    # Trockman and Kolter 2023). Without it "is the thing seen the thing wanted?" stays a coin flip for 300 steps.
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            key = layer.self_attn.k_proj.weight.mul_(1.2).view(2, -1, width)                   # (kv heads, D, width)
            layer.self_attn.q_proj.weight.copy_(key.repeat_interleave(2, 0).view(-1, width))   # two query heads each
    return model


# ------------------------------------------------------------------------------------------------ random bases

# Numbers: config.json of Qwen/Qwen2.5-VL-3B-Instruct, -7B-Instruct and Qwen/Qwen3-VL-4B-Instruct (a test compares the
# parameter counts with those published). Ids of the special tokens: tokenizer_config.json there, from 151643 on.
QWEN_SPECIAL_TOKENS = ["<|endoftext|>", IM_START, IM_END, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
                       "<|box_end|>", "<|quad_start|>", "<|quad_end|>", VISION_START, VISION_END, "<|vision_pad|>",
                       IMAGE_PAD, "<|video_pad|>"]
_SHARED = dict(rms_norm_eps=1e-6, bos_token_id=151_643, eos_token_id=151_645, pad_token_id=151_643)
_TEXT25 = dict(max_position_embeddings=128_000, **_SHARED, rope_parameters={
    "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]})
_VISION25 = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, window_size=112,
                 fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2)
RANDOM_BASES = {
    "qwen3b": lambda: transformers.Qwen2_5_VLConfig(
        text_config=dict(vocab_size=151_936, hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36,
                         num_attention_heads=16, num_key_value_heads=2, **_TEXT25),
        vision_config=dict(out_hidden_size=2048, **_VISION25), tie_word_embeddings=True),
    "qwen7b": lambda: transformers.Qwen2_5_VLConfig(
        text_config=dict(vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
                         num_attention_heads=28, num_key_value_heads=4, **_TEXT25),
        vision_config=dict(out_hidden_size=3584, **_VISION25), tie_word_embeddings=False),
    "qwen3vl4b": lambda: transformers.Qwen3VLConfig(
        text_config=dict(vocab_size=151_936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
                         num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=262_144,
                         **_SHARED, rope_parameters={"rope_type": "default", "rope_theta": 5e6,
                                                     "mrope_interleaved": True, "mrope_section": [24, 20, 20]}),
        vision_config=dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, patch_size=16,
                           out_hidden_size=2560, deepstack_visual_indexes=[5, 11, 17]), tie_word_embeddings=True)}


def random_model(config: transformers.PreTrainedConfig, device: torch.device, dtype: torch.dtype,
                 four_bits: transformers.BitsAndBytesConfig | None) -> transformers.PreTrainedModel:
    """A model of this configuration with random weights, the same at every call; made, and quantized, layer by layer.

    On the meta device nothing is allocated.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    if four_bits:
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear
        model = replace_with_bnb_linear(model, four_bits.llm_int8_skip_modules, four_bits)
        model.is_loaded_in_4bit = model.is_quantized = True              # what peft asks for
    if device.type == "meta":
        return model
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)                                             # an adapter finds its base again
        for module in model.modules():
            if hasattr(getattr(module, "weight", None), "quant_type"):
                import bitsandbytes
                weight = torch.empty(module.weight.shape, dtype=dtype, device=device).normal_(std=0.02)
                module.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4",
                                                           compress_statistics=True, module=module).to(device)
                if module.bias is not None:
                    module.bias = nn.Parameter(torch.zeros_like(module.bias, device=device), requires_grad=False)
            else:
                module.to_empty(device=device, recurse=False)
                model._init_weights(module)
    model.tie_weights()
    return model.train(False)


def random_processors(config) -> tuple[transformers.PreTrainedTokenizerFast, transformers.BaseImageProcessor]:
    """Byte tokenizer with the special tokens at their true ids, and the image processor of the family."""
    first, vision = 151_643, config.vision_config
    tokenizer = byte_tokenizer([f"<{i}>" for i in range(256, first)], [], QWEN_SPECIAL_TOKENS)
    qwen3 = vision.patch_size == 16           # preprocessor_config.json of both families
    sizes = dict(min_pixels=65_536, max_pixels=16_777_216) if qwen3 else dict(min_pixels=3136, max_pixels=12_845_056)
    norm = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3) if qwen3 else {}
    return tokenizer, transformers.Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size, merge_size=2, temporal_patch_size=2, **sizes, **norm)


# ------------------------------------------------------------------------------------------------ the tower's attention

def batched_windows(module, query, key, value, attention_mask=None, scaling=None, cu_seq_lens_q=None, **_):
    """Attention inside each window or image, windows of equal length in one call: (1, H, N, D) -> (1, N, H, D).

    transformers' default path loops over the windows in Python, thousands of small calls for one large photograph.
    Registered under a name that contains "flash", which is what makes the tower pass the window borders.
    """
    lengths = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist()
    starts_by_length: dict[int, list[int]] = {}
    start = 0
    for length in lengths:
        starts_by_length.setdefault(length, []).append(start)
        start += length
    query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))      # (N, H, D)
    outputs, order = [], []
    for length, starts in starts_by_length.items():
        parts = query, key, value
        if len(starts_by_length) > 1:                                            # else they are in order as they lie
            index = (torch.tensor(starts)[:, None] + torch.arange(length)).reshape(-1).to(query.device)
            parts = [t[index] for t in parts]
            order.append(index)
        q, k, v = (t.unflatten(0, (len(starts), length)).transpose(1, 2) for t in parts)
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling)             # (windows, H, length, D)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    joint = torch.cat(outputs)
    return (joint[torch.argsort(torch.cat(order))] if order else joint)[None], None


class PatchProduct(nn.Conv3d):
    """The tower's first layer, whose kernel is as large as a patch: a matrix product, which is far faster as such."""

    def forward(self, patches: Tensor) -> Tensor:
        """(patches, C, t, h, w) -> (patches, D)."""
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


def packed(module, query, key, value, attention_mask=None, lengths=None, scaling=None, dropout=0.0, **more):
    """The language model's attention: transformers' own, or causal inside each of the episodes that lie end to end.

    lengths: tokens of each episode; neighbours of equal length go into one call. (1, H, N, D), keys and values with
    fewer heads, -> (1, N, H, D).
    """
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
    runs = [(length, len(list(same))) for length, same in itertools.groupby(lengths)]
    pieces = (t[0].split([length * count for length, count in runs], 1) for t in (query, key, value))
    outputs = []
    for (length, count), *parts in zip(runs, *pieces):
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in parts)    # (count, H, length, D)
        out = F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, scale=scaling, enable_gqa=True)
        outputs.append(out.transpose(1, 2).flatten(0, 1))                                   # (count * length, H, D)
    return torch.cat(outputs)[None], None


OUR_ATTENTION = {"vision_config": "flash_batched_windows", "text_config": "packed_episodes"}
AttentionInterface.register("flash_batched_windows", batched_windows)
AttentionInterface.register("packed_episodes", packed)
AttentionMaskInterface.register("packed_episodes", sdpa_mask)         # else it would run without any mask
transformers.utils.logging.disable_progress_bar()       # of loading and saving: ours are enough


# ------------------------------------------------------------------------------------------------ the policy

@dataclass
class Policy:
    """A model with its tokenizer, image processor and protocol. Nothing here is trained or sampled; see below."""
    model: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    image_processor: transformers.BaseImageProcessor
    protocol: Protocol
    name: str

    def __post_init__(self):
        self.base = self.model.get_base_model() if isinstance(self.model, peft.PeftModel) else self.model
        config = self.base.config
        self.encoded: dict[str, tuple[int, ...]] = {}
        self.merge = config.vision_config.spatial_merge_size
        self.image_pad = config.image_token_id
        self.im_start, self.im_end, self.vision_start, self.vision_end = self.tokenizer.convert_tokens_to_ids(
            [IM_START, IM_END, VISION_START, VISION_END])
        vocabulary = config.text_config.vocab_size                                # rows of lm_head, padding included
        banned = [i for i in self.tokenizer.all_special_ids if i != self.im_end]
        banned += range(len(self.tokenizer), vocabulary)
        self.banned = torch.zeros(vocabulary, device=self.device)                 # (V,) added to every logit
        self.banned[torch.tensor(banned, device=self.device)] = -math.inf
        self.encode("\n")                # the first call changes a setting of the tokenizer: not while threads run

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    # -- text and images in

    def render(self, messages: list[dict], after_turn: bool = False) -> tuple[list[int], list[Image.Image]]:
        """Chat messages -> (token ids with one `<|image_pad|>` per visual token, the views in order).

        Control tokens are written here and only here; all text is encoded with special tokens disabled. An
        assistant turn is open at the end. `after_turn`: the messages follow a sampled turn. Same layout as the
        checkpoint's ChatML template (a test compares).
        """
        parts: list[int | str] = ["\n"] if after_turn else []          # what follows the end of a sampled turn
        views = []
        for message in messages:
            parts += [self.im_start, f"{message['role']}\n"]
            for part in message["content"]:
                if part["type"] == "text":
                    parts.append(part["text"])
                else:
                    views.append(part["image"])
                    parts += [self.vision_start, *[self.image_pad] * self.visual_tokens(part["image"]), self.vision_end]
            parts += [self.im_end, "\n"]
        return self.encode_parts([*parts, self.im_start, "assistant\n"]), views

    def encode_parts(self, parts: list[int | str]) -> list[int]:
        """Ids stay as they are; neighbouring strings are joined before they are encoded, as a template would."""
        ids: list[int] = []
        text = ""
        for part in [*parts, -1]:
            if isinstance(part, str):
                text += part
                continue
            ids += self.encode(text)
            text = ""
            ids.append(part)
        return ids[:-1]

    def encode(self, text: str) -> list[int]:
        """Text -> ids; "<|im_end|>" in the text becomes ordinary characters, never the control token."""
        ids = self.encoded.get(text)                        # the same few strings come again at every turn
        if ids is None:
            ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []
            if len(self.encoded) > 10_000:
                self.encoded.clear()
            self.encoded[text] = tuple(ids)
        return list(ids)

    def decode(self, ids) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def visual_tokens(self, view: Image.Image) -> int:
        return self.image_processor.get_number_of_image_patches(view.height, view.width) // self.merge**2

    def pixels(self, views: list[Image.Image]) -> dict[str, Tensor]:
        """Views -> {"pixel_values": (patches, values), "image_grid_thw": (images, 3)}; {} without views."""
        if not views:
            return {}
        batch = self.image_processor(images=views, return_tensors="pt")
        return {"pixel_values": batch["pixel_values"].to(self.device, self.base.dtype),
                "image_grid_thw": batch["image_grid_thw"].to(self.device)}

    def image_features(self, views: list[Image.Image]) -> list[tuple[tuple[int, int, int], Tensor]]:
        """Views -> per view its grid of patches (t, h, w) and its visual tokens (tokens, (1 + L) D).

        These are what the vision tower gives the language model: D values for its input, and D more for each of L
        layers where the family adds some there (deepstack of Qwen3-VL; L = 0 for Qwen2.5-VL).
        """
        if not views:
            return []
        pixels = self.pixels(views)
        grids = [tuple(grid) for grid in pixels["image_grid_thw"].tolist()]
        # Neighbours of equal size pass as frames of one video, each of which is seen by itself: less bookkeeping.
        runs = [(grid, len(list(same))) for grid, same in itertools.groupby(grids)]
        videos = torch.tensor([(count * t, h, w) for (t, h, w), count in runs], device=self.device)
        output = self.base.model.get_image_features(pixels["pixel_values"], videos, return_dict=True)
        layers = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
        return [(grid, tokens) for (grid, count), parts in zip(runs, zip(*layers, strict=True), strict=True)
                for tokens in torch.cat(parts, -1).chunk(count)]

    def seen(self, features: list[tuple[tuple[int, int, int], Tensor]]) -> dict:
        """`image_features` of all images in a batch, in the order of their tokens, as arguments of the model."""
        if not features:
            return {}
        joint = torch.cat([tokens.to(self.device) for _, tokens in features])
        first, *more = joint.split(self.base.config.text_config.hidden_size, -1)
        return {"mm_encoder_outputs": {"image": SimpleNamespace(pooler_output=[first],
                                                                deepstack_features=[[part] for part in more])}}

    # -- saving

    def save(self, directory: Path) -> None:
        """Writes model (or adapter), tokenizer, image processor and protocol in the Hugging Face layout.

        First all of it into a folder inside, then file by file in place of the last save, which is whole until then.
        """
        partial = Path(directory) / ".partial"
        shutil.rmtree(partial, ignore_errors=True)               # of a process that was killed
        try:
            self.model.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
            self.image_processor.save_pretrained(partial)
            (partial / "protocol.json").write_text(json.dumps(asdict(self.protocol), indent=1))
            for file in sorted(partial.iterdir(), key=lambda file: (file.suffix == ".safetensors", file.name)):
                data.sync(file)
                os.replace(file, Path(directory) / file.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"    # never the tower


FILE_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, UserWarning,
               StrictDataclassError, safetensors.SafetensorError)    # what libraries raise on bad files and full disks


def reason(error: BaseException) -> str:
    """What went wrong, in one line of at most 200 characters."""
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__


def check_files(directory: Path) -> None:
    """UserError that names the first file of a checkpoint that is cut short: the loaders do not say which one it is."""
    for name in ("config", "adapter_config", "tokenizer", "tokenizer_config", "preprocessor_config", "protocol"):
        if (directory / f"{name}.json").exists():
            data.read_json(directory / f"{name}.json")
    for file in sorted(directory.glob("*.safetensors")):
        try:
            safetensors.safe_open(file, "pt").keys()
        except FILE_ERRORS as error:
            raise data.UserError(f"{file}: {error}; is the file cut short?") from None


@dataclass(frozen=True, kw_only=True)
class PolicyFlags:
    """Flags of every script that loads a policy; the names are those of load_policy's arguments."""
    device: str | None = None          # default: cuda if there is one
    quantize: Literal["nf4"] | None = None  # "nf4": the language model in 4 bits
    system_prompt: Path | None = None  # a file with another wording, for weights trained on it; default: the policy's
    observation_prompt: Path | None = None  # likewise, before each view; {label} {action} {image} are filled in
    min_pixels: int | None = None      # of a view, width * height; default: the policy's
    max_pixels: int | None = None


@dataclass(frozen=True, kw_only=True)
class LoraFlags(PolicyFlags):
    lora_rank: int = 0                 # adapters of this rank on the language model, all else frozen; 0: every weight
    lora_alpha: int | None = None      # default: twice the rank
    lora_dropout: float = 0.0          # for the cold start; in GRPO, log-probs would not be those of sampling
    lora_targets: str = LORA_TARGETS   # regular expression of module names


def policy_flags(cfg) -> dict:
    """The flags of a script's Config that load_policy takes."""
    return {field.name: getattr(cfg, field.name) for field in fields(LoraFlags) if hasattr(cfg, field.name)}


def worded(protocol: Protocol, *, system_prompt: Path | None = None, observation_prompt: Path | None = None,
           min_pixels: int | None = None, max_pixels: int | None = None) -> Protocol:
    """The protocol with another wording, from files, and other view sizes, where they are given. Raises UserError."""
    wanted = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    for flag, file in {"system_prompt": system_prompt, "observation_prompt": observation_prompt}.items():
        try:
            wanted[flag] = file and Path(file).read_text("utf-8-sig").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise data.UserError(f"--{flag}: {file} cannot be read as UTF-8 text ({reason(error)})") from None
    protocol = replace(protocol, **{key: value for key, value in wanted.items() if value is not None})
    if not 1 <= protocol.min_pixels <= protocol.max_pixels:
        raise data.UserError(f"views of {protocol.min_pixels} to {protocol.max_pixels} pixels: "
                             "--min_pixels starts at 1 and is no larger than --max_pixels")
    return protocol


def load_policy(name: str, *, adapter: str | None = None, quantize: str | None = None, lora_rank: int | None = None,
                lora_alpha: int | None = None, lora_dropout: float = 0.0, lora_targets: str = LORA_TARGETS,
                system_prompt: Path | None = None, observation_prompt: Path | None = None,
                min_pixels: int | None = None, max_pixels: int | None = None,
                device: str | None = None, dtype: torch.dtype | str | None = None) -> Policy:
    """Loads a policy, ready to sample and to train.

    name: "tiny" (random weights from torch's generator), "random:" and a key of RANDOM_BASES, a Hugging Face id of the
    Qwen2.5-VL or Qwen3-VL family, or a directory: a checkpoint, or a run of ours, adapter runs included. adapter: a
    peft directory to put on top. quantize: "nf4" loads the language model in 4 bits (bitsandbytes). lora_rank: adds
    fresh LoRA adapters to the language model, unless there is an adapter, and freezes all else; None or 0 trains every
    weight. lora_alpha: default twice the rank. system_prompt, observation_prompt: files; these and the sizes of views
    replace what the policy was saved with. device: default cuda if there is one; "meta" allocates nothing. dtype:
    default bfloat16 on cuda for checkpoints above 1 GB, else float32; "auto" keeps that of the checkpoint. Raises
    data.UserError when there is nothing to load.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    directory = Path(name)
    keep_freed_memory()
    if name == "tiny":
        if lora_rank or quantize:
            raise data.UserError("tiny starts from random weights: adapters and 4 bits need a saved base, say runs/sft")
        tokenizer, protocol = tiny_tokenizer(), TINY_PROTOCOL
        processor = transformers.Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=1,
                                                          min_pixels=16 * 16, max_pixels=1024 * 1024)
        model = tiny_model(tokenizer).to(device, dtype or torch.float32)
        model.tie_weights()                                 # a move to the meta device unties them
    else:
        check_files(directory)
        if (directory / "adapter_config.json").exists():
            adapter, name = name, str(data.read_json(directory / "adapter_config.json").get("base_model_name_or_path"))
            check_files(Path(name))
        elif directory.exists() and not (directory / "config.json").exists():
            raise data.UserError(f"{directory} holds no policy (neither config.json nor adapter_config.json)")
        drawn = name.startswith("random:")
        if drawn and name[7:] not in RANDOM_BASES:
            raise data.UserError(f"{name}: there are " + ", ".join(f"random:{key}" for key in RANDOM_BASES))
        small = 0 < sum(file.stat().st_size for file in Path(name).glob("*.safetensors")) < 1e9
        dtype = dtype or (torch.float32 if device.type == "cpu" or small else torch.bfloat16)
        if quantize not in (None, "nf4"):
            raise data.UserError(f"quantize={quantize!r}: only 'nf4' is known")
        four_bits = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["model.visual", "lm_head"]) if quantize else None
        model, protocol, report = None, Protocol(before_question="\n"), {"missing_keys": ()}
        try:
            if drawn:
                config = RANDOM_BASES[name[7:]]()
                tokenizer, processor = random_processors(config)
            else:
                config = transformers.AutoConfig.from_pretrained(name)
                tokenizer = transformers.AutoTokenizer.from_pretrained(name)
                processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(name)
            if drawn or device.type == "meta":
                model = random_model(config, device, torch.bfloat16 if dtype == "auto" else dtype, four_bits)
                model.name_or_path = model.config.name_or_path = name
            else:
                options = {"quantization_config": four_bits} if four_bits else {}
                model, report = transformers.AutoModelForImageTextToText.from_pretrained(
                    name, device_map={"": device}, output_loading_info=True, dtype=dtype, **options)
            for place in (Path(adapter or name), Path(name)):
                if (place / "protocol.json").exists():
                    protocol = Protocol(**data.read_json(place / "protocol.json"))
                    break
        except FILE_ERRORS as error:
            where = "" if Path(name).exists() else "no such directory here, and not on the Hub: "
            raise data.UserError(f"cannot load {name}: {where}{reason(error)}") from error
        if report["missing_keys"]:                          # transformers would go on with random weights
            raise data.UserError(f"cannot load {name}: it lacks {min(report['missing_keys'])}")
    model.model.visual.patch_embed.proj.__class__ = PatchProduct
    model.set_attn_implementation(OUR_ATTENTION)
    if adapter:
        try:
            with warnings.catch_warnings():                 # an adapter for other layers: peft would go on without it
                warnings.filterwarnings("error", "Found missing adapter keys")
                config = peft.PeftConfig.from_pretrained(adapter)
                config.lora_dropout = lora_dropout
                model = peft.PeftModel.from_pretrained(model, adapter, config=config, is_trainable=True)
        except FILE_ERRORS as error:
            raise data.UserError(f"cannot put the adapter {adapter} on {name}: {reason(error)}") from error
    elif lora_rank:
        model.requires_grad_(False)
        config = peft.LoraConfig(r=lora_rank, lora_alpha=lora_alpha or 2 * lora_rank, lora_dropout=lora_dropout,
                                 target_modules=lora_targets, task_type="CAUSAL_LM")
        try:
            model = peft.get_peft_model(model, config)
        except ValueError as error:
            raise data.UserError(f"--lora_targets {lora_targets}: {reason(error)}") from error
    protocol = worded(protocol, system_prompt=system_prompt, observation_prompt=observation_prompt,
                      min_pixels=min_pixels, max_pixels=max_pixels)
    policy = Policy(model, tokenizer, processor, protocol, name)
    if tokenizer.chat_template and not same_layout(policy):
        warnings.warn(f"{name}: its chat template lays tokens out in another way than we do; it may do badly")
    policy.encoded.clear()
    policy.encode("\n")                    # the comparison has changed the tokenizer's setting, see Policy
    return policy


def same_layout(policy: Policy) -> bool:
    """Does the checkpoint's chat template give the tokens of `render`, around images and turns?"""
    image, text = {"type": "image", "image": Image.new("RGB", (64, 64))}, {"type": "text", "text": "a b."}
    talk = [{"role": role, "content": content} for role, content in (
        ("system", [text]), ("user", [image, text]), ("assistant", [text]), ("user", [text, image, text]))]
    theirs = policy.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    ours = [i for i in policy.render(talk)[0] if i != policy.image_pad]
    tokens = policy.tokenizer(theirs, add_special_tokens=False)["input_ids"]
    return ours == [i for i in tokens if i != policy.image_pad] and tokens.count(policy.image_pad) == 2


@contextmanager
def memory_advice(*flags: str):
    """A decorator for a command: out of GPU memory is one message, with what was there and the flags that need less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        held = gc.get_objects()                             # type(): isinstance asks an object, and not all can answer
        weights = [thing for thing in held if issubclass(type(thing), nn.Parameter)]
        moments = [value for thing in held if issubclass(type(thing), torch.optim.Optimizer)
                   for state in thing.state.values() for value in state.values() if torch.is_tensor(value)]
        parts = {"weights": weights, "gradients": [p.grad for p in weights if p.grad is not None], "optimizer": moments}
        sizes = {name: sum(t.nbytes for t in part if t.is_cuda) / 1e9 for name, part in parts.items()}
        total = torch.cuda.memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
        sizes["activations, KV cache and the rest"] = max(0.0, total - sum(sizes.values()))
        raise data.UserError(
            f"out of GPU memory ({reason(error)}). In memory: {total:.2f} GB, of which "
            + ", ".join(f"{name} {size:.2f}" for name, size in sizes.items())
            + f". Less is needed with smaller {', '.join(flags)}") from error


# ------------------------------------------------------------------------------------------------ positions, log-probs

def mrope_positions(ids: np.ndarray, grids: list[tuple[int, int, int]], image_pad: int, merge: int,
                    start: int = 0) -> tuple[np.ndarray, int]:
    """Three-axis rotary positions of a stretch of tokens: ((3, L), the position that comes next).

    Text counts up on all three axes; an image of h x w visual tokens spreads over two of them and moves the count
    on by max(h, w). `grids` are the (t, h, w) patches of the images in this stretch. Equal to `get_rope_index` of
    transformers (a test compares), but it can go on from any turn: pass the returned position as `start`.
    """
    positions, images, i = np.empty((3, len(ids)), np.int64), iter(grids), 0
    while i < len(ids):
        if ids[i] == image_pad:
            _, h, w = next(images)
            h, w = h // merge, w // merge
            y, x = np.divmod(np.arange(h * w), w)
            positions[:, i:i + h * w] = start + np.stack([np.zeros_like(y), y, x])
            i, start = i + h * w, start + max(h, w)
        else:
            stop = i
            while stop < len(ids) and ids[stop] != image_pad:
                stop += 1
            positions[:, i:stop] = start + np.arange(stop - i)
            i, start = stop, start + stop - i
    return positions, start


def sampled_logprobs(policy: Policy, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    """Hidden states (..., D) -> log-probs (..., V) of the distribution that is sampled from: banned tokens out."""
    logits = policy.base.get_output_embeddings()(hidden).float() + policy.banned
    return F.log_softmax(logits / temperature, dim=-1)


def token_logprobs(policy: Policy, episodes: list, temperature: float = 1.0) -> Tensor:
    """Log-probs (B, T) of the sampled tokens under the current weights, 0 where `assistant_mask` is 0.

    Differentiable. The episodes lie end to end in one row, without padding (`packed`); each sees only itself.
    """
    if any(episode.features is None for episode in episodes):
        features = policy.image_features([view for episode in episodes for view in episode.views()])
    else:
        features = [image for episode in episodes for image in episode.features]
    grids = iter([grid for grid, _ in features])
    ids = np.concatenate([episode.token_ids for episode in episodes])[None]                              # (1, N)
    positions = np.concatenate([mrope_positions(episode.token_ids, grids, policy.image_pad, policy.merge)[0]
                                for episode in episodes], 1)[:, None]                                    # (3, 1, N)
    rows = [torch.from_numpy(episode.assistant_mask) for episode in episodes]
    sampled, mask = torch.cat(rows), torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)             # (N,), (B, T)
    ids, positions, sampled, mask = (torch.as_tensor(t).to(policy.device) for t in (ids, positions, sampled, mask))
    hidden = policy.base.model(input_ids=ids, position_ids=positions, use_cache=False,
                               lengths=[len(row) for row in rows], **policy.seen(features)).last_hidden_state[0]
    before = F.pad(sampled[1:], (0, 1))                   # (N,) where it is predicted; an episode begins with a prompt

    def of_chunk(hidden: Tensor, token: Tensor) -> Tensor:
        return sampled_logprobs(policy, hidden, temperature).gather(1, token[:, None])[:, 0]

    # Log-probs of all V tokens exist for LOGIT_ROWS positions at a time only; the backward pass makes them again.
    chosen = torch.cat([checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in zip(
        hidden[before].split(LOGIT_ROWS), ids[0, sampled].split(LOGIT_ROWS))])
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, chosen)


LOGIT_ROWS = 512          # positions; at a vocabulary of 152k, 0.3 GB


def micro_batches(episodes: list, budget: int, even: bool = False) -> list[list]:
    """Splits episodes into as few batches of at most `budget` tokens as will do (one episode always fits), all of
    about the same length. even: an even number of them, unless there are too few episodes: none of two cores waits.
    """
    order = sorted(episodes, key=lambda e: -len(e.token_ids))
    for count in range(1, len(episodes) + 1):
        if even and count % 2 and count < len(episodes):
            continue
        batches: list[list] = [[] for _ in range(count)]
        tokens = [0] * count
        for episode in order:                               # the longest first, each into the emptiest batch
            least = tokens.index(min(tokens))
            batches[least].append(episode)
            tokens[least] += len(episode.token_ids)
        if all(n <= budget or len(batch) == 1 for n, batch in zip(tokens, batches)):
            return batches
    return []


def keep_freed_memory() -> None:
    """Asks glibc to keep the memory of freed tensors; elsewhere it changes nothing.

    By default large blocks go back to the system at once, and the next step asks for them again, page by page: a fifth
    of a training step on two cores. The numbers are M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, see mallopt(3).
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(-3, 1 << 25)
    mallopt(-1, 1 << 30)


def side_by_side(function: Callable, items: list, device: torch.device) -> Iterator:
    """function(item) for each item, in order. On the CPU as many at once as torch has threads, each on one thread:
    tiny operations lose more when they are split than they gain. What is computed does not depend on their number (if
    there is one item only, it gets them all).
    """
    threads = min(len(items), torch.get_num_threads()) if device.type == "cpu" else 1
    if threads <= 1:
        yield from map(function, items)
        return
    yield from _threads(threads).map(function, items)


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Always the same threads: the libraries below torch keep some memory for every one that ever was."""
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


def add_gradients(policy: Policy, loss_of: Callable, batches: list[list]) -> Iterator:
    """Adds the gradients of `loss_of(batch)` to those of the policy: of all batches, in order whichever is first.

    `loss_of` returns (a scalar to minimise, anything else); yields (its value, that) per batch.
    """
    weights = [p for p in policy.model.parameters() if p.requires_grad]
    dropout = any(isinstance(module, nn.Dropout) and module.p for module in policy.model.modules())
    if policy.device.type != "cpu" or dropout:       # in turn: one copy of the gradients, one random generator
        for batch in batches:
            loss, more = loss_of(batch)
            loss.backward()
            yield loss.item(), more
        return

    def one(batch: list):
        loss, more = loss_of(batch)
        return torch.autograd.grad(loss, weights, allow_unused=True), loss.item(), more

    for gradients, value, more in side_by_side(one, batches, policy.device):
        for weight, gradient in zip(weights, gradients):
            if gradient is not None:
                weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
        yield value, more


# ------------------------------------------------------------------------------------------------ the command

@dataclass(frozen=True)
class Config(LoraFlags):
    base: str = "tiny"                 # "tiny", "random:qwen7b" and the like, a Hugging Face id, or a directory
    meta: bool = False                 # count only: no weight is allocated or downloaded
    merge: Path | None = None          # a run with adapters: merges them into their base, and writes that into `out`
    out: Path | None = None            # new directory for `merge`


def nf4_bytes(count: int) -> int:
    """Bytes of a matrix of `count` weights in 4 bits, its constants quantized too (QLoRA, arXiv 2305.14314).

    Half a byte each; one byte per block of 64; four per 256 blocks; an offset and two tables of 16 and 256 floats.
    """
    blocks = -(-count // 64)
    return -(-count // 2) + blocks + 4 * -(-blocks // 256) + 4 * (1 + 16 + 256)


def footprint(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """{part: (parameters, trainable ones, bytes)}, and the sum under "in all"; shared weights count once."""
    four_bits = {id(m.weight): m.in_features * m.out_features for m in model.modules()
                 if hasattr(getattr(m, "weight", None), "quant_type")}
    named = (("adapters", "lora_"), ("vision tower", "visual."), ("embeddings", "embed_tokens"), ("head", "lm_head"),
             ("language model", ""))
    parts: dict[str, tuple[int, int, int]] = {}
    for name, weight in model.named_parameters():
        count = four_bits.get(id(weight), weight.numel())
        size = nf4_bytes(count) if id(weight) in four_bits else weight.nbytes
        row = count, count * weight.requires_grad, size
        for part in (next(part for part, mark in named if mark in name), "in all"):
            parts[part] = tuple(map(sum, zip(parts.get(part, (0, 0, 0)), row)))
    parts["in all"] = parts.pop("in all")                                # comes last
    return parts


def merge(run: Path, out: Path) -> None:
    """Writes the base of an adapter run with the adapters merged in, in the type and layout of the base.

    Configuration, tokenizer and processor files are the base's own, so that a server reads what it knows.
    """
    if not (run / "adapter_config.json").exists():
        raise data.UserError(f"--merge: no adapter in {run}; a run that trained every weight needs no merging")
    if out.exists() and any(out.iterdir()):
        raise data.UserError(f"--out: {out} is not empty")
    policy = load_policy(str(run), device="cpu", dtype="auto")
    name, drawn = policy.name, policy.name.startswith("random:")
    out.mkdir(parents=True, exist_ok=True)
    Policy(policy.model.merge_and_unload(), policy.tokenizer, policy.image_processor, policy.protocol, name).save(out)
    kept = ["*.json", "*.txt", "*.jinja"]
    base = Path(name) if drawn or Path(name).exists() else Path(snapshot_download(name, allow_patterns=kept))
    for file in (file for pattern in kept for file in base.glob(pattern)):
        if file.name != "protocol.json" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)


def main(cfg: Config) -> None:
    if (cfg.merge is None) != (cfg.out is None):
        raise data.UserError("--merge RUN and --out DIR go together")
    if cfg.merge:
        merge(cfg.merge, cfg.out)
        return print(f"{cfg.merge} merged into {cfg.out}")
    policy = load_policy(cfg.base, **policy_flags(cfg) | ({"device": "meta"} if cfg.meta else {}))
    print(f"{'':16s}{'parameters':>16s}{'trainable':>16s}{'bytes':>16s}")
    for name, row in footprint(policy.model).items():
        print(f"{name:16s}" + "".join(f"{value:16,d}" for value in row))
    probe = data.make_probe("attribute", "hard", 0)
    p = policy.protocol
    talk = env.CropEnv(probe.image, probe.question, 6, p.min_pixels, p.max_pixels, None, p.system_prompt).reset()
    ids, _ = policy.render(talk)
    print(f"vocabulary {len(policy.tokenizer)}; a prompt in {len(ids)} tokens:")
    print(" ".join(repr(policy.decode([i])) for i in ids if i != policy.image_pad))


if __name__ == "__main__":
    data.command(main, Config)
