"""The processor of a model folder: loaded as its family needs, and compared with the weights.

transformers and verl are imported when a processor is loaded, not with this module.
"""

from typing import Any

from sayo_verl.errors import SayoError
from sayo_verl.models.families import Family, check_processor, family_of

REPLACE = "copy the processor files of the original model into the folder"


def load(path: str, where: str, fix: str = "correct it") -> tuple[Family, Any, Any]:
    """The family, the configuration and the processor of a model.

    Args:
        path: folder or hub name.
        where: names the flag or key that names the model, for messages.
        fix: of L17.

    Raises:
        SayoError: L17 without a model at this path, L18 for an unknown family, L23 for the processor of another family,
            D68 for a processor that cannot be loaded or does not belong to the weights.
    """
    from transformers import AutoConfig, AutoProcessor

    from sayo_verl.models import internvl_model
    from sayo_verl.models.internvl import model_type_of

    model_type = model_type_of(path)
    if model_type is None:
        raise SayoError(
            "L17",
            "there is no model in this folder, or the hub cannot be reached for a model of this name",
            where=where,
            got=path,
            wanted="a local model folder, or a hub name such as Qwen/Qwen3-VL-8B-Instruct and access to the hub",
            fix=fix,
        )
    where = f"{where} {path}"
    family = family_of(model_type, where=where)
    tiled = family.geometry == "tiles"
    try:
        config = AutoConfig.from_pretrained(path)
        processor = (internvl_model.load_processor if tiled else AutoProcessor.from_pretrained)(path)
    except (OSError, ValueError, KeyError) as error:
        raise SayoError(
            "D68",
            f"the model's processor cannot be loaded ({' '.join(str(error).split())[:200]})",
            where=where,
            fix=REPLACE,
        ) from error
    check_processor(type(processor).__name__, family, where)
    if tiled:
        got, wanted = ({"image_seq_length": own.image_seq_length} for own in (processor, config))
    else:  # with other patches or another merge size the grid would differ
        images, vision = processor.image_processor, config.vision_config
        got = {"patch_size": images.patch_size, "merge_size": images.merge_size}
        wanted = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    token = getattr(processor, "image_token_id", None)
    if token is not None:
        got, wanted = {**got, "image_token_id": token}, {**wanted, "image_token_id": config.image_token_id}
    if got != wanted:
        raise SayoError(
            "D68",
            "the processor does not make the visual tokens of these weights",
            where=where,
            got=got,
            wanted=wanted,
            fix=REPLACE,
        )
    return family, config, processor


def row_reader(family: Family, processor: Any, options: dict[str, Any]) -> Any:
    """verl's data set for a family, for its processing of one row: it reads no file.

    Args:
        family: the model's.
        processor: the model's.
        options: ``apply_chat_template_kwargs`` and ``mm_processor_kwargs`` of the run's ``data``.
    """
    from omegaconf import OmegaConf
    from verl.utils.dataset.rl_dataset import RLHFDataset

    from sayo_verl.models import internvl_data

    base = internvl_data.InternVLDataset if family.geometry == "tiles" else RLHFDataset

    class Rows(base):  # type: ignore[misc, valid-type]
        def _download(self, use_origin_parquet: bool = False) -> None:
            pass

        def _read_files_and_tokenize(self) -> None:
            pass

    return Rows([], processor.tokenizer, OmegaConf.create(options), processor)
