"""Launch files of clusters: they parse, have only keys of their schema, and name what exists.

Checked once by hand beyond this: kuberay.yaml against the definition of RayJob in KubeRay (August 2026) without unknown
keys, skypilot.yaml against the task schema of SkyPilot 0.14.1, the scripts with shellcheck.
"""

import os
import re
import socket
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from ray.runtime_env import RuntimeEnv

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "cluster"
FILES = sorted(path.name for path in FOLDER.iterdir())
KEYS = {
    "kuberay.yaml": {
        "": {"apiVersion", "kind", "metadata", "spec"},
        "spec": {"entrypoint", "runtimeEnvYAML", "shutdownAfterJobFinishes", "rayClusterSpec"},
        "spec.rayClusterSpec": {"rayVersion", "headGroupSpec", "workerGroupSpecs"},
        "spec.rayClusterSpec.headGroupSpec": {"rayStartParams", "template"},
    },
    "skypilot.yaml": {
        "": {"name", "num_nodes", "resources", "workdir", "envs", "secrets", "setup", "run"},
        "resources": {"accelerators", "disk_size"},
    },
    "runtime_env.yaml": {"": {"working_dir", "excludes"}},
}


@pytest.mark.parametrize("name", FILES)
def test_a_launch_file_says_in_its_header_what_was_not_run(name):
    header = "".join(line for line in (FOLDER / name).read_text().splitlines()[:15] if line.startswith("#"))
    assert re.search(r"not run\b|not on two machines", header, re.IGNORECASE)


@pytest.mark.parametrize("name", FILES)
def test_a_launch_file_names_scripts_and_settings_that_exist(repo, name):
    text = (FOLDER / name).read_text()
    for script in re.findall(r"scripts/[\w/]+\.(?:sh|yaml)", text):
        assert (repo / script).is_file()
    settings = yaml.safe_load((repo / "sayo_verl" / "config" / "sayo_trainer.yaml").read_text())["sayo"]
    assert set(re.findall(r"\bsayo\.(\w+)=", text)) <= settings.keys()


@pytest.mark.parametrize("name", sorted(KEYS))
def test_a_yaml_file_has_keys_of_its_schema(name):
    content = yaml.safe_load((FOLDER / name).read_text())
    for path, allowed in KEYS[name].items():
        node = content
        for key in filter(None, path.split(".")):
            node = node[key]
        assert node.keys() <= allowed


def test_the_workers_of_the_kubernetes_job_have_the_devices_that_it_asks_for():
    spec = yaml.safe_load((FOLDER / "kuberay.yaml").read_text())["spec"]
    asked = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert str(group["replicas"]) == asked["NNODES"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == asked["NGPUS_PER_NODE"]


def test_ray_takes_the_runtime_environment(repo, monkeypatch):
    monkeypatch.chdir(repo)
    RuntimeEnv(**yaml.safe_load((FOLDER / "runtime_env.yaml").read_text()))


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".sh")])
def test_a_script_has_valid_syntax(name):
    subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)
    skypilot = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=skypilot[part], text=True, check=True)


@pytest.fixture
def node(tmp_path):
    """Starts ``node.sh`` with commands of the test, such as ``ray``."""

    def start(fakes, rank, port, *command):
        for name, code in fakes.items():
            (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{code}\n")
            (tmp_path / name).chmod(0o755)
        variables = {
            "RAY_TMPDIR": str(tmp_path / "tmp"),
            "NODE_RANK": rank,
            "NNODES": "2",
            "HEAD_IP": "127.0.0.1",
            "RAY_PORT": str(port),
        }
        return subprocess.Popen(
            ["bash", str(FOLDER / "node.sh"), *command],
            env={**variables, "PATH": f"{tmp_path}:/usr/bin:/bin"},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def listener(port=0):
    return socket.create_server(("127.0.0.1", port))


def test_the_first_machine_does_not_use_the_head_of_another_job(node, tmp_path):
    with listener() as other:
        port = other.getsockname()[1]
        done = node({"ray": "touch started"}, "0", port, "touch", "ran")
        _, error = done.communicate(timeout=20)
    assert done.returncode == 1
    assert f"another process listens at 127.0.0.1:{port}: end it, or set RAY_PORT" in error
    assert not {"started", "ran"} & set(os.listdir(tmp_path))


def test_the_first_machine_ends_at_once_with_the_status_of_a_head_that_did_not_start(node, tmp_path):
    with listener() as other:
        port = other.getsockname()[1]
    done = node({"ray": "exit 7"}, "0", port, "touch", "ran")
    done.communicate(timeout=20)
    assert done.returncode == 7
    assert not (tmp_path / "ran").exists()


def test_another_machine_leaves_after_five_failures_in_a_row(node, tmp_path):
    for name in ("asleep", "awake"):
        os.mkfifo(tmp_path / name)
    head = listener()
    port = head.getsockname()[1]
    address_file = tmp_path / "tmp" / "ray" / "ray_current_cluster"
    address_file.parent.mkdir(parents=True)
    ray = f"printf 127.0.0.1:{port} >{address_file}; exec /bin/sleep 60"
    done = node({"ray": ray, "sleep": "echo >asleep; read -r _ <awake"}, "1", port)
    for answers in [False] * 4 + [True] + [False] * 5:  # what the probe after this sleep finds
        (tmp_path / "asleep").read_text()
        head.close()
        if answers:
            head = listener(port)
        (tmp_path / "awake").write_text("\n")
    with closing(head):
        assert done.wait(timeout=20) == 0
    assert not address_file.exists()
