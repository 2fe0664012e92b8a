"""The engine of the rollouts: is it installed, and does verl pass it what this run needs?

Attention is measured in the trainer's own pass over verl's token ids, whichever engine sampled them.
"""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from omegaconf import DictConfig, OmegaConf

from sayo_verl.errors import Rule, SayoError, did_you_mean, raise_first
from sayo_verl.methods import Method

NAME = "actor_rollout_ref.rollout.name"
PACKAGES = {"vllm": "vllm", "sglang": "sglang", "trtllm": "tensorrt_llm"}
HOW = {
    "vllm": "pip install 'sayo-verl[gpu]'",
    "sglang": "use an image of verl with SGLang; pip cannot resolve verl[sglang] 0.9.1 (docs/gpu.md)",
    "trtllm": "use an image of verl with TensorRT-LLM",
}


def check_rollout_engine(config: DictConfig, method: Method | None, *, dry_run: bool) -> str:
    """Check ``rollout.name``.

    Args:
        config: the composed configuration.
        method: the run's method; None for an estimator of verl's own.
        dry_run: report an engine that is not installed here instead of refusing it.

    Returns:
        A line for the plan.

    Raises:
        SayoError: L84 for an engine that is unknown or not installed, L85 for one that cannot do what the run asks for.
    """
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY

    known = sorted({engine for engine, _ in _ROLLOUT_REGISTRY})
    missing = OmegaConf.is_missing(config.actor_rollout_ref.rollout, "name")  # verl has no default
    name = "" if missing else str(config.actor_rollout_ref.rollout.name)
    if name not in known:
        raise SayoError(
            "L84",
            f"unknown rollout engine{did_you_mean(name, known)}",
            where=NAME,
            got=name or "none",
            wanted=", ".join(known),
            fix=f"set {NAME}=vllm" if missing else "correct the name",
        )
    raise_first(
        [
            Rule(
                "L85",
                name == "trtllm" and method is not None,
                "verl sends TensorRT-LLM the prompt as text, to be split into tokens again, and pins no version of it; "
                "attention methods were not checked with it",
                where=NAME,
                got=name,
                wanted="vllm or sglang",
                fix="set it to vllm",
            ),
            Rule(
                "L85",
                name == "sglang" and bool(config.data.get("mm_processor_kwargs")),
                "verl's SGLang server takes no mm_processor_kwargs, so every rollout fails",
                where="data.mm_processor_kwargs",
                got=config.data.get("mm_processor_kwargs"),
                fix=f"set {NAME}=vllm, or leave it out and prepare images of the wanted size (not for InternVL)",
            ),
        ]
    )
    package = PACKAGES.get(name)
    if package is None:
        return f"{name} - not checked: an engine of your own"
    if find_spec(package) is None:
        if dry_run:
            return f"{name} - NOT THERE YET, needed before the run: {HOW[name]}"
        raise SayoError("L84", "the rollout engine is not installed", where=NAME, got=name, fix=HOW[name])
    try:
        found = f"{name} {version(package)}"
    except PackageNotFoundError:  # the CPU build of vLLM has another name
        found = name
    if name == "sglang":
        return f"{found}: composed and checked, not run; image placeholders are kept out of responses by a logit bias"
    return found
