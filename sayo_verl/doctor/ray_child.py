"""Ray in a process of its own: it starts while the other checks import torch and verl, and prints one JSON line.

Without an address it starts a small Ray on this machine and stops it. With one it joins that cluster, runs one short
task on each node, and leaves: nothing of the cluster is started or stopped.
"""

import json
import os
import signal
import subprocess
import sys
from typing import Any

from sayo_verl.doctor.finding import Finding
from sayo_verl.doctor.packages import check_plugin, plugin_state
from sayo_verl.errors import SayoError

LIMIT_S = 150.0  # a node may have to build its environment for two minutes
PREFIX = "SAYO-DOCTOR "
ENVIRONMENT = {"VERL_USE_EXTERNAL_MODULES": "sayo_verl.plugin"}


def start(address: str | None) -> subprocess.Popen[str]:
    """The process of this module; ``address`` of a cluster that is up, or None."""
    command = [sys.executable, "-m", "sayo_verl.doctor.ray_child", *([address] if address else [])]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=_environment()
    )


def _environment() -> dict[str, str]:
    return {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}


def findings(child: subprocess.Popen[str], address: str | None) -> list[Finding]:
    """What the process found; a finding of its own if it ends without a result."""
    try:
        out, err = child.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        out, err = "", f"no answer in {LIMIT_S:.0f} s"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    line = next((line for line in out.splitlines() if line.startswith(PREFIX)), None)
    if line is None:
        said = (err.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        fix = "see the log in /tmp/ray/session_latest/logs; `ray stop` ends what is left of an earlier Ray"
        where = f"the cluster at {address}" if address else "a local Ray"
        return [Finding("ray.start", where, said[:300], "a Ray that answers", False, fix)]
    return of_result(json.loads(line.removeprefix(PREFIX)))


def of_result(result: dict[str, Any]) -> list[Finding]:
    """Findings from the JSON line: ``error``, or ``nodes``; ``listening`` and ``token`` of a local Ray."""
    if "error" in result:
        return [Finding("ray.cluster", "cluster", result["error"], "a cluster that answers", False, result["fix"])]
    found = []
    for number, (name, state) in enumerate(result["nodes"], 1):
        if different := state.get("different"):
            fix = "install the same versions on every node, or use one environment that all nodes mount"
            found.append(Finding(f"ray.versions_{number}", f"versions on {name}", different, "the same", False, fix))
        found.append(check_plugin(name, state, f"ray.worker_{number}"))
    if "listening" in result:
        found.append(_addresses(result["listening"], token=result["token"]))
    return found


def _addresses(listening: dict[str, list[str]], *, token: bool) -> Finding:
    everywhere = [name for name, addresses in listening.items() if {"0.0.0.0", "::"} & set(addresses)]
    apart = [
        f"{name} on {address}"
        for name, addresses in listening.items()
        for address in addresses
        if address not in ("0.0.0.0", "::", "127.0.0.1", "::1")
    ]
    return Finding(
        "ray.addresses",
        "addresses",
        f"on all addresses: {', '.join(everywhere) or 'nothing'}; on one: {', '.join(apart) or 'nothing'}; "
        f"token authentication {'on' if token else 'OFF'}",
        "token authentication: whoever reaches these ports can run commands as you otherwise",
        token,
        "unset RAY_AUTH_MODE, or set it to token, with a token of `ray get-auth-token --generate`",
    )


def listening() -> dict[str, list[str]]:
    """Process -> addresses on which it listens, of this process and its children."""
    import psutil  # Ray's own copy

    found: dict[str, set[str]] = {}
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            name = "driver" if process == me else process.name()
            places = {c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        except psutil.Error:  # it has ended
            continue
        if places:
            found.setdefault(name, set()).update(places)
    return {name: sorted(places) for name, places in found.items()}


def local() -> dict[str, Any]:
    """The plug-in in a worker of a small Ray, and what that Ray listens on."""
    import ray
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=100_000_000,
    )
    try:
        state = ray.get(ray.remote(plugin_state).remote())
        return {"nodes": [["a Ray worker", state]], "listening": listening(), "token": is_token_auth_enabled()}
    finally:
        ray.shutdown()


def joined(address: str) -> dict[str, Any]:
    """The versions and the plug-in on every node of a cluster."""
    import ray

    from sayo_verl.launch.cluster import check_reachable, connect, differences, look_at, nodes_with

    try:
        check_reachable(address, "--address")
        connect(address, "--address", {"env_vars": ENVIRONMENT})
    except SayoError as error:
        return {"error": str(error), "fix": error.fix}
    try:
        nodes = nodes_with("GPU")
        found: list[list[Any]] = []
        for node, answer in zip(nodes, look_at(nodes, (), (), plugin=True), strict=True):
            if isinstance(answer, str):
                found.append([node.name, {"version": "unknown", "estimators": answer}])
                continue
            different = "; ".join(f"{name} {got}, here {own}" for name, got, own in differences(answer))
            state = {"version": answer["sayo-verl"], "estimators": answer["estimators"], "different": different}
            found.append([node.name, state])
        return {"nodes": found}
    finally:
        ray.shutdown()


if __name__ == "__main__":
    print(PREFIX + json.dumps(joined(sys.argv[1]) if sys.argv[1:] else local()), flush=True)
