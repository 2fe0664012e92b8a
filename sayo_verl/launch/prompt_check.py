"""A few rows of a run through the model's own processor, before the model is loaded: are the prompts short enough?

The calls are those of verl's data set, as in `sayo inspect` (``sayo_verl.inspection.model_view``).
"""

from collections.abc import Mapping

from omegaconf import DictConfig, OmegaConf

from sayo_verl.command_line import progress_bar
from sayo_verl.data.contract import Demands
from sayo_verl.data.reading import image_source
from sayo_verl.errors import SayoError
from sayo_verl.inspection.model_view import Model, too_long
from sayo_verl.launch.model_check import model_folder
from sayo_verl.launch.row_check import Counted, Kept
from sayo_verl.models.families import FAMILIES
from sayo_verl.models.location import is_hub_name


def check_batch(config: DictConfig, rows: int) -> None:
    """Refuse fewer rows than a batch: verl's loader drops the last batch if it is not whole; D75."""
    limit = int(config.data.get("train_max_samples", -1))
    rows = min(rows, limit) if limit > 0 else rows
    # verl fetches prompts one by one where it replaces groups
    one_by_one = config.algorithm.filter_groups.enable or config.trainer.v1.sampler.sync_refill_failed_groups
    fetched = 0 if one_by_one else int(config.data.get("gen_batch_size") or 0)
    wanted = max(int(config.data.train_batch_size), fetched)
    if rows < wanted:
        raise SayoError(
            "D75",
            "fewer training rows than a batch, so the run has no step",
            where="data.train_files",
            got=f"{rows} rows",
            wanted=f"at least {wanted}, data.{'gen' if fetched == wanted else 'train'}_batch_size",
            fix=f"add rows{_smaller_batch(config, rows, fetched)}",
        )


def _smaller_batch(config: DictConfig, rows: int, fetched: int) -> str:
    """The overrides of the largest batch that these rows fill, and that verl can divide among the devices."""
    devices = int(config.trainer.nnodes) * int(config.trainer.n_gpus_per_node)
    n = int(config.actor_rollout_ref.rollout.n)
    batch = next((size for size in range(rows, 0, -1) if size * n % devices == 0), 0)
    if not batch:
        return ""
    keys = ["data.train_batch_size", "actor_rollout_ref.actor.ppo_mini_batch_size"]
    keys += ["data.gen_batch_size"] if fetched else []
    return ", or end the command with " + " ".join(f"{key}={batch}" for key in keys)


def check_prompts(config: DictConfig, demands: Demands, model_type: str | None, counted: Mapping[str, Counted]) -> str:
    """Send some rows through the model's processor: the largest images, the longest questions, others evenly spread.

    Args:
        config: the composed configuration; ``sayo.preflight_prompts`` rows of each split are taken.
        demands: what the rows must hold.
        model_type: of the model's config.json; None if the model is not on this machine.
        counted: split -> its rows; the rows that it kept are sent.

    Returns:
        A line for the plan.

    Raises:
        SayoError: D68 for a processor that is missing or refuses a row, and for prompts over the limit; D75 when verl's
            length filter leaves fewer rows than a batch; what ``Model`` raises.
    """
    if int(config.sayo.preflight_prompts) <= 0 or not demands.headers:
        return "not checked (sayo.preflight_prompts, sayo.preflight_images)"
    chosen = config.actor_rollout_ref.model
    folder = model_folder(str(chosen.path), dry_run=True)
    if folder is None or model_type is None:
        return "not checked: the model is not on this machine"
    processors = [folder / f"{name}_config.json" for name in ("preprocessor", "processor")]
    if is_hub_name(str(chosen.path)) and not any(file.is_file() for file in processors):
        return "not checked: the hub's cache holds the model's configuration, but not its processor"
    if model_type not in FAMILIES:
        return f"not checked: the processor of {model_type} is not one of {', '.join(FAMILIES)}"
    if not any(of_split.spread for of_split in counted.values()):
        return "not checked: no file exists yet"
    options = {
        key: OmegaConf.to_container(config.data[key], resolve=True)
        for key in ("apply_chat_template_kwargs", "mm_processor_kwargs")
        if config.data.get(key)
    }
    model = Model(
        str(folder),
        where="actor_rollout_ref.model.path",
        data=options,
        chat_template=chosen.get("custom_chat_template"),
    )
    lines = [
        _check_split(config, demands, model, name, of_split) for name, of_split in counted.items() if of_split.rows
    ]
    return "; ".join(lines)


def _check_split(config: DictConfig, demands: Demands, model: Model, split: str, counted: Counted) -> str:
    spread = {kept[1:3]: kept for kept in counted.spread}
    sample = spread | {kept[1:3]: kept for kept in (*counted.largest, *counted.longest)}
    limit = int(OmegaConf.select(config, "actor_rollout_ref.rollout.prompt_length") or config.data.max_prompt_length)
    lengths: dict[str, int] = {}
    texts, dropped = [], set()
    with progress_bar() as progress:
        task = progress.add_task(f"{split} rows through the processor", total=len(sample))
        for key, kept in sample.items():
            progress.advance(task)
            where = f"{kept[1]} row {kept[2]}"
            try:
                tokens, has_images = _tokens(kept, demands, model, where)
            except SayoError as error:
                if error.code != "D68" or not config.data.filter_overlong_prompts:
                    raise
                dropped.add(key)  # as verl's filter does with whatever it cannot measure
                continue
            if tokens is None:
                continue
            if tokens > limit and config.data.filter_overlong_prompts:
                dropped.add(key)
            elif tokens > limit and not has_images:
                texts.append(key)  # verl cuts text prompts on the left, and warns
            else:
                lengths[where] = tokens
    over = too_long(lengths, limit)
    if over is not None:
        raise over
    of_spread = len(dropped & spread.keys())
    if of_spread == len(spread):
        raise SayoError(
            "D68",
            "verl's length filter drops every sampled row",
            where=f"data.{split}_files",
            got=f"{len(dropped)} of {len(sample)} rows are longer than {limit} tokens or cannot be read",
            wanted="rows that stay",
            fix="raise data.max_prompt_length, or prepare smaller images",
        )
    if split == "train" and len(sample) == counted.rows:
        check_batch(config, counted.rows - len(dropped))
    line = f"{split}: {len(sample)} rows tried, up to {max(lengths.values(), default=0)} tokens of {limit}"
    line += f", verl's filter drops {of_spread} of {len(spread)} evenly spread rows" if dropped else ""
    return line + (f", {len(texts)} text prompts are cut on the left" if texts else "")


def _tokens(kept: Kept, demands: Demands, model: Model, where: str) -> tuple[int | None, bool]:
    """(length of a row's prompt in tokens or None if it has an image from the web, whether it has images)."""
    values, keys = kept[3], demands.keys
    row = values | {"prompt": values[keys.prompt], "images": values.get(keys.images)}
    images = row["images"] or []
    if any(isinstance(image_source(image, where), str) for image in images):
        return None, True
    if values.get(keys.videos) or values.get(keys.audios):
        return None, True
    tokens = model.see(row, where).prompt_tokens if demands.attention else model.prompt_tokens(row, where)
    return tokens, bool(images)
