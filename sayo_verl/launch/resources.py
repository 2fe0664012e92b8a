"""Checks of batches, nodes and devices before a run: sizes that divide, CPUs for Ray, paths that every node sees."""

import math
import os
import shutil
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from sayo_verl.errors import SayoError
from sayo_verl.launch.mode_check import prompts_per_update, rollout_devices
from sayo_verl.models.location import is_hub_name

# Ray CPUs that verl's processes take: a placement bundle of 3 a device (ResourcePoolManager, max_colocate_count),
# one for TransferQueue's controller, one for the task runner.
CPUS_PER_DEVICE, CPUS_FIXED = 3, 2
STARTED_HERE = "the last `ray start` on this machine"
CPUS_PER_ROLLOUT_DEVICE = 2  # of a device that separate_async keeps for rollouts (RolloutReplica.init_standalone)


def check_batch_sizes(config: DictConfig) -> None:
    """Refuse micro-batches that do not divide the rows that they are cut from.

    Without dynamic batching verl asserts this after the first rollout. The rows are a mini-batch in the update, and the
    batch padded to whole mini-batches in the log-prob pass.

    Raises:
        SayoError: L22.
    """
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    prompts = config.data.train_batch_size
    if not isinstance(prompts, int) or prompts < 1:
        raise SayoError(
            "L22",
            "a batch needs prompts",
            where="data.train_batch_size",
            got=prompts,
            wanted="a whole number of at least 1",
            fix="correct it",
        )
    if int(actor.ppo_mini_batch_size) > prompts:
        raise SayoError(
            "L22",
            "the mini-batch of the update is larger than the batch; verl would fill it with rows that hold nothing",
            where="actor_rollout_ref.actor.ppo_mini_batch_size",
            got=f"{actor.ppo_mini_batch_size} prompts, of a batch of {prompts}",
            wanted="at most data.train_batch_size",
            fix="lower it, or raise data.train_batch_size",
        )
    devices = int(config.trainer.n_gpus_per_node) * int(config.trainer.nnodes)
    mini = int(actor.ppo_mini_batch_size) * int(rollout.n)
    multiple = math.lcm(devices, mini)
    batch = math.ceil(prompts_per_update(config) * int(rollout.n) / multiple) * multiple
    for key, dynamic, micro, rows, what in (
        (
            "rollout.log_prob_micro_batch_size_per_gpu",
            rollout.log_prob_use_dynamic_bsz,
            rollout.log_prob_micro_batch_size_per_gpu,
            batch,
            "data.train_batch_size x rollout.n, in whole mini-batches",
        ),
        (
            "actor.ppo_micro_batch_size_per_gpu",
            actor.use_dynamic_bsz,
            actor.ppo_micro_batch_size_per_gpu,
            mini,
            "actor.ppo_mini_batch_size x rollout.n",
        ),
    ):
        if not dynamic and micro is not None and rows % (int(micro) * devices):
            raise SayoError(
                "L22",
                "micro-batches do not divide the rows they are cut from",
                where=f"actor_rollout_ref.{key}",
                got=f"{rows} rows ({what}) on {devices} devices, micro-batch {micro}",
                wanted="rows divisible by micro-batch x devices",
                fix="choose a divisor, or set the use_dynamic_bsz beside it",
            )


def find_cluster(config: DictConfig) -> tuple[str | None, str]:
    """The Ray cluster that the run joins, found as ``ray.init`` finds it (``ray/_private/worker.py: init``).

    Returns:
        Its address, or None if the run starts one on this machine; and what names the address.
    """
    key = "ray_kwargs.ray_init.address"
    given = str(OmegaConf.select(config, key) or "").strip()
    variable = os.environ.get("RAY_ADDRESS", "").strip()
    address, where = (variable, "RAY_ADDRESS") if variable and given in ("", "auto") else (given, key)
    if not address:
        from ray._private.services import find_bootstrap_address

        address, where = find_bootstrap_address(OmegaConf.select(config, "ray_kwargs.ray_init._temp_dir")), STARTED_HERE
    return (None if address in (None, "", "local") else str(address)), where


def cluster(config: DictConfig) -> str | None:
    """The address of the Ray cluster that the run joins; None if it starts one on this machine."""
    return find_cluster(config)[0]


def sizes_of_ray(config: DictConfig) -> list[str]:
    """Keys of ``ray_kwargs.ray_init`` that describe a machine. Ray refuses them when the run joins a cluster."""
    keys = ("num_cpus", "num_gpus", "object_store_memory")
    return [key for key in keys if OmegaConf.select(config, f"ray_kwargs.ray_init.{key}") is not None]


def describe_machines(config: DictConfig) -> str:
    """Nodes and devices, and the cluster that a run on several nodes joins, for the plan."""
    trainer = config.trainer
    address, where = find_cluster(config)
    if address:
        joined = f" of the Ray cluster at {address}"
        if where == STARTED_HERE:
            joined += " that was started on this machine; RAY_ADDRESS=local starts another"
        if unused := sizes_of_ray(config):
            joined += f" (its nodes have their own {', '.join(unused)}: ray_kwargs.ray_init's are not used)"
    else:
        joined = ", NEEDS RAY_ADDRESS of a Ray cluster that is up" if int(trainer.nnodes) > 1 else ""
    rollout = config.actor_rollout_ref.rollout
    more = ""
    if apart := rollout_devices(config):
        total = int(trainer.nnodes) * int(trainer.n_gpus_per_node) + apart
        unit = "GPUs" if trainer.device == "cuda" else "devices"
        more = f" and {rollout.nnodes} x {rollout.n_gpus_per_node} for rollouts only, {total} {unit} in all"
    return f"{trainer.nnodes} x {trainer.n_gpus_per_node} {trainer.device}{more}{joined}"


def elsewhere(config: DictConfig, *, dry_run: bool) -> bool:
    """Whether the run may use other machines: a dry run, several nodes, or a cluster that is already up."""
    return dry_run or int(config.trainer.nnodes) > 1 or cluster(config) is not None


def check_devices(config: DictConfig, *, dry_run: bool) -> None:
    """Refuse several nodes without a cluster, and more devices than the Ray that the run starts here has.

    Raises:
        SayoError: L69, L55, L21, L81.
    """
    for key in ("nnodes", "n_gpus_per_node"):
        number = config.trainer[key]
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise SayoError(
                "L69",
                "not a number of nodes or devices",
                where=f"trainer.{key}",
                got=repr(number),
                wanted="an integer of at least 1",
                fix="correct NNODES, NGPUS_PER_NODE or the override",
            )
    nodes = config.trainer.nnodes
    if dry_run or cluster(config):
        return
    if nodes > 1:  # Ray would start a cluster on this machine and wait for GPUs of other nodes
        raise SayoError(
            "L55",
            "several nodes need a Ray cluster that is up, and no address of one is given",
            where="trainer.nnodes",
            got=nodes,
            fix=f"start one (ray start) and give its address: RAY_ADDRESS=auto NNODES={nodes} bash ... on one of its "
            "nodes",
        )
    on_gpu = config.trainer.device == "cuda" and os.environ.get("VERL_PLATFORM") != "cpu"
    if on_gpu and not torch.cuda.is_available() and shutil.which("nvidia-smi") is None:
        raise SayoError(
            "L21",
            "no GPU on this machine and no RAY_ADDRESS of a cluster that has some",
            where="trainer.device",
            got=config.trainer.device,
            fix="look at the job with DRY_RUN=1, or train the tiny task here: bash scripts/run_sayo_tiny.sh",
        )
    # Ray counts visible cards itself; 0: torch cannot tell
    logical = OmegaConf.select(config, "ray_kwargs.ray_init.num_gpus")
    found = int(logical) if logical is not None else torch.cuda.device_count() if on_gpu else 0
    wanted = config.trainer.n_gpus_per_node + rollout_devices(config)
    if found < wanted and (found or logical is not None):
        raise SayoError(
            "L81",
            "Ray has fewer devices on this machine than the run wants, and verl would end after minutes",
            where=f"trainer.n_gpus_per_node={config.trainer.n_gpus_per_node}",
            got=f"{found} ({'ray_kwargs.ray_init.num_gpus' if logical is not None else 'visible GPUs'})",
            wanted=f"{wanted}" + (", with those for rollouts only" if rollout_devices(config) else ""),
            fix="set NGPUS_PER_NODE" + (" or ray_kwargs.ray_init.num_gpus" if logical is not None else ""),
        )


def check_ray_cpus(config: DictConfig, *, dry_run: bool, in_cluster: int | None = None) -> str:
    """Refuse too few CPUs for Ray: TransferQueue waits forever for a CPU for each of its storage units.

    Args:
        config: of the run.
        dry_run: whether nothing is started.
        in_cluster: free CPUs of the cluster that the run joins, when the launcher is connected to it.

    Returns:
        The CPUs that Ray needs, for the plan. Without ``in_cluster`` they are compared with this machine, unless the
        run is ``elsewhere``.

    Raises:
        SayoError: L14.
    """
    storage = config.transfer_queue.backend.SimpleStorage
    devices = int(config.trainer.n_gpus_per_node) * int(config.trainer.nnodes)
    # verl's manager "remote" starts reward.num_workers processes in each of reward.num_workers, of one CPU each
    remote = int(config.reward.num_workers) ** 2 if config.reward.reward_manager.name == "remote" else 0
    apart = CPUS_PER_ROLLOUT_DEVICE * rollout_devices(config)
    wanted = int(storage.num_data_storage_units) + CPUS_PER_DEVICE * devices + CPUS_FIXED + remote + apart
    found = in_cluster or OmegaConf.select(config, "ray_kwargs.ray_init.num_cpus") or os.cpu_count() or 1
    unknown = in_cluster is None and elsewhere(config, dry_run=dry_run)
    if int(found) < wanted and not unknown:
        raise SayoError(
            "L14",
            "Ray has too few CPUs for TransferQueue and verl's workers, and the run would hang",
            where="ray_kwargs.ray_init.num_cpus" if in_cluster is None else f"Ray cluster {cluster(config)}",
            got=found,
            wanted=f">= {wanted} ({storage.num_data_storage_units} storage units + {CPUS_PER_DEVICE} x {devices} "
            f"devices + {CPUS_FIXED}"
            + (f" + {remote} of the reward manager remote" if remote else "")
            + (f" + {apart} for devices of rollouts only)" if apart else ")"),
            fix=(
                f"set ray_kwargs.ray_init.num_cpus={wanted}"
                if in_cluster is None
                else "start its nodes with more of them (ray start --num-cpus=N)"
            )
            + " (logical CPUs may exceed real ones) or lower "
            "transfer_queue.backend.SimpleStorage.num_data_storage_units",
        )
    return f"Ray needs {wanted} CPUs" + (" (not checked here)" if unknown else "")


def shared_paths(config: DictConfig) -> list[tuple[str, str]]:
    """(setting, path) of everything that every node must see; models of the hub are not among them.

    verl reads data in its task runner (``trainer_base.py: _init_dataloader``), models, checkpoints and the files of a
    reward function and of a data set class in its workers, on whatever node Ray puts them. The folder of
    checkpoints counts if the run saves some or may resume one.
    """
    model = str(config.actor_rollout_ref.model.path)
    trainer = config.trainer
    resumes = trainer.resume_mode == "auto" and Path(str(trainer.default_local_dir)).exists()
    used = int(trainer.save_freq) > 0 or resumes
    paths = [("trainer.default_local_dir", str(trainer.default_local_dir))] if used else []
    for key in ("reward.custom_reward_function.path", "data.custom_cls.path"):
        code = OmegaConf.select(config, key)
        paths += [(key, str(code).removeprefix("file://"))] if code else []  # pkg:// is an installed package
    paths += [("actor_rollout_ref.model.path", model)] if not is_hub_name(model) else []
    for key in ("train_files", "val_files"):
        files = config.data[key]
        paths += [(f"data.{key}", str(file)) for file in ([files] if isinstance(files, str) else files or [])]
    return paths


def check_paths(config: DictConfig) -> None:
    """On several nodes, refuse relative paths.

    Raises:
        SayoError: L59.
    """
    if int(config.trainer.nnodes) == 1:
        return
    for where, path in shared_paths(config):
        if "://" not in path and not Path(path).expanduser().is_absolute():
            raise SayoError(
                "L59",
                "another node would look for this path in another folder",
                where=where,
                got=path,
                wanted="an absolute path that every node sees",
                fix=f"for example {Path(path).absolute()}, on a shared disk",
            )
