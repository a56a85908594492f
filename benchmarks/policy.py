"""Times one look and one expert-only training step of pi0 against the same without what pi0rl leaves out.

    python -m benchmarks.policy                # the tiny pi0, about a minute
    python -m benchmarks.policy --full-size    # also the 3.3 B-parameter pi0 in bf16: 15 GB of memory, 7 GB of disk,
                                               # about 10 minutes on two cores
    python -m benchmarks.policy --full-size --lerobot ENVIRONMENT/bin/python   # also LeRobot's pi0: 18 GB of memory,
                                               # 15 GB of disk

For the last, ENVIRONMENT is made apart: `python3.12 -m venv ENVIRONMENT` and in it `pip install "lerobot[pi]==0.6.1"`.

Every round runs each way once, one after the other, so that a busy machine slows all of them alike; ratios are taken
within rounds. At full size random weights are written in openpi's layout and read back by a process of its own, whose
memory is measured. Results go to benchmarks/results/policy.json and policy.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import against_lerobot
from benchmarks.machine import describe_machine
from pi0rl.files import replace_text
from pi0rl.observation import Observation
from pi0rl.policy.checkpoints import load_policy
from pi0rl.policy.config import PI0, TINY, Pi0Config
from pi0rl.policy.export import save_openpi
from pi0rl.policy.model import ModelInputs, Prefix
from pi0rl.policy.policy import Policy, create_policy, random_policy
from pi0rl.policy.processing import Processing, mean_std, tiny_processing
from pi0rl.policy.sampling import (
    Sample,
    SamplerConfig,
    SamplingNoise,
    episode_noise,
    evaluate_chains,
    sample,
    stack_noise,
)
from pi0rl.progress import Progress
from pi0rl.rl.config import OptimConfig
from pi0rl.rl.optimizer import PolicyOptimizer

T = TypeVar("T")
RESULTS = Path(__file__).parent / "results"
PROMPT = "put both the alphabet soup and the tomato sauce in the basket"
SAMPLER = SamplerConfig("flow_sde", num_steps=10, action_chunk=5, stochastic="single")


@dataclass(frozen=True)
class Size:
    """A model and how it is measured: looks per batch, rounds."""

    name: str
    batch: int
    rounds: int


TINY_SIZE, FULL_SIZE = Size("tiny", batch=16, rounds=10), Size("full", batch=1, rounds=3)


@dataclass(frozen=True)
class Way:
    """One way to compute the same.

    Attributes:
        name, description: for the table.
        prefix: runs the VLM.
        attention: what everything runs in.
    """

    name: str
    description: str
    prefix: Callable[[Policy, ModelInputs], Prefix]
    attention: Callable[[], AbstractContextManager] = nullcontext


WAYS = (
    Way("pi0rl", "two cameras, the prompt's tokens", Policy.prefix),
    Way(
        "all tokens",
        "the same with the masked third camera and 48 language positions",
        Policy.full_prefix,
    ),
    Way(
        "unoptimised",
        "all tokens, the VLM's last layer in full, attention step by step",
        lambda policy, inputs: policy.model.prefix(inputs, with_output=True)[0],
        lambda: sdpa_kernel(SDPBackend.MATH),
    ),
)


def reference_processing(config: Pi0Config) -> Processing:
    """The references' layout: a third, masked camera, and 48 language positions."""
    rng = np.random.default_rng(0)
    statistics = mean_std(rng.normal(size=(9, 8))), mean_std(rng.normal(size=(9, 7)))
    processing = tiny_processing(config, *statistics, (PROMPT,))
    return replace(processing, token_len=48, absent_camera=True)


def observe(batch: int) -> Observation:
    """Noise for pictures and states."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, batch, 256, 256, 3), dtype=np.uint8)
    return Observation(images[0], images[1], rng.normal(size=(batch, 8)).astype(np.float32), (PROMPT,) * batch)


def noise_for(policy: Policy, batch: int) -> SamplingNoise:
    """Noise of ``batch`` looks."""
    shape = (SAMPLER.num_steps + 1, policy.config.action_horizon, policy.config.action_dim)
    return stack_noise([episode_noise(0, 0, 0, episode, 0, shape) for episode in range(batch)])


class Stopwatch:
    """Processor seconds of this process per part: what other processes take from a busy machine does not count."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = process_time()

    def lap(self, part: str) -> None:
        """The time since the last call (or the beginning) belongs to ``part``."""
        now = process_time()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    def skip(self) -> None:
        """The time since the last call belongs to nothing."""
        self._last = process_time()


def expert_gradients(policy: Policy, prefix: Prefix, drawn: Sample) -> None:
    """Of the mean log-prob of stored chains, into the trainable parameters."""
    evaluate_chains(policy, prefix, drawn.chains, drawn.denoise_inds, SAMPLER).log_probs.mean().neg().backward()


def compare(policy: Policy, size: Size, ways: tuple[Way, ...]) -> dict[str, Any]:
    """Every way in turn, ``size.rounds`` times: how long each part takes, and how far the outputs are apart."""
    inputs, noise = policy.processing.inputs(observe(size.batch)), noise_for(policy, size.batch)
    trainable = policy.trainable_parameters(train_expert_only=True)
    optimizer = PolicyOptimizer(trainable, {}, OptimConfig())
    drawn = sample(policy, inputs, noise, SAMPLER, "train")  # warms up as well
    reference: list[Tensor] = []
    rows = []
    progress = Progress(f"{size.name} size", size.rounds * len(ways), "computation")
    for number in range(size.rounds):
        for way in ways:
            watch = Stopwatch()
            with way.attention():
                with torch.no_grad():
                    prefix = way.prefix(policy, inputs)
                watch.lap("prefix")
                actions = sample(policy, prefix, noise, SAMPLER, "eval").actions
                watch.lap("denoising")
                expert_gradients(policy, prefix, drawn)
                watch.lap("expert update")
            row = {"way": way.name, "round": number, "tokens": prefix.mask.shape[1]}
            if number == 0:
                outputs = [actions, *(p.grad.clone() for p in trainable.values() if p.grad is not None)]
                reference = reference or outputs
                row |= _differences(outputs, reference)
            watch.skip()
            optimizer.step(0.0, 0.0, critic_only=False)  # a rate of zero: every round computes the same
            watch.lap("expert update")
            rows.append(row | watch.seconds)
            progress.update(len(rows))
    return {"batch": size.batch, "rounds": size.rounds, "rows": rows}


def _differences(outputs: list[Tensor], reference: list[Tensor]) -> dict[str, float]:
    """Largest absolute difference of the actions, and the gradients' relative L2 distance."""
    distance = sum(
        float((a.float() - b.float()).square().sum()) for a, b in zip(outputs[1:], reference[1:], strict=True)
    )
    norm = sum(float(b.float().square().sum()) for b in reference[1:])
    return {"actions": float((outputs[0] - reference[0]).abs().max()), "gradients": (distance / norm) ** 0.5}


def measure_tiny() -> dict[str, Any]:
    """The quickstart's pi0, in float32, in this process."""
    policy = create_policy(TINY, reference_processing(TINY), seed=0)
    torch.nn.init.normal_(policy.model.action_out_proj.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return compare(policy, TINY_SIZE, WAYS)


def build_full(folder: Path) -> dict[str, float]:
    """Write random full-size weights in openpi's layout; seconds and GiB."""
    started = perf_counter()
    policy = random_policy(PI0, reference_processing(PI0), seed=0)
    built = perf_counter()
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    save_openpi(policy, folder)
    return {
        "parameters": parameters,
        "init_seconds": built - started,
        "save_seconds": perf_counter() - built,
        "file_gib": (folder / "model.safetensors").stat().st_size / 2**30,
        "peak_gib": _peak(),
    }


def measure_full(folder: Path) -> dict[str, Any]:
    """Load that checkpoint, compare the ways, and take a real training step; GiB on the way."""
    started = perf_counter()
    policy = load_policy(folder)
    loaded, memory = perf_counter() - started, _memory()
    inputs, noise = policy.processing.inputs(observe(1)), noise_for(policy, 1)
    drawn = sample(policy, inputs, noise, SAMPLER, "train")
    memory_look = _memory()
    trainable = policy.trainable_parameters(train_expert_only=True)
    optimizer = PolicyOptimizer(trainable, {}, OptimConfig())
    expert_gradients(policy, policy.prefix(inputs), drawn)
    norms = optimizer.step(1e-4, 0.0, critic_only=False)
    step_peak = _peak()
    original = load_policy(folder).named_weights()
    changed = sum(int((original[name] != parameter).sum()) for name, parameter in trainable.items())
    del original, optimizer
    return compare(policy, FULL_SIZE, WAYS) | {
        "load_seconds": loaded,
        "after_loading": memory,
        "after_a_look": memory_look,
        "step": {
            "taken": norms.finite,
            "grad_norm": norms.actor,
            "changed": changed,
            "trainable": sum(parameter.numel() for parameter in trainable.values()),
        },
        "step_peak_gib": step_peak,
        "peak_gib": _peak(),
    }


def prepare_lerobot(folder: Path) -> None:
    """Beside the checkpoint ``folder/pi0``: the same for LeRobot, with a look's inputs, noise and our actions."""
    policy = load_policy(folder / "pi0")
    inputs, noise = policy.processing.inputs(observe(FULL_SIZE.batch)), noise_for(policy, FULL_SIZE.batch)
    actions = sample(policy, inputs, noise, SAMPLER, "eval").actions
    against_lerobot.write(policy, inputs, noise, SAMPLER.num_steps, actions, folder)


def _memory() -> dict[str, float]:
    """GiB this process has of its own, and maps from files (which the system may drop and read again)."""
    info = psutil.Process().memory_info()
    return {"own_gib": (info.rss - info.shared) / 2**30, "mapped_gib": info.shared / 2**30}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def in_fresh_process(function: Callable[[Path], T], folder: Path) -> T:
    """``function(folder)`` where nothing else has left memory behind, with as many threads as here."""
    start = partial(torch.set_num_threads, torch.get_num_threads())
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start) as pool:
        return pool.submit(function, folder).result()


PARTS = {"look": ("prefix", "denoising"), "training step": ("prefix", "expert update")}


def seconds(result: dict[str, Any], way: Way, what: str) -> list[float]:
    """Processor seconds per round."""
    return [sum(row[part] for part in PARTS[what]) for row in result["rows"] if row["way"] == way.name]


def markdown(results: dict[str, Any]) -> str:
    """The table of a results file."""
    machine = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in results["machine"].items())
    lines = ["# One look and one training step of pi0", "", f"Made by `python -m benchmarks.policy`; {machine}.", ""]
    lines += [f"- {way.name}: {way.description}" for way in WAYS]
    for size in (size for size in ("tiny", "full") if size in results):
        lines += ["", *_table(size, results[size])]
    if "full" in results:
        own = median(seconds(results["full"], WAYS[0], "look"))
        lines += ["", *against_lerobot.lines(results.get("lerobot"), own), "", *_memory_lines(results["full"])]
    return "\n".join(lines) + "\n"


def _table(size: str, result: dict[str, Any]) -> list[str]:
    precision = "float32" if size == "tiny" else "bfloat16"
    lines = [
        f"## {size} ({precision}, batch {result['batch']}, {SAMPLER.num_steps} denoising steps)",
        "",
        "| way | prefix tokens | look | | training step | | actions differ | gradients differ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way in WAYS:
        first = next(row for row in result["rows"] if row["way"] == way.name)
        cells = [way.name, str(first["tokens"])]
        for what in PARTS:
            own, ours = seconds(result, way, what), seconds(result, WAYS[0], what)
            factors = [a / b for a, b in zip(own, ours, strict=True)]
            spread = f"{median(factors):.2f} x [{min(factors):.2f}, {max(factors):.2f}]"
            cells += [f"{median(own):.3g} s", "" if way is WAYS[0] else spread]
        apart = ["", ""] if way is WAYS[0] else [f"{first['actions']:.1e}", f"{first['gradients']:.1e}"]
        lines.append("| " + " | ".join(cells + apart) + " |")
    return [
        *lines,
        "",
        f"Medians of {result['rounds']} interleaved rounds in processor seconds, and how many times those of pi0rl (in "
        "brackets the extremes). Actions: largest absolute difference; gradients: relative L2 distance.",
    ]


def _memory_lines(result: dict[str, Any]) -> list[str]:
    build, step = result["build"], result["step"]
    return [
        "## Memory at full size",
        "",
        "| | GiB |",
        "|---|---|",
        f"| checkpoint of {build['parameters'] / 1e9:.2f} B parameters in openpi's layout | {build['file_gib']:.1f} |",
        f"| peak while drawing and writing it | {build['peak_gib']:.1f} |",
        f"| after loading: own + mapped file | {_own_and_mapped(result['after_loading'])} |",
        f"| after a look: own + mapped file | {_own_and_mapped(result['after_a_look'])} |",
        f"| peak of a look and an expert-only training step, mapped file included | {result['step_peak_gib']:.1f} |",
        f"| peak of the whole comparison | {result['peak_gib']:.1f} |",
        "",
        f"The training step changed {step['changed'] / 1e6:.0f} M of {step['trainable'] / 1e6:.0f} M trainable weights "
        "(the others by less than bfloat16 can tell).",
    ]


def _own_and_mapped(memory: dict[str, float]) -> str:
    return f"{memory['own_gib']:.1f} + {memory['mapped_gib']:.1f}"


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full-size", action="store_true", help="also the 3.3 B-parameter pi0 (see above)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of policy.json and policy.md")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; more waste time waiting")
    parser.add_argument("--lerobot", metavar="PYTHON", help="the Python of an environment with LeRobot's pi0")
    options = parser.parse_args()
    if options.lerobot and not options.full_size:
        parser.error("--lerobot: LeRobot's pi0 has no tiny size, so it needs --full-size")
    python = options.lerobot or (sys.executable if importlib.util.find_spec("lerobot") else None)
    torch.set_num_threads(options.threads)
    results = {"machine": describe_machine(), "tiny": measure_tiny()}
    if options.full_size:
        options.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.output) as folder:
            place = Path(folder)
            build = in_fresh_process(build_full, place / "pi0")
            results["full"] = in_fresh_process(measure_full, place / "pi0") | {"build": build}
            if python is not None:
                in_fresh_process(prepare_lerobot, place)
                results["lerobot"] = against_lerobot.measure(python, place, FULL_SIZE.rounds, options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    replace_text(options.output / "policy.json", json.dumps(results, indent=1) + "\n")
    replace_text(options.output / "policy.md", markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
