"""The model that is evaluated: a checkpoint of verl, a model folder or a name of the hub.

Error codes: E01 no model there, E02 shards are missing, E03 a LoRA adapter that is not merged, E07 no class of the
harness for this model.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sayo_verl.errors import SayoError

# model_type of a configuration -> class of lmms-eval that runs it with transformers
CLASSES = {
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "qwen3_5": "qwen3_5",
    "qwen3_5_moe": "qwen3_5",
    "qwen2_5_vl": "qwen2_5_vl",
    "internvl": "internvl_hf",
}
KNOWN_CLASSES = ", ".join(dict.fromkeys(CLASSES.values()))
FOLD = "peft.PeftModel.from_pretrained(model, ADAPTER).merge_and_unload().save_pretrained(FOLDER)"


@dataclass(frozen=True)
class Model:
    """What to evaluate.

    Attributes:
        name: as it was given.
        shards: the folder of a checkpoint that has to be merged first, or None.
        source: folder whose configuration is read, or None for a name of the hub.
    """

    name: str
    shards: Path | None
    source: Path | None

    @property
    def model_type(self) -> str | None:
        """``model_type`` of the configuration, or None for a name of the hub."""
        return None if self.source is None else _read(self.source / "config.json").get("model_type")

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Fewest and most pixels of an image by the model's own processor, or None if it does not say."""
        for file in ("processor_config.json", "preprocessor_config.json"):
            if self.source is not None and (self.source / file).is_file():
                config = _read(self.source / file)
                size = config.get("image_processor", config).get("size") or {}
                if {"shortest_edge", "longest_edge"} <= size.keys():
                    return size["shortest_edge"], size["longest_edge"]
        return None

    def harness_class(self) -> str:
        """The class of lmms-eval that runs this model with transformers.

        Raises:
            SayoError: E07.
        """
        if self.model_type not in CLASSES:
            got = f"model_type {self.model_type}" if self.source else f"{self.name}, a name of the hub"
            fix = f"name the class: --model-class, such as {KNOWN_CLASSES}"
            fix += "" if self.source else "; or download the model and name its folder"
            wanted = "model_type " + ", ".join(CLASSES)
            raise SayoError(
                "E07",
                "no class of lmms-eval is known for this model",
                where="--model-class",
                got=got,
                wanted=wanted,
                fix=fix,
            )
        return CLASSES[self.model_type]


def find_model(name: str) -> Model:
    """Look at what was given, before anything is loaded.

    Raises:
        SayoError: E01, E02, E03.
    """
    folder = Path(name).expanduser().absolute()
    if not folder.is_dir():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name.split("/")[0]).exists():
            return Model(name, None, None)
        fix = "give a checkpoint folder (.../global_step_N/actor), a model folder, or a name of the hub"
        raise SayoError("E01", "there is no such folder", where="MODEL", got=name, fix=fix)
    if folder.name.startswith("global_step_") and (folder / "actor").is_dir():
        folder /= "actor"
    # verl writes lora_train_meta.json beside the shards; its merger puts the adapter apart, in lora_adapter.
    for file in ("lora_train_meta.json", "adapter_config.json", "lora_adapter/adapter_config.json"):
        if (folder / file).is_file():
            shards = file == "lora_train_meta.json"
            what = "a LoRA checkpoint: verl's merger leaves the adapter beside the base model, which would be evaluated"
            fix = "run python -m verl.model_merger, then " if shards else ""
            fix += f"merge the adapter into the model with peft ({FOLD}) and name the new folder"
            raise SayoError("E03", what, where="MODEL", got=folder / file, fix=fix)
    if (folder / "config.json").is_file():
        return Model(name, None, folder)
    _check_shards(folder)
    return Model(name, folder, folder / "huggingface")


def _check_shards(folder: Path) -> None:
    """Refuse a folder that verl's merger could not merge: E01, E02."""
    present = {path.name for path in folder.iterdir()}
    if not any(name.startswith("model_world_size_") for name in present) and "fsdp_config.json" not in present:
        what = "the folder has neither a config.json nor the shards of an FSDP checkpoint"
        fix = "name .../global_step_N/actor, or a model folder; a checkpoint of Megatron is not merged here"
        raise SayoError("E01", what, where="MODEL", got=folder, fix=fix)
    wanted = ["fsdp_config.json", "huggingface"]
    if "fsdp_config.json" in present:
        ranks = _read(folder / "fsdp_config.json")["world_size"]
        wanted += [f"model_world_size_{ranks}_rank_{rank}.pt" for rank in range(ranks)]
    missing = [name for name in wanted if name not in present]
    missing += [] if missing or (folder / "huggingface" / "config.json").is_file() else ["huggingface/config.json"]
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        fix = "copy the files of all ranks into one folder (on several nodes each keeps its own), or take another step"
        raise SayoError("E02", "the checkpoint is not complete", where=str(folder), got=f"missing: {shown}", fix=fix)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        fix = "copy the folder again, or take another step"
        raise SayoError("E02", "a file of the model is not valid JSON", where=str(path), got=error, fix=fix) from error
