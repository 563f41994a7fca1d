"""Shared by all tests: the repository on the path, no network, few threads, and small policies with random weights."""
import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")            # a missing directory fails at once, not after a look-up
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pytest
import torch
import transformers
from hypothesis import settings
from PIL import Image

import data
import model as model_module
from model import Policy, Protocol, load_policy

torch.set_num_threads(min(2, torch.get_num_threads()))    # toy sizes gain nothing from more
transformers.utils.logging.disable_progress_bar()
settings.register_profile("repeatable", deadline=None, derandomize=True)   # same examples each run, nothing on disk
settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption("--examples", type=int, default=10_000, help="messages that test_hostile.py draws")


@pytest.fixture(autouse=True)
def old_handlers():
    """main takes over Ctrl-C and SIGTERM: give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


RAGGED = Protocol("Search the picture.", "Observation {label}:", "That failed: {error}", 32 * 32, 96 * 96)


def with_protocol(policy: Policy, protocol: Protocol) -> Policy:
    """The same weights, spoken to in another way."""
    return Policy(policy.model, policy.tokenizer, policy.image_processor, protocol, policy.name)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coarse random pixels: every crop looks different."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def noise_probes(*sizes: tuple[int, int]) -> list[data.Probe]:
    return [data.Probe(noise(*size, seed=i), f"What number is on sign {'AHK'[i % 3]}?", "4")
            for i, size in enumerate(sizes)]


@pytest.fixture(scope="session")
def policy() -> Policy:
    """The tiny policy with random weights; its views are all of one size."""
    torch.manual_seed(0)
    return load_policy("tiny", device="cpu")


@pytest.fixture(scope="session")
def ragged(policy) -> Policy:
    """The tiny policy, shown views of 4 to 36 visual tokens in any shape."""
    return with_protocol(policy, RAGGED)


class ChatServer:
    """A real HTTP server on this machine that speaks the chat API: `reply(body)` is a text, or (status, content)."""

    def __init__(self, reply):
        self.bodies, self.headers = [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                outer.headers.append((self.path, dict(self.headers)))
                said = reply(body)
                status, content = said if isinstance(said, tuple) else (200, {
                    "choices": [{"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}]})
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", f"{outer.url}/elsewhere")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def serve(monkeypatch):
    """serve(reply) starts a ChatServer; pauses between attempts take no time."""
    servers = []
    monkeypatch.setattr(data.time, "sleep", lambda _: None)

    def start(reply) -> ChatServer:
        servers.append(ChatServer(reply))
        return servers[-1]

    yield start
    for one in servers:
        one.server.shutdown()
        one.server.server_close()


def special_ids(tokenizer) -> dict[str, int]:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
             "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def text_config(tokenizer, **more) -> dict:
    """A language model of two small layers, its vocabulary padded as those of the published checkpoints are."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3], **more.pop("rope", {})}
    return dict(vocab_size=len(tokenizer) + 28, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=32_768,
                rope_parameters=rope, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id, **more)


def _write_checkpoint(directory: Path, network, tokenizer, patch_size: int) -> str:
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    transformers.Qwen2VLImageProcessorPil(
        patch_size=patch_size, merge_size=2, temporal_patch_size=2, min_pixels=56 * 56, max_pixels=12_845_056,
    ).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def qwen25_dir(tmp_path_factory) -> str:
    """A checkpoint directory laid out like Qwen2.5-VL's (windows, patches of 14 pixels, two frames), random weights."""
    torch.manual_seed(1)
    tokenizer = model_module.tiny_tokenizer()
    config = transformers.Qwen2_5_VLConfig(
        text_config=text_config(tokenizer),
        vision_config=dict(depth=3, hidden_size=64, intermediate_size=96, num_heads=4, patch_size=14, temporal_patch_size=2,
                           spatial_merge_size=2, window_size=112, out_hidden_size=64, fullatt_block_indexes=[2],
                           initializer_range=0.1),
        **special_ids(tokenizer))
    network = transformers.Qwen2_5_VLForConditionalGeneration(config)
    return _write_checkpoint(tmp_path_factory.mktemp("qwen25"), network, tokenizer, 14)


@pytest.fixture(scope="session")
def qwen3_dir(tmp_path_factory) -> str:
    """The same for Qwen3-VL (patches of 16 pixels, visual features added to several layers)."""
    torch.manual_seed(2)
    tokenizer = model_module.tiny_tokenizer()
    config = transformers.Qwen3VLConfig(
        text_config=text_config(tokenizer, head_dim=16, rope={"mrope_interleaved": True}),
        vision_config=dict(depth=3, hidden_size=64, intermediate_size=96, num_heads=4, patch_size=16, temporal_patch_size=2,
                           spatial_merge_size=2, out_hidden_size=64, deepstack_visual_indexes=[0, 1],
                           num_position_embeddings=64, initializer_range=0.1),
        **special_ids(tokenizer))
    network = transformers.Qwen3VLForConditionalGeneration(config)
    return _write_checkpoint(tmp_path_factory.mktemp("qwen3"), network, tokenizer, 16)
