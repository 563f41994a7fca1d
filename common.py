"""What every script shares: the command line, run directories (open, log, save, load), atomic writes.

A run directory holds the policy in the Hugging Face layout (config.json, model.safetensors or a PEFT
adapter, tokenizer, image processor), protocol.json (wording and view sizes), run.json (configuration, commit,
versions), metrics.jsonl (one line per step), and state.pt, from which `--resume` goes on exactly.
"""

import os

# Threads of OpenMP spin while they wait for each other, so beside another busy process a step used to take
# 8 to 40 times as long. With a short spin they go to sleep instead (figures: docs/results.md).
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import json
import platform
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import filelock
import torch
import transformers
import tyro
from torch import Tensor
from tqdm import tqdm

from env import ImageError


class UserError(ValueError):
    """Bad input from the user. Printed as one line, without a traceback; the exit code is 2."""


def cli(main: Callable, config: type, presets: dict | None = None) -> None:
    """Runs a script: command line -> Config -> main(config).

    presets: {name: Config}. A preset's name as the first word takes its values as the defaults.
    """
    first, rest = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    try:
        if presets and first and not first.startswith("-"):
            if first not in presets:
                raise UserError(f"{first}: no such preset; there are {', '.join(presets)}")
            return main(tyro.cli(config, args=rest, default=presets[first]))
        note = f"First word: {', '.join(presets)}; --help after it shows its values." if presets else None
        return main(tyro.cli(config, description=note))
    except (UserError, ImageError) as error:
        tqdm.write(f"error: {error}", file=sys.stderr)  # on a line of its own, also beside a progress bar
        sys.exit(2)
    except KeyboardInterrupt:
        tqdm.write("stopped", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------------------------------------- files


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`. At the end of the block, the file there replaces `path`."""
    temporary = path.with_name(f".tmp.{path.name}")  # same ending: some writers choose the format by it
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # else a power cut could leave the new name without its content
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """Writes a .jsonl file, one JSON object a line, whole or not at all."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


_locks: dict[Path, filelock.BaseFileLock] = {}  # freed when the process ends, even by kill -9


def lock(directory: Path) -> None:
    """Makes a directory this process's own. UserError while another process writes there."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory.resolve() / ".lock"
    try:
        _locks.setdefault(path, filelock.FileLock(path)).acquire(blocking=False)
    except filelock.Timeout:
        raise UserError(
            f"another process is writing to {directory}: wait for it, or give another --out"
        ) from None


# ---------------------------------------------------------------------------------------- run directories


def open_run(cfg, may_change: tuple[str, ...] = ()) -> None:
    """Makes the run directory cfg.out, locks it, and writes run.json.

    UserError if the directory holds a run and cfg.resume is not set, if there is nothing to resume, or if the
    configuration differs from that of the run (except in `may_change`).
    """
    file = cfg.out / "run.json"
    if cfg.resume and not file.exists():
        raise UserError(f"--resume: no run in {cfg.out}; run without --resume first")
    if file.exists() and not cfg.resume:
        raise UserError(f"{cfg.out} holds a run already: pass --resume to go on, or another --out")
    lock(cfg.out)
    ignored = ("out", "resume", "device", *may_change)
    config = json.loads(json.dumps(asdict(cfg), default=str))
    if cfg.resume:
        before = json.loads(file.read_text())["config"]
        changed = [k for k in config if k not in ignored and config[k] != before.get(k)]
        if changed:
            raise UserError(
                f"--resume: {cfg.out} was started with another "
                + ", ".join(f"{k} ({before.get(k)}, now {config[k]})" for k in changed)
            )
    about = {"config": config, "commit": find_commit(), "python": platform.python_version()}
    about |= {"torch": torch.__version__, "transformers": transformers.__version__}
    write_atomic(file, json.dumps(about, indent=1).encode())


def find_commit() -> str | None:
    """The commit of this code, marked -dirty if files were changed since; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:  # a machine without git
        return None
    return git.stdout.strip() or None


def log_metrics(out: Path, metrics: dict) -> None:
    """Appends a line to metrics.jsonl."""
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics) + "\n")


def trainable_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def save_run(out: Path, policy, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Saves the policy in the Hugging Face layout, and then state.pt: all that an exact resume needs."""
    weights = {name: weight.detach() for name, weight in trainable_weights(policy.model).items()}
    policy.save(out)
    with replacing(out / "state.pt") as temporary:
        torch.save({"step": step, "weights": weights, "optimizer": optimizer.state_dict()}, temporary)


def load_run(out: Path, policy, optimizer: torch.optim.Optimizer) -> int:
    """Loads the last checkpoint and drops the metrics of later steps. Returns the number of steps done.

    0 for a run that ended before its first checkpoint. UserError if it is a checkpoint of another policy.
    """
    step, metrics = 0, out / "metrics.jsonl"
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", map_location=policy.device, weights_only=True)
        shapes, saved = (
            {k: w.shape for k, w in weights.items()}
            for weights in (trainable_weights(policy.model), state["weights"])
        )
        if shapes != saved:
            raise UserError(f"--resume: {out / 'state.pt'} is a checkpoint of another policy")
        policy.model.load_state_dict(state["weights"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    lines = metrics.read_text().splitlines(keepends=True)[:step] if metrics.exists() else []
    write_atomic(metrics, "".join(lines).encode())
    return step


def resume_command() -> str:
    """The command that continues this run. It repeats all flags: --resume refuses a changed configuration."""
    return shlex.join(["python", *sys.argv, *([] if "--resume" in sys.argv else ["--resume"])])


class StopSignal:
    """After Ctrl-C or SIGTERM `requested` is True: the loop finishes its step, saves, and stops.

    A second signal stops at once.
    """

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step (again to stop at once)", file=sys.stderr)


# ---------------------------------------------------------------------------------------------- training


def make_optimizer(policy, cfg, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """AdamW on the weights that the flags of a training script ask to train.

    Without adapters they are made float32: in bfloat16, steps as small as these learning rates are rounded
    away.
    """
    if policy.model is policy.base:
        if getattr(policy.model, "is_quantized", False):
            raise UserError("--quantize: weights in 4 bits cannot be trained; add adapters: --lora_rank 16")
        policy.model.float()
    if not cfg.train_vision:
        policy.base.model.visual.requires_grad_(False)
    if cfg.activation_checkpointing:
        policy.base.activation_checkpointing_enable({"use_reentrant": False})
    kind = torch.optim.AdamW
    if cfg.adam_8bit:
        from bitsandbytes.optim import AdamW8bit as kind
    weights = trainable_weights(policy.model).values()
    return kind(weights, lr=cfg.lr, betas=betas, weight_decay=cfg.weight_decay)


def clip_gradients(optimizer: torch.optim.Optimizer, limit: float) -> float:
    """Scales the gradients down to a norm of at most `limit`; returns the norm before.

    UserError if it is not finite: the step must not be taken, and the last checkpoint is whole.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(weights, limit)
    if not torch.isfinite(norm):
        raise UserError(
            f"the gradient is not finite (norm {norm.item()}), so the run stops before this step. "
            "The last checkpoint is whole. Start again with a smaller --lr and another --out"
        )
    return norm.item()


def peak_gb() -> float:
    """Peak memory in GB: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
