"""Run by LeRobot's own interpreter: its training loop on a small pi0, some steps at a time.

    python -P benchmarks/lerobot_training.py FOLDER BATCH WORKERS THREADS

Tried with LeRobot 0.6.1. ``FOLDER`` is what ``benchmarks.sft`` wrote: ``checkpoint`` and ``dataset`` in LeRobot's
formats, ``sizes.json`` (of the network) and ``check.safetensors`` (a batch with our loss per element). The first line
of output says versions and how far LeRobot's loss is from ours. From then on every line of input, ``UNTIMED TIMED``,
is answered by the seconds of so many steps. Nothing of pi0rl is imported: LeRobot needs other versions of torch.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

# pyright: reportMissingImports=false
from accelerate import Accelerator
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi0 import modeling_pi0
from lerobot.scripts.lerobot_train import update_policy
from lerobot.utils.logging_utils import AverageMeter, MetricsTracker
from lerobot.utils.utils import cycle
from safetensors.torch import load_file

# LeRobot's own: batches that each loader process prepares ahead.
PREFETCH = 4
METERS = ("loss", "grad_norm", "lr", "update_s", "dataloading_s")


def shrink(sizes: dict[str, Any]) -> None:
    """LeRobot knows two widths of Gemma and one SigLIP: let it build ``sizes`` with the same code."""
    text, expert, vision, vocabulary = (sizes[name] for name in ("text", "expert", "vision", "vocab_size"))
    variants = {"gemma_2b": text, "gemma_300m": expert}
    paligemma, gemma = modeling_pi0.PaliGemmaForConditionalGenerationWithPiGemma, modeling_pi0.PiGemmaForCausalLM

    def small_paligemma(config: Any) -> Any:
        config.text_config.vocab_size = config.image_token_index = config._vocab_size = vocabulary
        config.projection_dim = config.vision_config.projection_dim = text["width"]
        config.vision_config.hidden_size = vision["width"]
        config.vision_config.num_hidden_layers = vision["depth"]
        config.vision_config.intermediate_size = vision["mlp_dim"]
        config.vision_config.num_attention_heads = vision["num_heads"]
        config.vision_config.patch_size = vision["patch_size"]
        return paligemma(config)

    def small_gemma(config: Any) -> Any:
        config.vocab_size = vocabulary
        return gemma(config)

    modeling_pi0.get_gemma_config = lambda variant: modeling_pi0.GemmaConfig(**variants[variant])
    modeling_pi0.PaliGemmaForConditionalGenerationWithPiGemma = lambda config: small_paligemma(config)
    modeling_pi0.PiGemmaForCausalLM = lambda config: small_gemma(config)


@torch.no_grad()
def difference(policy: Any, check: dict[str, torch.Tensor]) -> float:
    """The largest difference of the loss per element from ours on one batch with the same noise and times."""
    images, masks = list(check["images"].unbind(1)), list(check["image_mask"].unbind(1))
    words = check["tokens"], check["token_mask"]
    drawn = check["state"], check["actions"], check["noise"], check["time"]
    return float((policy.model.forward(images, masks, *words, *drawn) - check["loss"]).abs().max())


class Loop:
    """What ``lerobot_train`` does between two lines of its log, on one process of the CPU."""

    def __init__(self, folder: Path, batch: int, workers: int) -> None:
        root, checkpoint = folder / "dataset", folder / "checkpoint"
        self.policy = modeling_pi0.PI0Policy.from_pretrained(checkpoint)
        config = self.policy.config
        meta = LeRobotDatasetMetadata("local/demos", root=root)
        windows = resolve_delta_timestamps(config, meta)
        self._data = LeRobotDataset("local/demos", root=root, delta_timestamps=windows, return_uint8=True)
        tokenizer = {"tokenizer_name": str(checkpoint / "tokenizer")}
        self._preprocessor, _ = make_pre_post_processors(
            config, checkpoint, preprocessor_overrides={"tokenizer_processor": tokenizer}
        )
        optimizer = config.get_optimizer_preset().build(self.policy.get_optim_params())
        scheduler = config.get_scheduler_preset().build(optimizer, 100_000)
        loader = torch.utils.data.DataLoader(
            self._data,
            num_workers=workers,
            batch_size=batch,
            shuffle=True,
            prefetch_factor=PREFETCH if workers else None,
            persistent_workers=workers > 0,
            multiprocessing_context="spawn" if workers else None,
        )
        self._accelerator = Accelerator(step_scheduler_with_optimizer=False, cpu=True)
        self._policy, self._optimizer, loader, self._scheduler = self._accelerator.prepare(
            self.policy, optimizer, loader, scheduler
        )
        self._batches, self._clip = cycle(loader), config.optimizer_grad_clip_norm
        meters = {name: AverageMeter(name, ":.3f") for name in METERS}
        frames, episodes = self._data.num_frames, self._data.num_episodes
        self._tracker = MetricsTracker(batch, frames, episodes, meters, accelerator=self._accelerator)

    def steps(self, count: int) -> dict[str, float]:
        """Seconds of ``count`` steps, in all, for the data, and for the update."""
        self._tracker.reset_averages()
        started = perf_counter()
        for _ in range(count):
            self._step()
        loading, updating = (self._tracker.metrics[name].sum for name in ("dataloading_s", "update_s"))
        return {"seconds": perf_counter() - started, "loading": loading, "updating": updating}

    def _step(self) -> None:
        started = perf_counter()
        batch = next(self._batches)
        for camera in self._data.meta.camera_keys:
            batch[camera] = batch[camera].to(dtype=torch.float32) / 255.0
        batch = self._preprocessor(batch)
        self._tracker.dataloading_s = perf_counter() - started
        self._tracker, _ = update_policy(
            self._tracker,
            self._policy,
            batch,
            self._optimizer,
            self._clip,
            accelerator=self._accelerator,
            lr_scheduler=self._scheduler,
        )
        self._tracker.step()


def main(folder: Path, batch: int, workers: int, threads: int) -> None:
    """Build, say what is compared, and train as asked until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # LeRobot prints
    torch.set_num_threads(threads)
    shrink(json.loads((folder / "sizes.json").read_text()))
    loop = Loop(folder, batch, workers)
    parameters = sum(parameter.numel() for parameter in loop.policy.parameters() if parameter.requires_grad)
    apart = difference(loop.policy, load_file(folder / "check.safetensors"))
    versions = {name: version(name) for name in ("lerobot", "torch", "transformers")}
    print(json.dumps({"versions": versions, "parameters": parameters, "loss": apart}), file=answers, flush=True)
    for line in sys.stdin:
        untimed, timed = map(int, line.split())
        loop.steps(untimed)
        print(json.dumps(loop.steps(timed)), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
