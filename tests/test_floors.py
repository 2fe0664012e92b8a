"""Which room of the package may import which. Every import counts, also one within a function."""

import ast
from collections import defaultdict
from pathlib import Path

# From bottom to top. A room imports rooms of lower floors only; so there is no circle, and none within a floor.
FLOORS = """
redact
errors
metrics command_line estimates
script_variables evaluation scenes
vision models reward metis
view probe
data
methods inspection
report tiny
focus look
diagnose
launch
hooks
main_ppo plugin prepare anchoring doctor
cli
"""
STACK = {"verl", "ray", "vllm", "transfer_queue"}
STACK_ROOMS = {
    "hooks": "engine, trainer, store and estimators stand in for verl's",
    "launch": "the checks call what verl will call with the same settings",
    "models": "an adapter gives verl a model family that it lacks",
    "look": "vLLM answers in a process of its own",
    "inspection": "a row is shown as verl's data set gives it to the model",
    "doctor": "asks verl's registries and Ray what a run would find there",
    "main_ppo": "starts verl's task runner",
}

FLOOR = {room: floor for floor, rooms in enumerate(FLOORS.split("\n")) for room in rooms.split()}


def imports_of(source: str) -> set[str]:
    """Dotted names that a module imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides the room that it comes from"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_rooms_import_downwards_and_only_some_import_the_stack(repo: Path):
    package = repo / "sayo_verl"
    arrows, stack = defaultdict(set), defaultdict(set)
    for file in package.rglob("*.py"):
        room = file.relative_to(package).with_suffix("").parts[0]
        for name in imports_of(file.read_text()):
            top, _, rest = name.partition(".")
            if top in STACK:
                stack[room].add(str(file))
            elif top == "sayo_verl" and rest != "__version__":
                arrows[room, rest.partition(".")[0]].add(str(file))
    rooms = {room for arrow in arrows for room in arrow} | {"errors"}
    assert rooms == FLOOR.keys(), "FLOORS names every room once"
    upwards = {a: files for a, files in arrows.items() if len(set(a)) > 1 and FLOOR[a[0]] <= FLOOR[a[1]]}
    assert not upwards
    assert not {room: files for room, files in stack.items() if room not in STACK_ROOMS}
    assert stack.keys() == STACK_ROOMS.keys(), "a room that no longer imports verl loses its permission"


def test_an_import_within_a_function_counts():
    assert imports_of("def f():\n    from verl.utils import x\n    import ray.util\n") == {"verl.utils.x", "ray.util"}
