"""The schema of an experiment: one typed, strict, frozen tree, read from YAML and validated once at the edge.

Keys are RLinf's where it has them, so that its snippets paste in. Composition: a file may name a ``base`` file beside
it whose values it overrides; ``${section.key}`` refers to another value; ``--set section.key=value`` comes last.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from pi0rl.errors import UserError
from pi0rl.params_checks import check_together
from pi0rl.rl.config import AlgorithmConfig, GuardConfig, OptimConfig, RewardConfig, UpdateConfig
from pi0rl.rlinf_keys import rlinf_hint

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def different_suites(suites: tuple[str, ...]) -> tuple[str, ...]:
    """The same suites; raises ValueError where one stands twice, as its episodes would count twice."""
    if twice := [suite for number, suite in enumerate(suites) if suite in suites[:number]]:
        raise ValueError(f"names {twice[0]} twice; expected each suite once")
    return suites


Suites = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(different_suites)]


STRICT = ConfigDict(extra="forbid")
UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")


class Section(BaseModel):
    """A frozen group of keys; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class DatasetParams(Section):
    """Demonstrations that exist already: a LeRobotDataset, or a folder of LIBERO's HDF5 files.

    ``source`` is a folder, or a LeRobotDataset's hub id ``org/name@revision``; ``fps`` is what it has to say of itself.
    """

    source: str
    fps: Positive = 20


class DemosParams(Section):
    """The scripted expert's demonstrations; kept apart from the experiment's seed, so that seeds share one data set.

    ``action_noise`` disturbs what is executed in bursts of 6 of every 24 steps, not what is learned, so that the data
    show how to come back; action chunks with a disturbed step are not imitated.
    ``image_stride`` is the number of control steps between images. With ``dataset`` nothing is played: the first
    ``episodes_per_task`` episodes of every task are taken from there.
    """

    dataset: DatasetParams | None = None
    episodes_per_task: Positive = 10
    init_state_ids: tuple[NonNegative, NonNegative] = (0, 50)
    seed: NonNegative = 0
    action_noise: Rate = 0.0
    image_stride: Positive = 1
    workers: Positive = 2


class FetchParams(Section):
    """An existing SFT checkpoint to start from, instead of ``demos`` and ``sft``.

    ``checkpoint`` is a folder, a hub id, an MLflow URI (``models:/name/3``) or ``dvc:REPOSITORY#PATH``. ``revision``
    (or ``org/name@revision``) is a commit, branch or tag; left out, it is the hub's default branch, or the files as
    they lie in a DVC repository's folder. ``assets`` is a folder with norm_stats.json and tokenizer where it lacks
    them. ``sha256`` of its weights is compared where given; of several files, that of the lines ``sha256sum`` prints.
    """

    checkpoint: str
    revision: str | None = None
    assets: str | None = None
    sha256: str | None = None


class SftParams(Section):
    """Imitation by flow matching (openpi's recipe: AdamW, warm-up, cosine decay from ``lr`` to ``min_lr``).

    With ``target_success`` the success on official init states is measured every ``val_check_interval`` steps from
    ``val_check_start`` on, and imitation ends as soon as it is reached: a mediocre start for RL, whatever the seed.
    With ``val_demos_per_task`` the last demonstrations of every task are not learned from, and the loss on them is
    measured just as often (they may begin where others do, in disturbed sets with more episodes than init states);
    ``demos_per_task`` takes the first few of every task alone. ``seed`` is the experiment's
    unless given: give it, and experiments of several seeds start from one SFT policy.

    ``checkpoint`` (as ``fetch.checkpoint``, ``org/name@revision`` on the hub) is what training starts from, with the
    statistics of these demonstrations, and with the tokenizer in the folder ``assets`` where it lacks one; left out, a
    tiny policy is trained from scratch. ``train_expert_only`` and ``lora_rank`` (of adapters on the VLM) choose what of
    it is trained. ``gradient_accumulation`` parts a batch; ``ema_decay`` keeps a moving average of the weights, which
    is what is measured and saved (openpi: 0.99); ``mixed_precision`` computes in bfloat16.
    ``augmentation: openpi`` crops, turns and recolours the images; ``image_shift`` moves them by some pixels.
    A run that was stopped goes on from where it was a multiple of ``save_interval`` steps.

    Where ``cluster.component_placement`` gives the actor several places of the kind of ``device`` (GPUs, or nodes'
    cores), as many processes share every batch.
    """

    seed: NonNegative | None = None
    checkpoint: str | None = None
    assets: str | None = None
    demos_per_task: Positive | None = None
    val_demos_per_task: NonNegative = 0
    steps: Positive = 1000
    batch_size: Positive = 32
    lr: Rate = 1e-3
    min_lr: Rate = 1e-4
    warmup_steps: NonNegative = 50
    weight_decay: Rate = 1e-4
    clip_grad: Rate = 1.0
    gradient_accumulation: Positive = 1
    ema_decay: Fraction | None = None
    mixed_precision: bool = False
    train_expert_only: bool = False
    lora_rank: Positive | None = None
    augmentation: Literal["none", "openpi"] = "none"
    image_shift: NonNegative = 0
    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: Positive = 2
    save_interval: Positive | None = None
    target_success: Fraction | None = None
    val_check_start: Positive = 600
    val_check_interval: Positive = 100
    val_episodes_per_task: Positive = 4


class ClusterParams(Section):
    """Where components run: ``env: 0-3``, ``env,rollout,actor: all``, or ``cpu`` on a machine without GPUs.

    GPUs are numbered through all nodes; ``env: {node_group: node, placement: 0-1}`` means these nodes' cores.
    ``address``: a running Ray (``host:port`` or ``auto``); left out, one is started here for every stage.
    """

    num_nodes: Positive = 1
    component_placement: dict[str, str | int | dict[str, str | int]] = {"env": "cpu", "rollout": "cpu", "actor": "cpu"}
    address: str | None = None


class RolloutParams(Section):
    """``pipeline_stage_num`` halves of the slots take turns: one simulates while the other is inferred.

    ``enable_offload``: nothing to do; where rollout and actor share a GPU they share one copy of the weights.
    """

    pipeline_stage_num: Positive = 2
    enable_offload: bool = False


class VideoParams(Section):
    """Episode videos; ``info_on_video`` draws task, step, reward and success on the frames.

    ``video_base_dir``: nothing to do; videos lie beside the episode table that names them.
    """

    save_video: bool = True
    info_on_video: bool = True
    video_base_dir: str | None = None


class EnvTrainParams(Section):
    """Training rollouts: ``total_num_envs`` slots; episodes per iteration = slots x ``algorithm.rollout_epoch``."""

    total_num_envs: Positive = 16
    workers: Positive = 2
    max_episode_steps: Positive = 240
    split: Literal["official", "held_out"] = "official"
    init_state_ids: tuple[NonNegative, NonNegative] = (0, 50)


class EnvEvalParams(Section):
    """Evaluation slots."""

    total_num_envs: Positive = 16
    workers: Positive = 2


class EnvParams(Section):
    """The simulator: image size (pixels), rendering profile, settle steps after a reset, fixture seed.

    ``enable_offload``: nothing to do; simulators take no GPU memory that others could use.
    """

    enable_offload: bool = False
    camera_size: Positive = 256
    render_profile: Literal["reference", "fast"] = "reference"
    settle_steps: NonNegative = 10
    seed: NonNegative = 0
    train: EnvTrainParams = EnvTrainParams()
    eval: EnvEvalParams = EnvEvalParams()


class ModelParams(Section):
    """Which pi0; C = ``num_action_chunks`` of the predicted horizon are executed, K = ``num_steps`` denoising steps.

    ``precision``: ``bf16`` keeps the towers' weights without their norms in bfloat16, as openpi and RLinf do; left out,
    weights stay as the checkpoint has them. ``is_lora``: beside the action expert, train adapters of ``lora_rank`` on
    the VLM's linear layers, whatever ``openpi.train_expert_only`` says; saved policies hold merged weights.
    ``torch_compile``: compile the towers' layers, for acting and learning; results change by rounding, and a run that
    is repeated need not end in the same bytes.
    """

    variant: Literal["tiny", "pi0", "pi05"] = "pi0"
    num_action_chunks: Positive = 5
    num_steps: Positive = 4
    action_dim: Positive = 7
    precision: Literal["fp32", "bf16"] | None = None
    is_lora: bool = False
    lora_rank: Positive = 32
    torch_compile: bool = False


@dataclass(frozen=True, config=STRICT)
class OptimParams(OptimConfig):
    """AdamW over two parameter groups: the policy at ``lr``, the value head at ``value_lr``."""


class FsdpParams(Section):
    """``gradient_checkpointing``: keep only the input of every layer for the backward pass: less memory, slower.

    ``sharding_strategy: full_shard`` spreads weights, gradients and AdamW's moments over several actors in an update.
    """

    gradient_checkpointing: bool = False
    sharding_strategy: Literal["no_shard", "full_shard"] = "no_shard"


class ActorParams(Section):
    """The learner; with ``enable_offload`` AdamW's moments are in main memory while episodes are played.

    ``ema_decay`` (e.g. 0.9) keeps a moving average of the trained weights over iterations: it is what is validated and
    what the run ends with, while episodes are played and learned from with the weights themselves.
    """

    model: ModelParams = ModelParams()
    optim: OptimParams = OptimParams()
    fsdp_config: FsdpParams = FsdpParams()
    enable_offload: bool = False
    ema_decay: Fraction | None = Field(default=None, exclude_if=lambda decay: decay is None)
    global_batch_size: Positive = 2048
    micro_batch_size: Positive = 128
    num_threads: Positive = 2


class OpenpiParams(Section):
    """The stochastic sampler, the heads and what of pi0 is trained (RLinf's block of the same name).

    With ``noise_anneal`` the noise level goes from ``noise_params[0]`` to ``[1]`` within ``[2]`` RL steps instead of
    staying at ``noise_level``.
    ``stochastic_steps``: noise at one denoising step drawn per sample, at the last one, or at all, each with a ratio of
    its own; ``ignore_last`` never draws the last one. ``safe_get_logprob`` takes minus the squared error for the
    log-prob. The value head reads the action expert (``chunk_critic_input``: the executed actions' tokens only) or,
    with ``value_after_vlm``, the VLM's tokens, pooled as ``value_vlm_mode`` says: left out, the mean over valid ones
    (RLinf's ``mean_token`` with ``algorithm.compat: rlinf``). With ``value_sees_time`` it also reads how much of the
    episode's time is over, which no image shows though the time limit ends episodes. ``noise_logvar_range`` holds the
    two standard deviations that flow_noise learns between.
    """

    noise_level: Rate = 0.5
    noise_anneal: bool = False
    noise_params: tuple[Rate, Rate, Positive] = (0.7, 0.3, 400)
    action_chunk: Positive | None = None
    num_steps: Positive | None = None
    train_expert_only: bool = True
    action_env_dim: Positive | None = None
    noise_method: Literal["flow_sde", "flow_noise", "reinflow", "flow_cps", "flow_ode"] = "flow_sde"
    stochastic_steps: Literal["one", "last", "all"] = "one"
    noise_logvar_range: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.08, 0.16)
    joint_logprob: bool = False
    ignore_last: bool = False
    safe_get_logprob: bool = False
    add_value_head: bool = True
    value_after_vlm: bool = False
    # Written down only where it is set: params that were frozen before it existed stay the same bytes to DVC.
    value_sees_time: bool = Field(default=False, exclude_if=lambda sees: not sees)
    value_vlm_mode: Literal["mean_token", "first_token", "last_token", "mean_valid"] | None = None
    chunk_critic_input: bool = False
    detach_critic_input: bool = True


@dataclass(frozen=True, config=STRICT)
class AlgorithmParams(AlgorithmConfig, RewardConfig, GuardConfig):
    """PPO (``adv_type: gae``) or GRPO (``adv_type: grpo``).

    Left out, ``adv_type`` is gae with a value head and grpo without; ``group_size`` is 1 for gae and 8 for grpo.
    An iteration plays ``rollout_epoch`` x ``env.train.total_num_envs`` episodes.
    """

    rollout_epoch: Positive = 8

    @property
    def name(self) -> str:
        """What reports call the trained policy: ppo or grpo."""
        return "ppo" if self.adv_type == "gae" else "grpo"

    def __post_init__(self) -> None:
        AlgorithmConfig.__post_init__(self)
        GuardConfig.__post_init__(self)


class LoggerParams(Section):
    """Where runs are logged, all under the same metric names.

    ``log_path``, ``experiment_name``: nothing to do; an experiment's files are in its folder below runs/ and it is
    logged under that folder's name.
    """

    log_path: str = "../results"
    project_name: str = "pi0rl"
    experiment_name: str = "quickstart"
    logger_backends: tuple[Literal["mlflow", "tensorboard", "wandb", "swanlab"], ...] = ("mlflow",)


class RunnerParams(Section):
    """The outer loop: ``max_epochs`` iterations of rollout and update.

    A checkpoint is written every ``save_interval`` iterations; while training goes on, the last ``keep_last`` and the
    best are kept. With ``val_check_interval`` (-1: never) the policy is validated every so many iterations, and at the
    end, without exploration noise, under training's step limit, from the last ``val_episodes_per_task`` held-out init
    states of every task; the checkpoint that validated best stays beside the last policy, as ``train/best``.
    ``final_policy``: the run's last policy, or the checkpoint that validated best.
    """

    task_type: Literal["embodied"] = "embodied"
    max_epochs: Positive = 1000
    save_interval: Positive = 40
    keep_last: Positive = 2
    val_check_interval: int = -1
    val_episodes_per_task: Positive = 2
    final_policy: Literal["last", "best"] = "last"
    logger: LoggerParams = LoggerParams()


class EvaluationParams(Section):
    """The fixed plan both policies are judged on; the step limit is openpi's per suite.

    ``suites`` are played before and after, those that are trained on and others, which may have got worse; left out,
    those that are trained on.
    ``both`` plays the plan on the held-out and on the official init states. With ``num_seeds`` it is played that many
    times, the policy's noise drawn from ``seed``, ``seed`` + 1, ...
    """

    # Written down only where it is given: params that were frozen before it existed stay the same bytes to DVC.
    suites: Suites | None = Field(default=None, exclude_if=lambda suites: suites is None)
    split: Literal["official", "held_out", "both"] = "held_out"
    episodes_per_task: Positive = 10
    seed: NonNegative = 1000
    num_seeds: Positive = 1
    videos_per_policy: NonNegative = 4


class Params(Section):
    """An experiment."""

    seed: NonNegative = 0
    suites: Suites = ("libero_object",)
    fetch: FetchParams | None = None
    demos: DemosParams = DemosParams()
    sft: SftParams = SftParams()
    cluster: ClusterParams = ClusterParams()
    env: EnvParams = EnvParams()
    rollout: RolloutParams = RolloutParams()
    actor: ActorParams = ActorParams()
    openpi: OpenpiParams = OpenpiParams()
    algorithm: AlgorithmParams = AlgorithmParams()
    runner: RunnerParams = RunnerParams()
    video_cfg: VideoParams = VideoParams()
    evaluation: EvaluationParams = EvaluationParams()

    @property
    def evaluated_suites(self) -> tuple[str, ...]:
        """What both policies are judged on: ``evaluation.suites``, or what they are trained on."""
        return self.evaluation.suites or self.suites

    @model_validator(mode="before")
    @classmethod
    def _seed_imitation(cls, tree: dict[str, Any]) -> dict[str, Any]:
        sft = tree.get("sft") or {}
        return {**tree, "sft": {"seed": tree.get("seed", 0), **sft}} if isinstance(sft, dict) else tree

    @model_validator(mode="before")
    @classmethod
    def _choose_algorithm(cls, tree: dict[str, Any]) -> dict[str, Any]:
        algorithm, openpi = tree.get("algorithm") or {}, tree.get("openpi") or {}
        if not isinstance(algorithm, dict) or not isinstance(openpi, dict):
            return tree
        adv_type = algorithm.get("adv_type", "gae" if openpi.get("add_value_head", True) else "grpo")
        gae = adv_type == "gae"
        chosen = {
            "adv_type": adv_type,
            "loss_type": "actor_critic" if gae else "actor",
            "group_size": 1 if gae else 8,
        }
        return {**tree, "algorithm": {**chosen, **algorithm}}

    @model_validator(mode="after")
    def _possible(self) -> Params:
        check_together(self)
        UpdateConfig(self.algorithm, self.actor.optim, self.actor.global_batch_size, self.actor.micro_batch_size)
        return self


def load_params(path: Path, overrides: tuple[str, ...] = ()) -> Params:
    """Read, compose, interpolate and validate ``path``; raises UserError naming file, key, expectation and nearest key.

    Args:
        path: a YAML file of params.
        overrides: ``section.key=value`` strings, applied last; values are parsed as YAML.
    """
    tree = _compose(path, seen=())
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"--set {override}: expected key=value, for example --set seed=1")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--set {override}: the value is not valid YAML") from error
        _set(tree, key.strip(), value, override)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(_interpolatable(tree)), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: cannot resolve an interpolation: {str(error).splitlines()[0]}") from error
    assert isinstance(resolved, dict)
    try:
        return Params.model_validate(_only_keys_of(tree, resolved))
    except ValidationError as error:
        raise UserError(f"{_origin(path, overrides, error)}: {explain(error)}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def dump_params(params: Params) -> str:
    """``params`` as YAML with every default written out; reading it back gives the same params."""
    return yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False)


def params_hash(params: Params) -> str:
    """16 hex digits that name these params, independent of the file's formatting."""
    text = json.dumps(params.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _compose(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The YAML tree of ``path`` laid over the tree of its ``base``."""
    if path in seen:
        raise UserError(f"{path}: base files form a circle: {' -> '.join(str(p) for p in (*seen, path))}")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError as error:
        known = _known(path)
        near = "".join(f"did you mean {name}? " for name in difflib.get_close_matches(path.stem, known, n=1))
        raise UserError(f"{path}: no such params file; {near}known ones: {', '.join(known) or 'none'}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections at the top, got {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise UserError(f"{path}: base: expected the name of a params file, got {base!r}")
    return tree if base is None else _merge(_compose(path.parent / base, (*seen, path)), tree)


def _known(path: Path) -> list[str]:
    return sorted(p.stem for p in path.parent.glob("*.yaml"))


def _merge(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    merged = dict(lower)
    for key, value in upper.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        # a placement is one statement: merging two of them would mix machines
        merged[key] = _merge(merged[key], value) if both and key != "component_placement" else value
    return merged


def _set(tree: dict[str, Any], key: str, value: Any, override: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"--set {override}: {parent} is a value, not a section")
    tree[last] = value


def _interpolatable(tree: dict[str, Any]) -> dict[str, Any]:
    """``tree`` with the schema's defaults under it, so that ``${actor.model.num_steps}`` resolves when left out."""
    return _merge(Params.model_validate({}).model_dump(mode="json"), tree)


def _only_keys_of(tree: Any, resolved: Any) -> Any:
    """The values of ``resolved`` at the keys that ``tree`` states, so that the schema still sees what was left out."""
    if not isinstance(tree, dict):
        return resolved
    return {key: _only_keys_of(value, resolved[key]) for key, value in tree.items()}


def explain(error: ValidationError, schema: type[BaseModel] = Params) -> str:
    """The first problem as one line: key, what is wrong, what was expected, the nearest key."""
    problems = error.errors()
    problem = _first_problem(error)
    key = _key(problem)
    if problem["type"] in UNKNOWN_KEY and (hint := rlinf_hint(key)):
        return f"{key}: {hint}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] in UNKNOWN_KEY:
        known = _keys_beside(problem["loc"], schema)
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {key}; {hint}{more}"
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return message + more
    return f"{key}: {message}, got {problem['input']!r}{more}"


def _first_problem(error: ValidationError) -> ErrorDetails:
    problems = error.errors()
    return next((problem for problem in problems if problem["type"] in UNKNOWN_KEY), problems[0])


def _key(problem: ErrorDetails) -> str:
    return ".".join(str(part) for part in problem["loc"])


def _origin(path: Path, overrides: tuple[str, ...], error: ValidationError) -> str:
    """Where the first problem was written: the last override of its key, else the file."""
    key = _key(_first_problem(error))
    theirs = [override for override in overrides if override.partition("=")[0].strip() == key]
    return f"--set {theirs[-1]}" if theirs else str(path)


def _keys_beside(loc: tuple[int | str, ...], schema: type[BaseModel]) -> list[str]:
    """The keys the schema knows in the section that holds ``loc``."""
    section: Any = schema
    for part in loc[:-1]:
        annotation = get_type_hints(section)[str(part)]
        candidates = get_args(annotation) or (annotation,)
        section = next(c for c in candidates if is_dataclass(c) or (isinstance(c, type) and issubclass(c, BaseModel)))
    return sorted(field.name for field in fields(section)) if is_dataclass(section) else sorted(section.model_fields)
