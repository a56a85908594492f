"""Many LIBERO tasks at once as a gymnasium `VectorEnv`, in worker processes, a chunk of actions at a time."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from pi0rl.errors import UserError
from pi0rl.libero.env import (
    CAMERAS,
    LiberoEnv,
    Observation,
    RenderProfileName,
    action_space,
    checked_render_mode,
    checked_step_limit,
    observation_boxes,
    observation_space,
    shared_renderer,
)
from pi0rl.libero.simulation import ACTION_DIM, checked_actions
from pi0rl.libero.suites import task
from pi0rl.libero.worker import Worker

_IMAGES = tuple(f"{camera}_image" for camera in CAMERAS)
# What one environment is told to do: ("reset", seed, options) or ("step_chunk", actions [C, 7]).
_Command = tuple[Any, ...]


class LiberoVectorEnv(gymnasium.vector.VectorEnv[Observation, np.ndarray, np.ndarray]):
    """N environments like `LiberoEnv`, each with its own task; their results are those of N single ones.

    `step` takes one action per environment; `step_chunk` takes C, looks once at the end and is what a policy that acts
    in chunks should use. Autoreset mode is NEXT_STEP: the call after an episode's end resets that environment (to an
    official init state that it draws) and ignores its actions. Images come through shared memory.

    Args:
        num_envs: N.
        suite: Name of a suite, or one for each environment.
        task_id: Index of a task, or one for each environment.
        camera_size, render_profile, step_limit: As for `LiberoEnv`.
        workers: Processes; None takes one per core, at most N.
        render_devices: EGL device numbers, dealt to the workers in turn; None lets each choose (docs/libero.md).
        render_mode: None, or "rgb_array": `render` returns the third-person pictures, upright.

    Raises:
        UserError: An argument is unknown or out of range, or a task's model cannot be built.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20, "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int,
        suite: str | Sequence[str],
        task_id: int | Sequence[int],
        camera_size: int = 256,
        render_profile: RenderProfileName = "reference",
        step_limit: int | None = None,
        workers: int | None = None,
        render_devices: Sequence[int] | None = None,
        render_mode: str | None = None,
    ):
        self.closed = True  # nothing to close until all workers run
        if num_envs < 1 or (workers is not None and workers < 1):
            raise UserError(f"num_envs {num_envs}, workers {workers}: expected 1 or more")
        suites, task_ids = _dealt(suite, num_envs, "suite"), _dealt(task_id, num_envs, "task_id")
        self.tasks = tuple(task(*each) for each in zip(suites, task_ids, strict=True))
        for each in self.tasks:
            checked_step_limit(step_limit, each)
        shared_renderer(camera_size, render_profile)  # refuses bad arguments; draws nothing yet
        self.num_envs, self.render_mode = num_envs, checked_render_mode(render_mode)
        self.single_observation_space, self.single_action_space = observation_space(camera_size), action_space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        shape = (num_envs, len(_IMAGES), camera_size, camera_size, 3)
        descriptor, self._images = _shared_images(shape)
        self._ended = np.zeros(num_envs, bool)
        self._proprioception = {
            name: np.zeros((num_envs, *box.shape), box.dtype)
            for name, box in observation_boxes(camera_size).items()
            if name not in _IMAGES
        }
        shares = np.array_split(np.arange(num_envs), min(workers or len(os.sched_getaffinity(0)), num_envs))
        self._workers: list[Worker] = []
        self._places: list[Worker] = []
        self.closed = False
        try:
            for number, share in enumerate(shares):
                settings = {"camera_size": camera_size, "render_profile": render_profile, "step_limit": step_limit}
                tasks = {int(index): (suites[index], task_ids[index]) for index in share}
                variables = _device_variable(render_devices, number)
                worker = Worker(WorkerEnvs, (tasks, settings, descriptor, shape), variables, [descriptor])
                self._workers.append(worker)
                self._places += [worker] * len(share)
            for worker in self._workers:
                worker.receive()
        except BaseException:
            self.close()
            raise
        finally:
            os.close(descriptor)

    @property
    def languages(self) -> tuple[str, ...]:
        """The instruction of each environment."""
        return tuple(task.language for task in self.tasks)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode everywhere, or where `options["reset_mask"]` (bool [N]) says so.

        Args:
            seed: None, one per environment, or s for s, s + 1, ... (gymnasium's convention; `[s] * N` for the same).
            options: As for `LiberoEnv`, where `init_state_id` and `init_state` may be one for all or a sequence of N.

        Raises:
            UserError: An option is unknown or does not fit a task.
        """
        given = dict(options or {})
        mask = np.asarray(given.pop("reset_mask", np.ones(self.num_envs, bool)))
        if mask.shape != (self.num_envs,) or mask.dtype != bool or not mask.any():
            raise UserError(f"reset_mask: expected bool [{self.num_envs}] with at least one True")
        seeds = _seeds(seed, self.num_envs)
        per_env = _options_per_env(given, self.num_envs)
        infos = self._run({int(index): ("reset", seeds[index], per_env[index]) for index in np.flatnonzero(mask)})[3]
        return self._observed(), infos

    def step(self, actions: np.ndarray) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Advance every environment by one control step (50 ms); `actions` [N, 7].

        Raises:
            UserError: The shape is wrong or a number is NaN or infinite.
        """
        return self._step(checked_actions(actions, (self.num_envs, ACTION_DIM))[:, None])

    def step_chunk(self, actions: np.ndarray) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Execute `actions` [N, C, 7], in every environment until its episode ends, and look only then.

        Returns:
            What `step` returns; rewards are sums over the chunk, `infos["steps"]` counts the steps executed.

        Raises:
            UserError: The shape is wrong or a number is NaN or infinite.
        """
        return self._step(checked_actions(actions, (self.num_envs, None, ACTION_DIM)))

    def render(self) -> tuple[np.ndarray, ...] | None:
        """The third-person pictures of the last observation, upright, N times uint8 [size, size, 3]."""
        return tuple(image[::-1].copy() for image in self._images[:, 0]) if self.render_mode == "rgb_array" else None

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """An attribute of every environment, such as `qpos`."""
        return self._ask({index: ("get_wrapper_attr", name) for index in range(self.num_envs)})

    def close_extras(self, **kwargs: Any) -> None:
        """End the worker processes."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.close()

    def _step(self, chunks: np.ndarray) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        commands = {
            index: ("reset", None, {}) if self._ended[index] else ("step_chunk", chunks[index])
            for index in range(self.num_envs)
        }
        rewards, terminated, truncated, infos = self._run(commands)
        return self._observed(), rewards, terminated, truncated, infos

    def _run(self, commands: dict[int, _Command]) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        rewards = np.zeros(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        infos: dict[str, Any] = {}
        for index, result in zip(commands, self._ask(commands), strict=True):
            if commands[index][0] == "reset":
                observation, info = result
            else:
                observation, rewards[index], terminated[index], truncated[index], info = result
            for name, value in observation.items():
                self._proprioception[name][index] = value
            self._ended[index] = terminated[index] or truncated[index]
            infos = self._add_info(infos, info, index)
        return rewards, terminated, truncated, infos

    def _ask(self, commands: dict[int, _Command]) -> tuple[Any, ...]:
        """The results of all commands, in their order; every worker has answered before an error is raised."""
        shares: dict[Worker, dict[int, _Command]] = {}
        for index, command in commands.items():
            shares.setdefault(self._places[index], {})[index] = command
        for worker, share in shares.items():
            worker.send("run", share)
        results: dict[int, Any] = {}
        errors: list[Exception] = []
        for worker in shares:
            try:
                results.update(worker.receive())
            except Exception as error:
                errors.append(error)
            except BaseException:
                self.close()  # interrupted: the replies still to come would be taken for those of the next call
                raise
        if errors:
            raise errors[0]
        return tuple(results[index] for index in commands)

    def _observed(self) -> Observation:
        images = {name: self._images[:, number] for number, name in enumerate(_IMAGES)}
        return {name: array.copy() for name, array in {**images, **self._proprioception}.items()}


class WorkerEnvs:
    """The environments of one worker process; made there by `Worker`.

    Args:
        tasks: Environment's index among all N -> suite and task.
        settings: Further arguments of `LiberoEnv`.
        descriptor: File of the shared images.
        shape: Their shape [N, cameras, size, size, 3].
    """

    def __init__(
        self, tasks: dict[int, tuple[str, int]], settings: dict[str, Any], descriptor: int, shape: tuple[int, ...]
    ):
        self._images = _mapped_images(descriptor, shape)
        self._envs = {index: LiberoEnv(*each, **settings) for index, each in tasks.items()}

    def run(self, commands: dict[int, _Command]) -> dict[int, Any]:
        """Carry out commands; images go to the shared memory and are left out of what is returned."""
        return {index: self._run(index, command) for index, command in commands.items()}

    def _run(self, index: int, command: _Command) -> Any:
        env = self._envs[index]
        if command[0] == "get_wrapper_attr":
            return env.get_wrapper_attr(command[1])
        if command[0] == "reset":
            observation, *rest = env.reset(seed=command[1], options=command[2])
        else:
            observation, *rest = env.step_chunk(command[1])
        for number, name in enumerate(_IMAGES):
            self._images[index, number] = observation.pop(name)
        return observation, *rest


def _shared_images(shape: tuple[int, ...]) -> tuple[int, np.ndarray]:
    """Anonymous shared memory: it is gone with the last process that has it, however that ends."""
    descriptor = os.memfd_create("pi0rl_images")
    os.ftruncate(descriptor, int(np.prod(shape)))
    return descriptor, _mapped_images(descriptor, shape)


def _mapped_images(descriptor: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(mmap.mmap(descriptor, int(np.prod(shape))), np.uint8).reshape(shape)


def _device_variable(render_devices: Sequence[int] | None, worker: int) -> dict[str, str]:
    return {"MUJOCO_EGL_DEVICE_ID": str(render_devices[worker % len(render_devices)])} if render_devices else {}


def _dealt(value: Any, num_envs: int, name: str) -> list[Any]:
    several = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
    values = list(value) if several else [value] * num_envs
    if len(values) != num_envs:
        raise UserError(f"{len(values)} values of {name}: expected one, or one for each of {num_envs} environments")
    return values


def _seeds(seed: int | Sequence[int | None] | None, num_envs: int) -> list[int | None]:
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, int | np.integer):
        return [int(seed) + index for index in range(num_envs)]
    return _dealt(seed, num_envs, "seed")


def _options_per_env(options: dict[str, Any], num_envs: int) -> list[dict[str, Any]]:
    """Init states dealt out, everything else for all."""
    dealt = {}
    if options.get("init_state_id") is not None:
        dealt["init_state_id"] = _dealt(options["init_state_id"], num_envs, "init_state_id")
    states = options.get("init_state")
    if states is not None:
        one = isinstance(states, np.ndarray) and states.ndim == 1
        dealt["init_state"] = [states] * num_envs if one else _dealt(states, num_envs, "init_state")
    return [{**options, **{name: values[index] for name, values in dealt.items()}} for index in range(num_envs)]
