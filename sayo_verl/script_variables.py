"""Variables that a script does not read: it refuses them and names the replacement. Standard library only."""

from collections.abc import Mapping

from sayo_verl.errors import SayoError

BY_SCRIPT = "SAYO_RESUME_COMMAND"  # set by scripts/lib.sh
# Names from other projects -> what the scripts read
ELSEWHERE = {
    "MODEL": "MODEL_PATH=MODEL in front of the script",
    **dict.fromkeys(
        ("N_GPUS", "N_GPUS_PER_NODE", "NGPUS", "GPUS_PER_NODE", "NUM_GPUS_PER_NODE"),
        "NGPUS_PER_NODE=N in front of the script",
    ),
    **dict.fromkeys(("N_NODES", "NODES"), "NNODES=N in front of the script"),
}


def refuse_unread(replacements: Mapping[str, str], environment: Mapping[str, str]) -> None:
    """In a script's run, refuse a variable that scripts do not read.

    Args:
        replacements: variable -> ``key=``, to which the variable's value is added, or any other instruction.
            Those of ``ELSEWHERE`` are refused too.
        environment: variables of the process.

    Raises:
        SayoError: L67.
    """
    for name, replacement in {**replacements, **ELSEWHERE}.items():
        if environment.get(BY_SCRIPT) and environment.get(name):
            at_end = f"{replacement}{environment[name]} after the script" if replacement.endswith("=") else replacement
            raise SayoError(
                "L67",
                "the scripts do not read this variable",
                where=name,
                got=environment[name],
                fix=f"use {at_end}, and unset {name}",
            )
