"""Are numbers and switches of the configuration of the type that verl or a check of ours reads?"""

import typing
from collections.abc import Mapping
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from sayo_verl.errors import SayoError
from sayo_verl.launch.job import leaves
from sayo_verl.launch.limits import LIMITS

# Settings of verl whose default is null and that no dataclass of verl describes -> their types
NUMBERS = dict.fromkeys(
    (
        "data.gen_batch_size",
        "data.val_batch_size",
        "data.seed",
        "trainer.total_training_steps",
        "trainer.max_actor_ckpt_to_keep",
        "trainer.max_critic_ckpt_to_keep",
        "ray_kwargs.ray_init.num_cpus",
    ),
    int | None,
)
OPTIONAL = (int | None, float | None)
WHOLE = (int, int | None)
MAY_BE_NULL = ("trainer.v1.sampler.max_off_policy_threshold",)  # a number by default; null turns it off


def check_types(config: DictConfig, defaults: DictConfig) -> None:
    """Refuse text or null for a number, and text for true or false. verl would fail late, or take "no" as true.

    The type is that of the default, or that of the field of verl's dataclass if the default is null.

    Args:
        config: the composed configuration.
        defaults: the same without overrides.

    Raises:
        SayoError: L73.
    """
    plain: Any = [OmegaConf.to_container(part, resolve=False) for part in (config, defaults)]
    values, fields = dict(leaves(plain[0])), _fields(plain[1])
    for key, default in leaves(plain[1]):
        if key in LIMITS:
            continue  # a number or off, with a check of their own
        value, field = values.get(key), fields.get(key, NUMBERS.get(key))
        text = isinstance(value, str) and not value.startswith("${")
        number = isinstance(default, bool | int | float) or (default is None and field in OPTIONAL)
        whole = field in WHOLE and isinstance(value, float) and not value.is_integer()
        absent = key in values and value is None and not isinstance(default, bool) and _needs_value(key, default, field)
        if (number and text) or whole or absent:
            example = "" if default is None else f", such as {default}"
            raise SayoError(
                "L73",
                "a value of the wrong type",
                where=key,
                got="null" if absent else repr(value),
                wanted="true or false"
                if isinstance(default, bool)
                else f"{'an integer' if field in WHOLE else 'a number'}{example}",
                fix="correct it",
            )


def _needs_value(key: str, default: Any, field: Any) -> bool:
    """Whether null in place of the default, a number, would be a failure of verl or of our checks."""
    if not isinstance(default, int | float) or key in MAY_BE_NULL:
        return False
    return field in (int, float) or (field is None and key.partition(".")[0] in ("data", "trainer", "sayo"))


def _fields(part: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> type of the field, for groups that verl makes a dataclass of (``_target_``)."""
    target = part.get("_target_")
    try:
        hints = typing.get_type_hints(get_class(target)) if target else {}
    except ImportError:  # an engine that is not installed
        hints = {}
    found = {f"{prefix}{name}": hint for name, hint in hints.items() if name in part}
    for key, value in part.items():
        if isinstance(value, Mapping):
            found |= _fields(value, f"{prefix}{key}.")
    return found
