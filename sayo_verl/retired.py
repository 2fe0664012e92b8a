"""Variables that the scripts of earlier versions read: a script refuses them and names the replacement."""

from collections.abc import Mapping

from sayo_verl.errors import SayoError

BY_SCRIPT = "SAYO_RESUME_COMMAND"  # scripts/lib.sh sets it


def refuse_retired(replacements: Mapping[str, str], environment: Mapping[str, str]) -> None:
    """In a script's run, refuse a variable that scripts no longer read.

    Args:
        replacements: variable -> ``key=``, to which the variable's value is added, or any other instruction.
        environment: variables of the process.

    Raises:
        SayoError: L67.
    """
    for name, replacement in replacements.items():
        if environment.get(BY_SCRIPT) and environment.get(name):
            at_end = f"{replacement}{environment[name]} after the script" if replacement.endswith("=") else replacement
            raise SayoError(
                "L67",
                "the scripts no longer read this variable",
                where=name,
                got=environment[name],
                fix=f"use {at_end}, and unset {name}",
            )
