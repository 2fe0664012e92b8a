"""The processes of a run, for its watchdog: Ray's actors, which of them died, and what each does now."""

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ANSWER_S = 15.0
SERVER = "vllm_server_"  # verl's names of vLLM's server actors begin so; those of the first node end with _0


@dataclass(frozen=True)
class Actor:
    """An actor of this run's job.

    Attributes:
        kind: its class, such as ``WorkerDict``.
        name: of a named actor, else empty.
        pid, node: its process, and Ray's id of its node.
        place: the address of its node.
        alive: whether Ray runs it.
        died: why it died unexpectedly; empty if it did not.
    """

    kind: str
    name: str
    pid: int
    node: str
    place: str
    alive: bool
    died: str

    def __str__(self) -> str:
        return f"{self.name or self.kind} (pid {self.pid} on {self.place})"


def actors_of_this_job() -> list[Actor]:
    """The actors of this driver's job, as Ray's control store has them; empty for a Ray Client, which cannot ask it."""
    if ray.util.client.ray.is_connected():
        return []
    job = ray.get_runtime_context().get_job_id()
    return [_actor(entry) for entry in ray._private.state.actors().values() if entry["JobID"] == job]


def _actor(entry: Mapping[str, Any]) -> Actor:
    return Actor(
        entry["ActorClassName"].rsplit(".", 1)[-1],
        entry["Name"],
        entry["Pid"],
        entry["Address"]["NodeID"],
        entry["Address"]["IPAddress"],
        entry["State"] == "ALIVE",
        _why_died(entry["DeathCause"]) if entry["State"] == "DEAD" else "",
    )


def _why_died(cause: Any) -> str:
    """Ray's reason of a death that nobody asked for; empty for another (out of scope, ray.kill, exit_actor)."""
    context: Any = getattr(cause, "actor_died_error_context", None)
    if context is None:
        return ""
    reason = context.DESCRIPTOR.fields_by_name["reason"].enum_type.values_by_number[context.reason].name
    if reason not in ("WORKER_DIED", "NODE_DIED") or "INTENDED" in context.error_message:
        return ""
    return " ".join(context.error_message.split())


def activity(pids: Iterable[int], seconds: float = 2.0) -> dict[int, str]:
    """What processes of this machine do: ``stopped``, ``gone``, ``waits``, or the share of a core that they use.

    A child that is stopped makes its parent ``its child NAME (pid) is stopped``.
    """
    pids = list(pids)
    family = {pid: [pid, *_children(pid)] for pid in pids}
    before = {pid: {member: _stat(member) for member in family[pid]} for pid in pids}
    time.sleep(seconds)
    return {pid: _activity(pid, before[pid], seconds) for pid in pids}


def _activity(pid: int, before: Mapping[int, tuple[str, str, int] | None], seconds: float) -> str:
    after = {member: _stat(member) for member in before}
    if after[pid] is None:
        return "gone"
    used = 0
    for member, now in after.items():
        if now and now[1] in "tT":
            return "stopped" if member == pid else f"its child {now[0]} ({member}) is stopped"
        if now and (then := before[member]):
            used += now[2] - then[2]
    share = used / os.sysconf("SC_CLK_TCK") / seconds
    return "waits" if share < 0.05 else f"uses {share:.1f} cores"


def _stat(pid: int) -> tuple[str, str, int] | None:
    """Name, state and used CPU ticks of a process; None if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            name, _, rest = file.read().partition("(")[2].rpartition(")")
    except OSError:
        return None
    fields = rest.split()
    return None if fields[0] in "ZX" else (name, fields[0], int(fields[11]) + int(fields[12]))


def _children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
                for child in map(int, file.read().split()):
                    found += [child, *_children(child)]
    return found


def activity_of(actors: Iterable[Actor]) -> list[tuple[Actor, str]]:
    """Each actor with what it does; a task asks on other nodes. ``unknown`` if a node does not answer."""
    by_node: dict[str, list[Actor]] = {}
    for actor in actors:
        by_node.setdefault(actor.node, []).append(actor)
    here, found = ray.get_runtime_context().get_node_id(), []
    for node, its in by_node.items():
        pids = [actor.pid for actor in its]
        if node == here:
            states = activity(pids)
        else:
            look = ray.remote(num_cpus=0, max_retries=0)(activity)
            place = NodeAffinitySchedulingStrategy(node, soft=False)
            try:
                states = ray.get(look.options(scheduling_strategy=place).remote(pids), timeout=ANSWER_S)
            except ray.exceptions.RayError as error:
                states = dict.fromkeys(pids, f"unknown, its node does not answer ({type(error).__name__})")
        found += [(actor, states[actor.pid]) for actor in its]
    return found
