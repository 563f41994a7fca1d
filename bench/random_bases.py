"""Checkpoints of the published shapes with random weights: their memory and speed are those of the real ones.

Nothing is downloaded. The directory holds bfloat16 weights in the Hugging Face layout, a byte tokenizer with
the special tokens at their true ids, and the image processor of the family. `toy` is the same at toy size.

    $ python bench/random_bases.py qwen3b --out runs/bases/qwen3b      # 7.5 GB; qwen7b 16.6
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli

import torch
import transformers
import tyro

from model import IM_END, IM_START, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_PAD, VISION_START, byte_tokenizer

# The numbers: config.json of Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct.
# A test compares the parameter counts with those published.
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
TOWER = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, window_size=112)
TOWER |= dict(patch_size=14, fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2)
NAMES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
NAMES += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
TEXT = {
    "qwen3b": (151_936, 2048, 11_008, 36, 16, 2, 128_000),
    "qwen7b": (152_064, 3584, 18_944, 28, 28, 4, 128_000),
    "toy": (384, 64, 128, 2, 4, 2, 32_768),  # linear layers of bitsandbytes want multiples of 64
}
FIRST_SPECIAL = 151_643  # from there on, in this order: tokenizer_config.json of both
SPECIAL = ["<|endoftext|>", IM_START, IM_END, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"]
SPECIAL += ["<|box_end|>", "<|quad_start|>", "<|quad_end|>", VISION_START, VISION_END, VISION_PAD]
SPECIAL += [IMAGE_PAD, VIDEO_PAD]


@dataclass(frozen=True)
class Config:
    base: tyro.conf.Positional[Literal["qwen3b", "qwen7b", "toy"]]
    out: Path  # a directory
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where the weights are drawn


def make_config(base: str) -> transformers.PreTrainedConfig:
    """The configuration of a base."""
    text = dict(zip(NAMES, TEXT[base])) | {"rms_norm_eps": 1e-6, "rope_parameters": dict(ROPE)}
    vision = dict(TOWER, out_hidden_size=text["hidden_size"])
    first = 320 if base == "toy" else FIRST_SPECIAL
    if base == "toy":
        text["rope_parameters"]["mrope_section"] = [2, 3, 3]
        vision |= dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4, fullatt_block_indexes=[1])
    ids = {token: first + number for number, token in enumerate(SPECIAL)}
    text |= dict(bos_token_id=first, eos_token_id=ids[IM_END], pad_token_id=first)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    named = {name: ids[token] for name, token in zip(names, (VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD))}
    named |= {"tie_word_embeddings": base != "qwen7b"}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **named)


def make_model(config: transformers.PreTrainedConfig, device: str) -> transformers.PreTrainedModel:
    """Random weights in bfloat16, drawn layer by layer. On the meta device nothing is allocated."""
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    if device != "meta":
        for module in model.modules():
            module.to_empty(device=device, recurse=False)
            model._init_weights(module)
        model.tie_weights()
    return model


def make_tokenizer(config: transformers.PreTrainedConfig) -> transformers.PreTrainedTokenizerFast:
    """Bytes; then ids that no text is encoded to; then the special tokens."""
    first = config.image_token_id - SPECIAL.index(IMAGE_PAD)
    return byte_tokenizer([], SPECIAL, fillers=tuple(f"<{i}>" for i in range(256, first)))


def make_image_processor(config: transformers.PreTrainedConfig) -> transformers.BaseImageProcessor:
    """preprocessor_config.json of the family."""
    sizes = {"patch_size": config.vision_config.patch_size, "merge_size": 2, "temporal_patch_size": 2}
    return transformers.Qwen2VLImageProcessorPil(**sizes, min_pixels=3136, max_pixels=12_845_056)


def save_base(base: str, out: Path, device: str) -> None:
    """Writes the checkpoint; the same weights at every call on one kind of device."""
    torch.manual_seed(0)
    config = make_config(base)
    for part in (make_tokenizer(config), make_image_processor(config), make_model(config, device)):
        part.save_pretrained(out)


def main(cfg: Config) -> None:
    save_base(cfg.base, cfg.out, cfg.device)
    print(f"{cfg.out}: {sum(file.stat().st_size for file in cfg.out.iterdir()) / 1e9:.2f} GB")


if __name__ == "__main__":
    cli(main, Config)
