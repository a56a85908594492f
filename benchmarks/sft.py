"""Times imitation of a small pi0 beside LeRobot's training loop: the same network, the same demonstrations.

    python -m benchmarks.sft --lerobot ENVIRONMENT/bin/python        # about four minutes on two cores
    python -m benchmarks.sft --lerobot ... --demos runs/quickstart/demos --rounds 10

ENVIRONMENT is made apart: `python3.12 -m venv ENVIRONMENT` and in it `pip install "lerobot[pi,training]==0.6.1"`.

LeRobot gets our weights as a checkpoint and our demonstrations as a LeRobotDataset, and its loss on one batch has to be
ours. Then both train in turn, some steps each, so that a busy machine slows both alike; ratios are taken within rounds.
LeRobot runs with its default of four loader processes and with none; the faster one counts. Results go to
benchmarks/results/sft.json and sft.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from benchmarks.machine import describe_machine
from pi0rl.errors import UserError
from pi0rl.files import replace_text
from pi0rl.params import SftParams
from pi0rl.policy.config import TINY, TransformerConfig
from pi0rl.policy.export import save_lerobot
from pi0rl.policy.model import ModelInputs, sample_training_time
from pi0rl.policy.policy import Policy, create_policy
from pi0rl.policy.processing import mean_std, tiny_processing
from pi0rl.policy.tokenizer import LIBERO_WORDS, HuggingFaceTokenizer
from pi0rl.progress import Progress
from pi0rl.sft.collection import collect
from pi0rl.sft.demonstrations import Demonstrations, load
from pi0rl.sft.imitation import Imitation, network_targets
from pi0rl.sft.lerobot_export import export
from pi0rl.sft.recording import Collection

RESULTS = Path(__file__).parent / "results"
# LeRobot's pi0 is written for eight heads.
_TOWER = TransformerConfig(width=128, depth=3, mlp_dim=192, num_heads=8, num_kv_heads=1, head_dim=16)
SMALL = replace(TINY, text=_TOWER, expert=_TOWER)
SUITE, EPISODES = "libero_object", 3
LOADERS = (4, 0)
UNTIMED = 16  # what LeRobot's loaders have prepared meanwhile: four of them, four batches each


def word_tokenizer() -> HuggingFaceTokenizer:
    """The tiny policy's words as a tokenizer that both sides read."""
    words = ("<pad>", "<unk>", "<bos>", "\n", *LIBERO_WORDS)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    return HuggingFaceTokenizer(tokenizer.to_str())


def make_policy(demonstrations: Demonstrations) -> Policy:
    """A fresh small pi0 that says something: an output of zeros would agree with any network's."""
    statistics = mean_std(demonstrations.state), mean_std(demonstrations.actions)
    processing = tiny_processing(SMALL, *statistics, demonstrations.languages)
    processing = replace(processing, tokenizer=word_tokenizer(), prompt_style="lerobot_text")
    policy = create_policy(SMALL, processing, seed=0)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(policy.model.action_out_proj.weight, std=0.1, generator=generator)
    return policy


def write_for_lerobot(policy: Policy, demonstrations: Demonstrations, source: Path, batch: int, folder: Path) -> None:
    """What ``lerobot_training`` reads; see there."""
    save_lerobot(policy, folder / "checkpoint")
    export(source, folder / "dataset")
    sizes = {name: asdict(getattr(SMALL, name)) for name in ("text", "expert", "vision")}
    (folder / "sizes.json").write_text(json.dumps(sizes | {"vocab_size": SMALL.vocab_size}))
    rows = demonstrations.looks[:batch]
    inputs = policy.processing.inputs(demonstrations.observation(rows))
    actions = network_targets(policy, demonstrations)[torch.from_numpy(rows)]
    generator = torch.Generator().manual_seed(0)
    noise, time = torch.randn(actions.shape, generator=generator), sample_training_time(len(rows), generator)
    with torch.no_grad():
        loss = policy.model.flow_matching_loss(inputs, actions, noise, time)
    arrays = {name: getattr(inputs, name).contiguous() for name in ModelInputs.__dataclass_fields__}
    save_file(arrays | {"actions": actions, "noise": noise, "time": time, "loss": loss}, folder / "check.safetensors")


class LeRobot:
    """LeRobot's loop in a process of its own, idle while it is not asked."""

    def __init__(self, python: str, folder: Path, batch: int, workers: int, threads: int) -> None:
        script, self._said = Path(__file__).with_name("lerobot_training.py"), folder / f"stderr-{workers}"
        command = [python, "-P", str(script), str(folder), str(batch), str(workers), str(threads)]
        with self._said.open("w") as said:
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
                )
            except OSError as error:
                raise UserError(f"--lerobot {python}: cannot be started ({error.strerror}); name a Python") from error
        self._python = python
        self.described = self._answer()

    def steps(self, count: int) -> dict[str, float]:
        """Seconds of ``count`` steps."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{UNTIMED} {count}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Its input ends, and so does it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            reason = (self._said.read_text().strip().splitlines() or ["no message"])[-1]
            raise UserError(
                f"--lerobot {self._python}: LeRobot's training did not run ({reason}); expected a Python "
                'that has "lerobot[pi,training]==0.6.1"'
            )
        return json.loads(line)


def measure(
    policy: Policy, demonstrations: Demonstrations, others: dict[str, LeRobot], batch: int, rounds: int, steps: int
) -> list[dict[str, Any]]:
    """Every side in turn, ``rounds`` times; a row each."""
    params = SftParams(steps=10**6, batch_size=batch, num_threads=torch.get_num_threads())
    training, rows = Imitation(policy, demonstrations, params, seed=0), []
    progress = Progress("sft", rounds * (1 + len(others)), "measurement")
    for number in range(rounds):
        for _ in range(UNTIMED if number == 0 else 1):
            training.step()
        started = perf_counter()
        for _ in range(steps):
            training.step()
        rows.append({"side": "pi0rl", "round": number, "seconds": perf_counter() - started})
        progress.update(len(rows))
        for name, other in others.items():
            rows.append({"side": name, "round": number} | other.steps(steps))
            progress.update(len(rows))
    return rows


def markdown(results: dict[str, Any]) -> str:
    """The table of a results file."""
    machine = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in results["machine"].items())
    samples, rows = results["batch"] * results["steps"], results["rows"]
    speeds = {side: [samples / row["seconds"] for row in rows if row["side"] == side] for side in results["sides"]}
    lines = [
        "# Imitation of a small pi0",
        "",
        f"Made by `python -m benchmarks.sft`; {machine}.",
        "",
        f"{results['parameters'] / 1e6:.2f} M trained parameters in float32, two cameras of {SMALL.vision.image_size} "
        f"pixels, batches of {results['batch']}, {results['frames']} frames of {results['tasks']} tasks.",
        "",
        "| training loop | samples a second | waiting for data | pi0rl is faster by |",
        "|---|---:|---:|---:|",
    ]
    for side, speed in speeds.items():
        cells = [side, f"{median(speed):.1f}", "", ""]
        if side != "pi0rl":
            own = [row for row in rows if row["side"] == side]
            cells[2] = f"{median(row['loading'] / row['seconds'] for row in own):.0%}"
            factors = [a / b for a, b in zip(speeds["pi0rl"], speed, strict=True)]
            cells[3] = f"{median(factors):.2f} x [{min(factors):.2f}, {max(factors):.2f}]"
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Medians of {results['rounds']} interleaved rounds of {results['steps']} steps (in brackets the "]
    lines[-1] += "extremes), wall time."
    if "lerobot" not in results:
        return "\n".join([*lines, "", "LeRobot was not compared: see `--lerobot`.", ""])
    versions = ", ".join(f"{name} {number}" for name, number in results["lerobot"]["versions"].items())
    said = f"Theirs: {versions}; the same weights, {results['lerobot']['parameters'] / 1e6:.2f} M parameters counting "
    said += (
        f"heads that nothing uses; on one batch the loss per element is ours within {results['lerobot']['loss']:.1e}."
    )
    return "\n".join([*lines, "", said, ""])


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lerobot", metavar="PYTHON", help="the Python of an environment with LeRobot (see above)")
    parser.add_argument("--demos", type=Path, help=f"a stage's demos folder (default: {EPISODES} episodes per task)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=40, help="per round")
    parser.add_argument("--threads", type=int, default=2, help="of torch, on both sides")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of sft.json and sft.md")
    options = parser.parse_args()
    try:
        _run(options)
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def _run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder, source = Path(name), options.demos or Path(name) / "demos"
        if options.demos is None:
            collect(Collection((SUITE,), EPISODES, (0, 50), seed=0, camera_size=SMALL.vision.image_size), source, 2)
        demonstrations = load(source)
        policy = make_policy(demonstrations)
        others: dict[str, LeRobot] = {}
        if options.lerobot:
            write_for_lerobot(policy, demonstrations, source, options.batch, folder)
            for workers in LOADERS:
                side = f"LeRobot, {workers} loader processes"
                others[side] = LeRobot(options.lerobot, folder, options.batch, workers, options.threads)
        rows = measure(policy, demonstrations, others, options.batch, options.rounds, options.steps)
        for other in others.values():
            other.close()
    results: dict[str, Any] = {
        "machine": describe_machine(),
        "parameters": sum(weight.numel() for weight in policy.model.parameters()),
        "frames": len(demonstrations),
        "tasks": len(demonstrations.languages),
        "batch": options.batch,
        "rounds": options.rounds,
        "steps": options.steps,
        "sides": ["pi0rl", *others],
        "rows": rows,
    }
    for other in others.values():
        results["lerobot"] = other.described
    options.output.mkdir(parents=True, exist_ok=True)
    replace_text(options.output / "sft.json", json.dumps(results, indent=1) + "\n")
    replace_text(options.output / "sft.md", markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
