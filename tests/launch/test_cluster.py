"""A real Ray cluster whose nodes differ, and what the launcher says of it before verl starts anything."""

import copy
import json
import os
import socket
import sys
import textwrap
from unittest import mock

import pytest
import ray
from omegaconf import OmegaConf
from ray.cluster_utils import Cluster
from support.refusals import refusal

from sayo_verl import __version__
from sayo_verl.launch.cluster import (
    Node,
    check_address,
    check_cluster,
    check_cluster_devices,
    check_nodes,
    look_at,
    nodes_with,
    wait_for_devices,
)
from sayo_verl.launch.resources import describe_machines, find_cluster
from sayo_verl.main_ppo import prepare_workers, worker_variables

METIS = (("pymetis", "pip install pymetis"),)
# For the processes of a node, modules in HIDDEN are not installed.
HIDE = """
    import os, sys
    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in os.environ.get("HIDDEN", "").split(","):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Hidden())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(textwrap.dedent(HIDE))
    (folder / "old" / "sayo_verl").mkdir(parents=True)
    (folder / "old" / "sayo_verl" / "__init__.py").write_text('__version__ = "0.0.9"\n')
    return folder


NODES = {"node-1": {}, "node-2": {"PYTHONPATH": "old", "HIDDEN": "pymetis"}, "node-3": {"HIDDEN": "sayo_verl"}}


@pytest.fixture(scope="module")
def cluster(folder):
    """Three nodes, of which the first is right."""
    with pytest.MonkeyPatch.context() as variables:
        variables.setenv("RAY_AUTH_MODE", "disabled")
        variables.setenv("RAY_enable_worker_prestart", "0")
        variables.chdir(folder)  # Ray adds the folder of the driver to the path of workers
        variables.setattr(sys, "argv", [str(folder / "driver.py")])
        # The address file of this machine stays as it is: other runs look for a Ray by it.
        variables.setattr("ray._private.utils.write_ray_address", lambda address: None)
        variables.setattr("ray._common.utils.reset_ray_address", lambda: None)
        cluster = Cluster()
        for name, changed in NODES.items():
            path = [str(folder / changed["PYTHONPATH"])] if "PYTHONPATH" in changed else []
            environment = {**changed, "PYTHONPATH": os.pathsep.join([*path, str(folder)])}
            sizes = {"num_cpus": 8, "num_gpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
            cluster.add_node(node_name=name, env_vars=environment, wait=False, **sizes)
        cluster.wait_for_nodes()
        variables.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
        cluster.shutdown()


@pytest.fixture
def config(base, tmp_path):
    config = copy.deepcopy(base)
    (tmp_path / "train.parquet").touch()
    values = {"trainer.nnodes": 2, "sayo.wait_for_nodes": 0, "data.train_files": str(tmp_path / "train.parquet")}
    for key, value in {**values, "data.val_files": [], "actor_rollout_ref.model.path": "Qwen/Qwen3-VL-8B"}.items():
        OmegaConf.update(config, key, value)
    return config


@pytest.fixture(scope="module")
def answers(cluster):
    """What each node says of itself."""
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        nodes = nodes_with("GPU")
        return dict(zip(nodes, look_at(nodes, METIS, [__file__]), strict=True))
    finally:
        ray.shutdown()


def of_nodes(answers, *names):
    """Arguments of ``check_nodes``."""
    chosen = {node: answers[node] for name in names for node in answers if name in node.name}
    return list(chosen), list(chosen.values())


def test_a_node_with_the_same_packages_passes(answers, config):
    assert sorted(node.name[-7:-1] for node in answers) == sorted(NODES)
    check_nodes(*of_nodes(answers, "node-1"), config, METIS)


@pytest.mark.parametrize(
    ("node", "code", "says"),
    [
        ("node-2", "X05", f"version of sayo-verl .*node .*node-2.* got 0.0.9, wanted {__version__} "),
        ("node-3", "X05", "version of sayo-verl .*node .*node-3.* got none .*No module named 'sayo_verl'"),
    ],
)
def test_a_node_with_other_packages_is_named(answers, config, node, code, says):
    with refusal(code, says):
        check_nodes(*of_nodes(answers, "node-1", node), config, METIS)


def test_a_node_without_metis_is_named_if_the_method_needs_it(answers, config):
    nodes, (right, answer) = of_nodes(answers, "node-1", "node-2")
    answer = {**answer, "sayo-verl": __version__}
    with refusal("L83", "does not have pymetis, which attn_region needs .*node-2.*pip install pymetis"):
        check_nodes(nodes, [right, answer], config, METIS)


def test_a_node_that_does_not_see_a_path_or_has_another_verl_is_named(answers, config):
    nodes, (answer,) = of_nodes(answers, "node-1")
    path = config.data.train_files
    with refusal("L82", f"does not see a path .*node-1.*data.train_files .*{path}"):
        check_nodes(nodes, [{**answer, "paths": [path]}], config, METIS)
    with refusal("X05", "version of verl .*node-1.* got 0.8.0, wanted "):
        check_nodes(nodes, [{**answer, "verl": "0.8.0"}], config, METIS)
    with refusal("X06", "cannot run a task .*node-1.*NodeDiedError"):
        check_nodes(nodes, ["NodeDiedError: the node is dead"], config, METIS)


def test_the_launcher_connects_and_disconnects(cluster, config):
    with refusal("X05", "node .*node-[23]"):
        check_cluster(config, worker_variables(), METIS)
    assert not ray.is_initialized()
    config.trainer.nnodes = 4
    with refusal("L81", "trainer.nnodes=4, .* got 3 node.*node-1.: 1 GPU, 8 CPUs[;,] .*wanted 4 x .1 GPU, 3 CPUs"):
        check_cluster(config, worker_variables(), METIS)
    assert not ray.is_initialized()


def test_devices_are_counted_by_node(base):
    config = copy.deepcopy(base)
    config.trainer.nnodes, config.trainer.n_gpus_per_node = 2, 4
    nodes = [Node("a", "a", devices=8, cpus=24)]
    check_cluster_devices(config, nodes, "")  # verl puts both on one node
    for other in ([Node("a", "a", 8, 23)], [Node("a", "a", 4, 24), Node("b", "b", 3, 24), Node("c", "c", 3, 24)]):
        with refusal("L81", "too few free devices"):
            check_cluster_devices(config, other, "")
    config.trainer.v1.trainer_mode = "separate_async"
    config.actor_rollout_ref.rollout.nnodes, config.actor_rollout_ref.rollout.n_gpus_per_node = 1, 2
    with refusal("L81", "and 2 GPU for rollouts only"):
        check_cluster_devices(config, nodes, "")
    check_cluster_devices(config, [*nodes, Node("b", "b", devices=2, cpus=4)], "")


def test_the_launcher_waits_for_a_node_that_joins_late(config, monkeypatch):
    one, two = (Node(name, name, devices=1, cpus=8) for name in "ab")
    seen = iter([[one], [one], [one, two]])
    monkeypatch.setattr("sayo_verl.launch.cluster.nodes_with", lambda resource: next(seen))
    monkeypatch.setattr("sayo_verl.launch.cluster.time.sleep", lambda seconds: None)
    config.sayo.wait_for_nodes = 600
    assert wait_for_devices(config, "") == [one, two]
    seen = iter([[one]])
    config.sayo.wait_for_nodes = 0
    with refusal("L81", "got 1 node"):
        wait_for_devices(config, "")


def test_an_address_where_nobody_listens_is_refused_at_once(base, monkeypatch):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        check_address(base)
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "no.such.host.invalid:6379", "127.0.0.1"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with refusal("L79", f"at RAY_ADDRESS .* got {address} "):
            check_address(base)
    monkeypatch.setenv("RAY_ADDRESS", "http://10.0.0.1:8265")
    with refusal("L79", "at RAY_ADDRESS .*fix: that is the dashboard's address: use 10.0.0.1:6379"):
        check_address(base)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: [])
    with refusal("L79", r"got auto \(no cluster runs on this machine\)"):
        check_address(base)


def test_a_cluster_that_does_not_accept_the_connection_is_refused(config, monkeypatch):
    def init(**options):
        raise ConnectionError("Failed to connect\nto Ray cluster")

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setattr("ray.init", init)
    with refusal("L80", "got Failed to connect to Ray cluster, .*RAY_AUTH_MODE=token"):
        check_cluster(config, {}, METIS)


@pytest.mark.parametrize("address", [None, "local", "10.0.0.1:6379"])
def test_a_run_that_joins_a_cluster_leaves_the_sizes_of_nodes_to_it(base, monkeypatch, address):
    config = copy.deepcopy(base)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    prepare_workers(config, {"A": "1"})
    sizes = {"num_cpus", "num_gpus", "object_store_memory"} & set(config.ray_kwargs.ray_init)
    joins = address == "10.0.0.1:6379"
    assert config.ray_kwargs.ray_init.address == (address or "local")
    assert sizes == (set() if joins else {"num_cpus", "num_gpus", "object_store_memory"})
    assert config.ray_kwargs.ray_init.runtime_env.env_vars.A == "1"
    assert ("are not used" in describe_machines(base)) == joins


@pytest.mark.parametrize("given", [None, "", "auto", "local", " 10.0.0.2:6379 "])
@pytest.mark.parametrize("variable", [None, "auto", "local", "10.0.0.1:6379"])
def test_the_address_is_the_one_that_ray_uses(base, monkeypatch, given, variable):
    config = copy.deepcopy(base)
    OmegaConf.update(config, "ray_kwargs.ray_init.address", given, force_add=True)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", f" {variable} ")
    used = variable if variable and given in (None, "", "auto") else (given or "").strip()
    assert find_cluster(config)[0] == (None if used in ("", "local") else used)
    assert (find_cluster(config)[1] == "RAY_ADDRESS") == bool(variable and given in (None, "", "auto"))


def test_a_ray_that_was_started_on_this_machine_is_joined_with_the_checks(config, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda folder: address)
        check_address(config)
    with refusal("L79", "the last `ray start` on this machine .*fix: .*RAY_ADDRESS=local"):
        check_address(config)
    assert f"of the Ray cluster at {address} that was started on this machine; RAY_ADDRESS=local" in describe_machines(
        config
    )
    init = mock.Mock(side_effect=ConnectionError("stop here"))
    monkeypatch.setattr("ray.init", init)
    with refusal("L80", f"the last `ray start` on this machine: {address}"):
        check_cluster(config, {}, METIS)
    assert init.call_args.kwargs["address"] is None  # Ray finds it again, and then its token
    prepare_workers(config, {})
    assert not {"num_cpus", "num_gpus", "object_store_memory", "address"} & set(config.ray_kwargs.ray_init)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert find_cluster(config)[0] is None


def test_variables_of_a_submitted_job_are_not_given_twice(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    job = {"runtime_env": {"env_vars": {"HF_HUB_OFFLINE": "1", "VERL_USE_EXTERNAL_MODULES": "sayo_verl.plugin"}}}
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "sayo_verl.plugin")
    assert {"HF_HUB_OFFLINE", "VERL_USE_EXTERNAL_MODULES", "OMP_NUM_THREADS"} < worker_variables().keys()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    left = worker_variables().keys()
    assert not {"HF_HUB_OFFLINE", "VERL_USE_EXTERNAL_MODULES"} & left
    assert "OMP_NUM_THREADS" in left
