"""Settings that verl obeys without a word and that harm a run, whatever its estimator.

They lose a checkpoint, open the dashboard to a network, run the code of a model, leave out a correction, or read a path
as text. verl reports none of them.
"""

import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf

from sayo_verl.errors import Rule, did_you_mean, raise_first
from sayo_verl.launch.resume import parts_of
from sayo_verl.methods import Method
from sayo_verl.models.location import is_hub_name

KEEP = "trainer.max_actor_ckpt_to_keep"
DASHBOARD = "ray_kwargs.ray_init.dashboard_host"
TRUST = "actor_rollout_ref.model.trust_remote_code"
CORRECTION = "algorithm.rollout_correction"
LOG_PROBS = "actor_rollout_ref.rollout.calculate_log_probs"
TEMPLATE = "actor_rollout_ref.model.custom_chat_template"
LOGGER = "trainer.logger"
ALL_ADDRESSES = ("0.0.0.0", "::", "*")
# Packages that verl's trackers import when training begins (verl/utils/tracking.py); the others need none.
TRACKERS = {
    "wandb": "wandb",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "vemlp_wandb": "volcengine_ml_platform",
    "tensorboard": "tensorboard",
    "clearml": "clearml",
    "trackio": "trackio",
}


def check_hazards(config: DictConfig, method: Method | None, *, here: bool) -> None:
    """Refuse the settings of this module.

    Args:
        config: the composed configuration.
        method: the run's method, or what observes attention for recorded rollouts; None if attention is not measured.
        here: the run uses the packages of this machine.

    Raises:
        SayoError: L76 for a checkpoint folder that may be left without a complete checkpoint, X30 for a dashboard on
            all addresses, X31 for code of a model, X32 for a correction that verl leaves out, X33 for a chat template
            that is a path, X34 for a tracker that cannot start, X35 for a run without a
            step, X36 for equal responses.
    """
    raise_first([*_rules(config, method), *_of_trackers(config, here=here)])


def describe_model_code(config: DictConfig) -> str | None:
    """For the plan: the model's own code runs. None without ``trust_remote_code``."""
    if not OmegaConf.select(config, TRUST):
        return None
    return f"RUNS the .py files of {config.actor_rollout_ref.model.path} in every process (trust_remote_code)"


def _rules(config: DictConfig, method: Method | None) -> list[Rule]:
    path = str(config.actor_rollout_ref.model.path)
    correction = config.algorithm.get("rollout_correction") or {}
    asked = [key for key in ("bypass_mode", "rollout_is", "rollout_rs") if correction.get(key)]
    template = OmegaConf.select(config, TEMPLATE)
    trusted = bool(OmegaConf.select(config, TRUST))
    host = str(OmegaConf.select(config, DASHBOARD) or "")
    saves = int(config.trainer.save_freq) > 0
    lengths = {f"trainer.{key}": config.trainer[key] for key in ("total_epochs", "total_training_steps")}
    kept = {
        **{
            key: config.trainer.get(key.rpartition(".")[2]) == 1
            for key in (KEEP.replace("actor", part) for part in parts_of(config))
        },
        "trainer.remove_previous_ckpt_in_save": bool(config.trainer.get("remove_previous_ckpt_in_save", False)),
    }
    return [
        *(
            Rule(
                "X35",
                length is not None and length < 1 and not config.trainer.val_only,
                "the run has no step",
                where=key,
                got=length,
                wanted="at least 1",
                fix="raise it",
            )
            for key, length in lengths.items()
        ),
        *(
            Rule(
                "L76",
                saves and one,
                "verl deletes the only other checkpoint before the new one is complete: a run that is killed in "
                "between has none to resume",
                where=key,
                got=OmegaConf.select(config, key),
                wanted="2 or more checkpoints",
                fix=f"set {key}=2" if key.endswith("to_keep") else f"leave it out and set {KEEP}=2",
            )
            for key, one in kept.items()
        ),
        Rule(
            "X30",
            host in ALL_ADDRESSES
            and OmegaConf.select(config, "ray_kwargs.ray_init.include_dashboard") is not False
            and not _joins_cluster(config),
            "Ray's dashboard would listen on all addresses: whoever reaches its port can run commands as you",
            where=DASHBOARD,
            got=host,
            wanted="an address of this machine only, such as Ray's default 127.0.0.1",
            fix="leave it out, and reach the dashboard by ssh -L 8265:127.0.0.1:8265",
        ),
        Rule(
            "X31",
            trusted and method is not None,
            "the model's own code would replace the classes whose attention is read; no supported family needs it",
            where=TRUST,
            got=True,
            fix="set it to False",
        ),
        Rule(
            "X31",
            trusted and is_hub_name(path),
            "code of the hub would run in every process, and verl cannot pin its revision",
            where=TRUST,
            got=f"True, with the hub's {path}",
            wanted="a folder whose .py files you have read",
            fix="download it (hf download ... --revision ... --local-dir FOLDER) and set "
            "actor_rollout_ref.model.path=FOLDER, or set it to False",
        ),
        Rule(
            "X32",
            bool(asked) and not OmegaConf.select(config, LOG_PROBS),
            "the correction needs the log-probs of the rollout engine; without them verl leaves it out",
            where=f"{CORRECTION}.{asked[0] if asked else ''}",
            got=f"{correction.get(asked[0]) if asked else ''}, with {LOG_PROBS}=False",
            fix=f"set {LOG_PROBS}=True, or leave the correction out",
        ),
        Rule(
            "X36",
            bool(config.actor_rollout_ref.rollout.get("full_determinism", False)),
            "verl's V1 trainer would give all responses of a prompt one seed: they are equal, and every advantage is 0",
            where="actor_rollout_ref.rollout.full_determinism",
            got=True,
            fix="leave it out; sayo.repeatable_rollouts=True makes rollouts repeatable",
        ),
        Rule(
            "X33",
            bool(template) and "{" not in str(template),
            "verl reads this as the text of the chat template, not as a file: every prompt would be this text",
            where=TEMPLATE,
            got=template,
            wanted="the text of a Jinja template",
            fix="save the template as chat_template.jinja in a copy of the model folder and name that folder",
        ),
    ]


def _joins_cluster(config: DictConfig) -> bool:
    """Whether the run uses a Ray that runs already, whose dashboard is not started here."""
    address = OmegaConf.select(config, "ray_kwargs.ray_init.address") or os.environ.get("RAY_ADDRESS")
    return bool(address) and address != "local"


def _of_trackers(config: DictConfig, *, here: bool) -> list[Rule]:
    """verl starts its trackers when the models are loaded and the engine is up."""
    from verl.utils.tracking import Tracking

    known = Tracking.supported_backend
    named = config.trainer.logger
    loggers = [named] if isinstance(named, str) else list(named or [])
    rules = []
    for name in map(str, loggers):
        package = TRACKERS.get(name)
        rules += [
            Rule(
                "X34",
                name not in known,
                f"unknown logger{did_you_mean(name, known)}",
                where=LOGGER,
                got=name,
                wanted=", ".join(known),
                fix="correct the name",
            ),
            Rule(
                "X34",
                here and package is not None and find_spec(package) is None,
                "the package of a logger is not installed",
                where=LOGGER,
                got=f"{name}, without the package {package}",
                fix=f"pip install {package}, or leave {name} out",
            ),
        ]
    rules.append(
        Rule(
            "X34",
            here and "wandb" in loggers and not _wandb_can_start(os.environ),
            "Weights & Biases has no key, and would end the run when the models are loaded",
            where=LOGGER,
            got="wandb, without WANDB_API_KEY and without a login of this user",
            fix="run wandb login, export WANDB_MODE=offline, or leave wandb out",
        )
    )
    return rules


def _wandb_can_start(environment: Mapping[str, str]) -> bool:
    """False only if nothing tells W&B how to start; with a host of its own settings any login is enough."""
    given = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    if environment.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or any(map(environment.get, given)):
        return True
    # Settings of `wandb offline` and `wandb login --host`: in the run's folder, and the user's own.
    own = Path(environment.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    folder = Path(environment.get("WANDB_DIR") or ".")
    files = [place / "settings" for place in (folder / "wandb", folder / ".wandb", own)]
    said = "".join(file.read_text(errors="replace") for file in files if file.is_file())
    starts = r"^\s*(mode\s*=\s*(offline|disabled|dryrun)|disabled\s*=\s*true|api_key\s*=|identity_token_file\s*=)"
    if re.search(starts, said, re.MULTILINE):
        return True
    file = Path(environment.get("NETRC") or "~/.netrc").expanduser()
    base = environment.get("WANDB_BASE_URL") or ("" if "base_url" in said else "https://api.wandb.ai")
    host = urlsplit(base).hostname
    try:
        logins = netrc(file)
    except (OSError, NetrcParseError):
        return False
    return bool(logins.hosts) if host is None else logins.authenticators(host) is not None
