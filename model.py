"""The policy: a vision-language model, its tokens, its positions, and the log-probs that are trained.

Two policies, one code path. "tiny" is the real Qwen2.5-VL classes of transformers at toy size (about 1 M
parameters), from random weights, with a tokenizer built here. Any other name is a Hugging Face id or a
directory of the Qwen2.5-VL or Qwen3-VL family, loaded with LoRA or QLoRA adapters from peft. Both are saved
in the Hugging Face layout.

Three rules keep a multi-turn conversation exact (measured in transformers 5.23: docs/differences.md):
  1. Token ids from the sampler are the record: nothing is decoded and tokenised again.
  2. Positions are always explicit, (3, B, T): time, height and width. A forward that infers them can be
     silently wrong as soon as there is a cache or a second image.
  3. Text from the outside (questions, model output, error messages) is encoded with special tokens disabled,
     and special tokens other than end-of-turn are never sampled.

    Q questions, G rollouts per question, B = Q * G rollouts, T tokens, N tokens of B rollouts, V vocabulary

    $ python model.py --base tiny          # what is in it: parameters by part, an example prompt in tokens

Read next: rollout.py.
"""

import functools
import inspect
import itertools
import json
import math
import os
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

from common import UserError, cli

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import env
from data import COLORS, SHAPES, cell_box, cell_name, make_probe, region_name

IM_START, IM_END, IMAGE_PAD = "<|im_start|>", "<|im_end|>", "<|image_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
VISION_PAD, VIDEO_PAD, END_OF_TEXT = "<|vision_pad|>", "<|video_pad|>", "<|endoftext|>"
SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END, VISION_START, VISION_END, VISION_PAD, IMAGE_PAD, VIDEO_PAD]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The linear layers of the language model, never those of the vision tower.
LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
LOGIT_ROWS = 512  # positions whose log-probs of all V tokens exist at once; 0.3 GB at a vocabulary of 152k


@dataclass
class Protocol:
    """How to speak with a policy: the wording of env.CropEnv and the sizes of its views, width * height."""

    system_prompt: str = env.SYSTEM_PROMPT
    observation_prompt: str = env.OBSERVATION_PROMPT
    error_prompt: str = env.ERROR_PROMPT
    min_pixels: int = 40_000
    max_pixels: int = 2_000_000
    before_question: str = "\n"  # between the first view and the question

    def make_env(self, probe, max_turns: int, max_images: int | None = None, env_class=env.CropEnv):
        """The environment of one episode on this probe, in this wording. env_class: CropEnv or a subclass."""
        options = asdict(self)
        question = options.pop("before_question") + probe.prompt()
        return env_class(probe.open(), question, max_turns, max_images=max_images, **options)


# ---------------------------------------------------------------------------------------- the tiny policy

TINY_PROTOCOL = Protocol("Search the picture.", "Observation {label}:", "That failed.", 48 * 48, 48 * 48, "")


def byte_tokenizer(
    phrases: list[str], special: list[str], fillers: tuple[str, ...] = ()
) -> transformers.PreTrainedTokenizerFast:
    """Ids in this order: the 256 bytes, fillers (which no text is encoded to), phrases, special tokens."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *fillers]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        additional_special_tokens=[t for t in special if t not in (IM_END, END_OF_TEXT)],
        clean_up_tokenization_spaces=False,
        model_max_length=32_768,
    )


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Bytes, plus one token for each phrase of the tiny policy's small world. Any text can be encoded.

    The phrases are those of data.py's questions and searches and of TINY_PROTOCOL, split at `|`.
    """
    boxes = [cell_box((x, 0), size) for size in (3, 6) for x in range(size)]
    coordinates = sorted({str(v) for box in boxes for v in box})
    wording = """system\\n|user\\n|assistant\\n|Search the picture.|Observation |That failed.|
What color is the tag with |the | and |What number is on sign |What number is left of the |
<think>|</think>|<answer>|</answer>|<grounding>{"bbox_2d": [|], "source": "original_image"}</grounding>|
], "source": "|"}</grounding>|<think>want |, want |: see |nothing|
, yes|, no|, read |<think>plates|<think>try|<think>regions|<think>in|: plates|, next|, then|, after|, leave|
, try|, guess|, on it: |, """
    phrases = [phrase.replace("\\n", "\n") for phrase in wording.replace("|\n", "|").split("|")]
    phrases += [*SHAPES, *COLORS, *coordinates, *(f"{c}, " for c in coordinates)]
    # A label is one token and the name of an observation another, so that a source is easy to copy.
    phrases += [*map(str, range(10, 48)), *map(env.source_name, range(1, 48))]
    phrases += [f" {cell_name((x, y))}" for y in range(6) for x in range(6)]
    phrases += [f" {region_name((x, y))}" for y in range(3) for x in range(3)]
    return byte_tokenizer(phrases, SPECIAL_TOKENS)


def tiny_model(tokenizer, width: int = 128, layers: int = 3, vision_width: int = 96, vision_layers: int = 2):
    """Qwen2_5_VLForConditionalGeneration at toy size, random weights from torch's generator."""
    end = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [0, 2, 14]}
    text = dict(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers)
    text |= dict(num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope, tie_word_embeddings=True)
    text |= dict(vocab_size=len(tokenizer), max_position_embeddings=32_768, bos_token_id=None, **end)
    vision = dict(hidden_size=vision_width, intermediate_size=3 * vision_width, num_heads=vision_width // 16)
    vision |= dict(patch_size=8, spatial_merge_size=2, temporal_patch_size=1, window_size=64)
    vision |= dict(depth=vision_layers, out_hidden_size=width)
    vision["fullatt_block_indexes"] = list(range(vision_layers))
    text["initializer_range"] = vision["initializer_range"] = 0.05
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids([IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END])))
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **ids, **end
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    # Queries start equal to keys, so that every head first attends to what looks alike ("mimetic
    # initialization", Trockman and Kolter 2023). Without it, "is the thing seen the thing wanted?" stays a
    # coin flip for 300 steps.
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            key = layer.self_attn.k_proj.weight.mul_(1.2).view(2, -1, width)  # (kv heads, D, width)
            layer.self_attn.q_proj.weight.copy_(key.repeat_interleave(2, 0).view(-1, width))
        # Two heads of the first layer start at the token before and the one before that: to copy what
        # followed something, heads have to know what came before (induction heads, Olsson et al. 2022).
        first, half = model.model.language_model.layers[0].self_attn, width // 8  # D / 2
        turn = 10_000.0 ** -(torch.arange(half) / half)  # (D / 2,) angle of a rotary pair per position
        first.k_proj.weight[: 2 * half] = first.q_proj.weight[: 4 * half] = 0.0
        first.k_proj.bias[: 2 * half] = 6.0 * torch.cat([turn.cos(), turn.sin()])
        before = torch.cat([torch.ones(half), torch.zeros(half), turn.cos(), -turn.sin()])
        first.q_proj.bias[: 4 * half] = 6.0 * before
    return model


# ---------------------------------------------------------------------------------------------- attention


def attend_in_windows(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **_):
    """The tower's attention, all windows of equal length in one call: (1, H, N, D) -> (1, N, H, D).

    transformers loops over windows in Python: thousands of small calls for one large photograph.
    """
    lengths = torch.diff(cu_seq_lens_q).tolist()
    pieces = [t[0].transpose(0, 1).split(lengths) for t in (query, key, value)]  # (length, H, D) each
    outputs: list = [None] * len(lengths)
    for length in set(lengths):
        at = [i for i, other in enumerate(lengths) if other == length]
        q, k, v = (torch.stack([windows[i] for i in at]).transpose(1, 2) for windows in pieces)
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling)  # (windows, H, length, D)
        for i, window in zip(at, out.transpose(1, 2)):
            outputs[i] = window
    return torch.cat(outputs)[None], None


def attend_in_episodes(
    module, query, key, value, attention_mask, lengths=None, scaling=None, dropout=0.0, **more
):
    """The language model's attention: transformers' own, or causal inside each of the episodes end to end.

    lengths: tokens of each episode; neighbours of equal length go into one call. (1, H, N, D), keys and
    values with fewer heads, -> (1, N, H, D). Padding instead of packing makes a search step 27 % slower on
    the CPU.
    """
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
    runs = [(length, len(list(same))) for length, same in itertools.groupby(lengths)]
    pieces = (t[0].split([length * count for length, count in runs], 1) for t in (query, key, value))
    outputs = []
    for (length, count), *parts in zip(runs, *pieces):
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in parts)
        # (count, H, length, D)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (count * length, H, D)
    return torch.cat(outputs)[None], None


# The tower passes the borders of its windows only to an attention with "flash" in its name.
OUR_ATTENTION = {"vision_config": "flash_in_windows", "text_config": "in_episodes"}
AttentionInterface.register("flash_in_windows", attend_in_windows)
AttentionInterface.register("in_episodes", attend_in_episodes)
AttentionMaskInterface.register("in_episodes", sdpa_mask)  # else it would run without any mask
transformers.utils.logging.disable_progress_bar()  # of loading and saving: ours are enough


# ---------------------------------------------------------------------------------------------- the policy

Grid = tuple[int, int, int]  # patches of a view: time, height, width


@dataclass
class Policy:
    """A model with its tokenizer, image processor and protocol. Log-probs: below. Sampling: rollout.py."""

    model: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    image_processor: transformers.BaseImageProcessor
    protocol: Protocol
    name: str

    def __post_init__(self):
        adapted = hasattr(self.model, "peft_config")
        self.base = self.model.get_base_model() if adapted else self.model
        config = self.base.config
        self.merge = config.vision_config.spatial_merge_size
        self.image_pad = config.image_token_id
        self.im_start, self.im_end, self.vision_start, self.vision_end = self.tokenizer.convert_tokens_to_ids(
            [IM_START, IM_END, VISION_START, VISION_END]
        )
        vocabulary = config.text_config.vocab_size  # rows of lm_head, padding included
        banned = [i for i in self.tokenizer.all_special_ids if i != self.im_end]
        banned += range(len(self.tokenizer), vocabulary)
        self.banned = torch.zeros(vocabulary, device=self.device)  # (V,) added to every logit
        self.banned[torch.tensor(banned, device=self.device)] = -math.inf
        self.encode = functools.lru_cache(10_000)(self.encode)  # the same few strings come at every turn
        self.decode_token = functools.lru_cache(None)(lambda token: self.decode([token]))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def render(
        self, messages: list[dict], before: tuple[int | str, ...] = ()
    ) -> tuple[list[int], list[Image.Image]]:
        """Chat messages -> (token ids with one `<|image_pad|>` per visual token, the views in order).

        Control tokens are written here and only here. An assistant turn is open at the end. before: ids and
        text that close the turn before. The layout is that of the checkpoint's ChatML template (a test
        compares).
        """
        parts, views = list(before), []
        for message in messages:
            parts += [self.im_start, f"{message['role']}\n"]
            for part in message["content"]:
                if part["type"] == "text":
                    parts.append(part["text"])
                else:
                    views.append(part["image"])
                    pads = [self.image_pad] * self.count_visual_tokens(part["image"])
                    parts += [self.vision_start, *pads, self.vision_end]
            parts += [self.im_end, "\n"]
        ids: list[int] = []
        # Neighbouring strings are joined before they are encoded, as a template would.
        parts += [self.im_start, "assistant\n"]
        for is_text, run in itertools.groupby(parts, lambda part: isinstance(part, str)):
            neighbours = list(run)
            ids += self.encode("".join(neighbours)) if is_text else neighbours
        return ids, views

    def encode(self, text: str) -> tuple[int, ...]:
        """Text -> ids; "<|im_end|>" in the text becomes ordinary characters, never the control token."""
        if not text:
            return ()
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def decode(self, ids) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def count_visual_tokens(self, view: Image.Image) -> int:
        return self.image_processor.get_number_of_image_patches(view.height, view.width) // self.merge**2

    def process_views(self, views: list[Image.Image]) -> dict[str, Tensor]:
        """Views -> {"pixel_values": (patches, values), "image_grid_thw": (images, 3)}."""
        batch = self.image_processor(images=views, return_tensors="pt")
        pixels = batch["pixel_values"].to(self.device, self.base.dtype)
        return {"pixel_values": pixels, "image_grid_thw": batch["image_grid_thw"].to(self.device)}

    def encode_views(self, views: list[Image.Image]) -> list[tuple[Grid, Tensor]]:
        """Views -> per view its grid of patches (t, h, w) and its visual features (tokens, (1 + L) D).

        These are what the vision tower gives the language model: D values for its input, and D more for
        each of L layers where the family adds some there (deepstack of Qwen3-VL; L = 0 for Qwen2.5-VL).
        """
        if not views:
            return []
        pixels = self.process_views(views)
        output = self.base.model.get_image_features(**pixels, return_dict=True)
        layers = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
        joint = torch.cat([torch.cat(tuple(images)) for images in layers], -1)  # (tokens of all, (1 + L) D)
        grids = [tuple(grid) for grid in pixels["image_grid_thw"].tolist()]
        counts = [math.prod(grid) // self.merge**2 for grid in grids]
        return list(zip(grids, joint.split(counts)))

    def image_kwargs(self, features: list[tuple[Grid, Tensor]]) -> dict:
        """Arguments of the model that put the features of all images of a batch at their tokens, in order."""
        if not features:
            return {}
        joint = torch.cat([tokens.to(self.device) for _, tokens in features])
        first, *more = joint.split(self.base.config.text_config.hidden_size, -1)
        output = SimpleNamespace(pooler_output=[first], deepstack_features=[[part] for part in more])
        return {"mm_encoder_outputs": {"image": output}}

    def save(self, directory: Path) -> None:
        """Writes model (or adapter), tokenizer, image processor and protocol in the Hugging Face layout.

        Everything goes to a folder inside first, then file by file in place of the last save.
        """
        partial = Path(directory) / ".partial"
        for part in (self.model, self.tokenizer, self.image_processor):
            part.save_pretrained(partial)
        (partial / "protocol.json").write_text(json.dumps(asdict(self.protocol), indent=1))
        for file in partial.iterdir():
            os.replace(file, Path(directory) / file.name)
        partial.rmdir()


def load_policy(
    name: str,
    *,
    adapter: str | None = None,
    quantize: str | None = None,
    lora_rank: int = 0,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    **wording,
) -> Policy:
    """Loads a policy, ready to sample and to train.

    name: "tiny" (random weights from torch's generator), a Hugging Face id of the Qwen2.5-VL or Qwen3-VL
    family, or a directory: a checkpoint, or a run of ours, adapter runs included. adapter: a peft directory
    to put on top. quantize: "nf4" loads the language model in 4 bits (bitsandbytes). lora_rank: adds fresh
    LoRA adapters to the language model, unless there is an adapter, and freezes all else; 0 trains every
    weight. wording: see change_protocol; it replaces what the policy was saved with. device: default cuda
    if there is one. dtype: default bfloat16 on cuda for checkpoints above 1 GB, else float32. UserError
    when there is nothing to load.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    protocol = Protocol()
    if name == "tiny":
        if lora_rank or quantize:
            raise UserError("tiny has random weights: adapters and 4 bits need a saved base, say runs/sft")
        tokenizer, protocol = tiny_tokenizer(), TINY_PROTOCOL
        sizes = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 1}
        processor = transformers.Qwen2VLImageProcessorPil(**sizes, min_pixels=16 * 16, max_pixels=1024 * 1024)
        model = tiny_model(tokenizer).to(device, dtype or torch.float32)
        model.set_attn_implementation(OUR_ATTENTION)
    else:
        adapter_config = Path(name) / "adapter_config.json"
        if adapter_config.exists():
            adapter, name = name, json.loads(adapter_config.read_text())["base_model_name_or_path"]
        for place in filter(None, (adapter, name)):
            if (Path(place) / "protocol.json").exists():
                protocol = Protocol(**json.loads((Path(place) / "protocol.json").read_text()))
                break
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(name)
            model = load_weights(name, quantize, device, dtype)
            model.set_attn_implementation(OUR_ATTENTION)
            model = add_adapters(model, adapter, lora_rank) if adapter or lora_rank else model
        except UserError:
            raise
        except (OSError, ValueError, UserWarning) as error:  # what transformers and peft raise, and warn of
            raise UserError(f"cannot load {name}: {(str(error) or repr(error)).splitlines()[0]}") from error
    return Policy(model, tokenizer, processor, change_protocol(protocol, wording), name)


def change_protocol(protocol: Protocol, wording: dict) -> Protocol:
    """The protocol with other prompts (paths of text files) and view sizes, where they are not None."""
    changes = {
        key: read_prompt(v) if isinstance(v, Path) else v for key, v in wording.items() if v is not None
    }
    protocol = replace(protocol, **changes)
    if not 1 <= protocol.min_pixels <= protocol.max_pixels:
        raise UserError(
            f"need 1 <= --min_pixels ({protocol.min_pixels}) <= --max_pixels ({protocol.max_pixels})"
        )
    return protocol


def load_weights(
    name: str, quantize: str | None, device: torch.device, dtype: torch.dtype | None
) -> nn.Module:
    """The model of a checkpoint. UserError if it lacks weights: transformers would go on with random ones."""
    size = sum(file.stat().st_size for file in Path(name).glob("*.safetensors"))
    small = 0 < size < 1e9  # 0: a Hugging Face id, which is not small
    dtype = dtype or (torch.float32 if device.type == "cpu" or small else torch.bfloat16)
    options = {}
    if quantize:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantize,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["model.visual", "lm_head"],
        )
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        name, device_map={"": device}, output_loading_info=True, dtype=dtype, **options
    )
    if report["missing_keys"]:
        raise UserError(f"cannot load {name}: it lacks {min(report['missing_keys'])}")
    for layer in model.modules():
        # On processors with AVX512-BF16, bitsandbytes packs 4-bit weights at the first rollout, for a kernel
        # that has no gradient: training would stop, or go on without one.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def read_prompt(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as UTF-8 text ({error})") from None


def add_adapters(model: nn.Module, adapter: str | None, rank: int) -> nn.Module:
    """Puts LoRA adapters on the language model, saved or fresh, and freezes all else.

    No dropout: log-probs in training have to be those of sampling.
    """
    import peft  # here only: it imports bitsandbytes, which takes seconds

    if not adapter:
        model.requires_grad_(False)
        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"
        )
        return peft.get_peft_model(model, config)
    config = peft.PeftConfig.from_pretrained(adapter)
    config.lora_dropout = 0.0
    with warnings.catch_warnings():  # an adapter for other layers: peft would warn and go on without it
        warnings.filterwarnings("error", "Found missing adapter keys")
        return peft.PeftModel.from_pretrained(model, adapter, config=config, is_trainable=True)


@dataclass(frozen=True)
class PolicyFlags:
    """What the Config of each script that loads a policy begins with."""

    device: str | None = None  # default: cuda if there is one
    quantize: str | None = None  # "nf4": the language model in 4 bits
    system_prompt: Path | None = None  # text file with another wording; default: the policy's own
    observation_prompt: Path | None = None  # of a view; {label} {action} {image} are filled in
    error_prompt: Path | None = None  # likewise, after a failed action; {error} is filled in
    min_pixels: int | None = None  # of a view, width * height; default: the policy's own
    max_pixels: int | None = None  # likewise


def policy_flags(cfg) -> dict:
    """The fields of a script's Config that load_policy takes."""
    names = inspect.signature(load_policy).parameters
    return {name: getattr(cfg, name) for name in names if hasattr(cfg, name)} | wording_flags(cfg)


def wording_flags(cfg) -> dict:
    """The fields of a script's Config that change the protocol."""
    return {name: getattr(cfg, name) for name in Protocol.__dataclass_fields__ if hasattr(cfg, name)}


# ---------------------------------------------------------------------------------------------- log-probs


def mrope_positions(
    ids: np.ndarray, grids: list[Grid], image_pad: int, merge: int, start: int = 0
) -> tuple[np.ndarray, int]:
    """Three-axis rotary positions of a stretch of tokens: ((3, L), the position that comes next).

    Text counts up on all three axes; an image of h x w visual tokens spreads over two of them and moves the
    count on by max(h, w). grids: the patches (t, h, w) of the images in this stretch. Equal to
    `get_rope_index` of transformers (a test compares), but it can go on from any turn: pass the returned
    position as `start`.
    """
    positions, images, i = np.empty((3, len(ids)), np.int64), iter(grids), 0
    while i < len(ids):
        if ids[i] == image_pad:
            _, h, w = next(images)
            h, w = h // merge, w // merge
            y, x = np.divmod(np.arange(h * w), w)
            positions[:, i : i + h * w] = start + np.stack([np.zeros_like(y), y, x])
            i, start = i + h * w, start + max(h, w)
        else:
            stop = i
            while stop < len(ids) and ids[stop] != image_pad:
                stop += 1
            positions[:, i:stop] = start + np.arange(stop - i)
            i, start = stop, start + stop - i
    return positions, start


def vocabulary_logprobs(policy: Policy, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    """Hidden states (..., D) -> log-probs (..., V) of what is sampled from: banned tokens are out."""
    logits = policy.base.get_output_embeddings()(hidden).float() + policy.banned
    return F.log_softmax(logits / temperature, dim=-1)


def token_logprobs(policy: Policy, episodes: list, temperature: float = 1.0) -> Tensor:
    """Log-probs (B, T) of the sampled tokens under the current weights, 0 where `assistant_mask` is 0.

    Differentiable. The episodes lie end to end in one row, without padding; each attends only to itself.
    """
    features = [image for episode in episodes for image in episode.features or ()]
    if not features:
        features = policy.encode_views([view for episode in episodes for view in episode.views()])
    grids = iter([grid for grid, _ in features])
    ids = np.concatenate([episode.token_ids for episode in episodes])[None]  # (1, N)
    positions = [mrope_positions(e.token_ids, grids, policy.image_pad, policy.merge)[0] for e in episodes]
    positions = np.concatenate(positions, 1)[:, None]  # (3, 1, N)
    rows = [torch.from_numpy(episode.assistant_mask) for episode in episodes]
    sampled, mask = torch.cat(rows), nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (N,), (B, T)
    arrays = ids, positions, sampled, mask
    ids, positions, sampled, mask = (torch.as_tensor(array).to(policy.device) for array in arrays)
    hidden = policy.base.model(
        input_ids=ids,
        position_ids=positions,
        use_cache=False,
        lengths=[len(row) for row in rows],
        **policy.image_kwargs(features),
    ).last_hidden_state[0]
    before = F.pad(sampled[1:], (0, 1))  # (N,) the position before each sampled token predicts it

    def chunk_logprobs(hidden: Tensor, token: Tensor) -> Tensor:
        return vocabulary_logprobs(policy, hidden, temperature).gather(1, token[:, None])[:, 0]

    # Log-probs of all V tokens exist for LOGIT_ROWS positions at a time; the backward pass makes them again.
    chunks = zip(hidden[before].split(LOGIT_ROWS), ids[0, sampled].split(LOGIT_ROWS))
    options = {"use_reentrant": False, "preserve_rng_state": False}
    chosen = torch.cat([checkpoint(chunk_logprobs, *chunk, **options) for chunk in chunks])
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, chosen)


def micro_batches(episodes: list, budget: int) -> list[list]:
    """Splits episodes into as few batches of at most `budget` tokens as will do, all of about equal length.

    One episode always fits.
    """
    order = sorted(episodes, key=lambda e: -len(e.token_ids))
    for count in range(1, len(episodes) + 1):
        batches: list[list] = [[] for _ in range(count)]
        tokens = [0] * count
        for episode in order:  # the longest first, each into the emptiest batch
            least = tokens.index(min(tokens))
            batches[least].append(episode)
            tokens[least] += len(episode.token_ids)
        if all(n <= budget or len(batch) == 1 for n, batch in zip(tokens, batches)):
            return batches
    return []


# ---------------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class Config:
    base: str = "tiny"  # "tiny", a Hugging Face id, or a directory
    lora_rank: int = 0  # adapters of this rank on the language model


def main(cfg: Config) -> None:
    policy = load_policy(cfg.base, **policy_flags(cfg))
    parts = {"vision tower": policy.base.model.visual, "language model": policy.base.model.language_model}
    for name, part in {**parts, "in all": policy.model}.items():
        weights = list(part.parameters())
        count, trainable = (sum(w.numel() for w in weights if w.requires_grad >= only) for only in (0, 1))
        print(f"{name:16s}{count:16,d} parameters{trainable:16,d} trainable")
    ids, _ = policy.render(policy.protocol.make_env(make_probe("attribute", "hard", 0), max_turns=6).reset())
    print(f"vocabulary {len(policy.tokenizer)}; a prompt in {len(ids)} tokens:")
    print(" ".join(repr(policy.decode_token(i)) for i in ids if i != policy.image_pad))


if __name__ == "__main__":
    cli(main, Config)
