"""Shared by all tests: no network, few threads, small policies with random weights, a chat server, a runner.

More drawn messages: python -m pytest --examples 100000.
"""

import importlib
import io
import json
import os
import signal
import sys
import threading
from contextlib import ExitStack, closing, redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# Offline, a missing directory fails at once, not after a look-up.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common

import huggingface_hub.utils._http
import numpy as np
import pytest
import torch
import transformers
from hypothesis import settings
from PIL import Image

import model
from data import Probe
from model import Policy, Protocol, load_policy, tiny_tokenizer

torch.set_num_threads(min(2, torch.get_num_threads()))  # toy sizes gain nothing from more
settings.register_profile("repeatable", deadline=None, derandomize=True)  # the same examples each run
settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption("--examples", type=int, default=3_000, help="messages to draw in tests of the protocol")


@pytest.fixture(autouse=True)
def old_handlers():
    """The training scripts take over Ctrl-C and SIGTERM: give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------- policies

RAGGED = Protocol("Search the picture.", "Observation {label}:", "That failed: {error}", 32 * 32, 96 * 96)


def with_protocol(policy: Policy, protocol: Protocol) -> Policy:
    """The same weights, spoken to in another way."""
    return Policy(policy.model, policy.tokenizer, policy.image_processor, protocol, policy.name)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coarse random pixels: every crop looks different."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3))
    return Image.fromarray(np.uint8(small)).resize((width, height), Image.Resampling.NEAREST)


def noise_probes(*sizes: tuple[int, int]) -> list[Probe]:
    pictures = [noise(*size, seed=i) for i, size in enumerate(sizes)]
    return [Probe(image, f"What number is on sign {'AHK'[i % 3]}?", "4") for i, image in enumerate(pictures)]


@pytest.fixture(scope="session")
def policy() -> Policy:
    """The tiny policy with random weights; its views are all of one size."""
    torch.manual_seed(0)
    return load_policy("tiny", device="cpu")


@pytest.fixture(scope="session")
def ragged(policy) -> Policy:
    """The tiny policy, shown views of 4 to 36 visual tokens in any shape."""
    return with_protocol(policy, RAGGED)


def write_base(directory: Path, family: str, patch_size: int, rope: dict, **vision) -> str:
    """A checkpoint with random weights: two layers, a vocabulary padded as that of a published one.

    Every linear layer reads a multiple of 64 values, the block of bitsandbytes' 4 bits.
    """
    tokenizer = tiny_tokenizer()
    small = {"hidden_size": 64, "intermediate_size": 128}
    frames = {"patch_size": patch_size, "temporal_patch_size": 2}
    rope |= {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    text = small | {"vocab_size": len(tokenizer) + 28, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 32_768}
    text |= {"rope_parameters": rope, "initializer_range": 0.2, "bos_token_id": None}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision |= small | frames | {"depth": 3, "num_heads": 4, "spatial_merge_size": 2}
    vision |= {"out_hidden_size": 64, "initializer_range": 0.1}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = [model.IMAGE_PAD, model.VIDEO_PAD, model.VISION_START, model.VISION_END]
    ids = tokenizer.convert_tokens_to_ids(tokens)
    processor = transformers.Qwen2VLImageProcessorPil(**frames, merge_size=2, max_pixels=12_845_056)
    config = {"text_config": text, "vision_config": vision, **dict(zip(names, ids))}
    config = getattr(transformers, f"{family}Config")(**config)
    network = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    for part in (network, tokenizer, processor):
        part.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def qwen25_dir(tmp_path_factory) -> str:
    """A toy checkpoint of the Qwen2.5-VL family: windows, patches of 14 pixels, two frames."""
    torch.manual_seed(1)
    vision = {"window_size": 112, "fullatt_block_indexes": [2]}
    return write_base(tmp_path_factory.mktemp("qwen25"), "Qwen2_5_VL", 14, {}, **vision)


@pytest.fixture(scope="session")
def qwen3_dir(tmp_path_factory) -> str:
    """The same for Qwen3-VL: patches of 16 pixels, visual features added to several layers."""
    torch.manual_seed(2)
    vision = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    return write_base(tmp_path_factory.mktemp("qwen3"), "Qwen3VL", 16, {"mrope_interleaved": True}, **vision)


# ---------------------------------------------------------------------------------------------- a server


class ChatServer:
    """A real HTTP server on this machine that speaks the chat API.

    reply(body) is a text, or (status, content). bodies, headers: what was asked, (path, headers) of each.
    """

    def __init__(self, reply):
        self.bodies, self.headers = [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                outer.headers.append((self.path, dict(self.headers)))
                said = reply(body)
                message = {"role": "assistant", "content": said}
                whole = {"choices": [{"message": message, "finish_reason": "stop"}]}
                status, content = said if isinstance(said, tuple) else (200, whole)
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

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve(monkeypatch):
    """serve(reply) starts a ChatServer; pauses between attempts take no time.

    HF_HUB_OFFLINE forbids huggingface_hub, whose client endpoint.py uses, every request, also to this server.
    """
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)
    with ExitStack() as servers:
        yield lambda reply: servers.enter_context(closing(ChatServer(reply)))


# ---------------------------------------------------------------------------------------------- runs


def run_main(monkeypatch, script_name: str, *args) -> tuple[int, list[str], list[str]]:
    """`python script_name args` in this process: (exit code, lines of stdout, lines of stderr)."""
    module = importlib.import_module(script_name.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
    code, out, err = 0, io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            common.cli(module.main, module.Config, getattr(module, "PRESETS", None))
        except SystemExit as stop:
            code = stop.code or 0
    return code, out.getvalue().splitlines(), err.getvalue().splitlines()


def read_lines(out) -> list[dict]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def read_cards(page) -> list[dict]:
    """The episodes in a page that write_page wrote."""
    return json.loads(Path(page).read_text().partition('id="episodes">')[2].partition("</script>")[0])


def without_times(rows: list[dict]) -> list[dict]:
    """Rows of metrics without what differs from run to run."""
    timed = ("time/", "tokens_per_second", "memory_gb")
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in rows]


def load_weights_of(out) -> dict[str, torch.Tensor]:
    """The trained weights in state.pt."""
    return torch.load(Path(out) / "state.pt", weights_only=True)["weights"]


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
