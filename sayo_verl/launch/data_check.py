"""Checks of the data of a run before any model is loaded: files, rows, images, and a sample through the processor.

The launcher calls ``check_data``. The configuration decides what rows must hold (``demands_of``). The checks of single
rows are in ``sayo_verl.data.contract``; `sayo inspect` makes the same ones. docs/data.md has the table.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from sayo_verl.command_line import progress_bar
from sayo_verl.data.check import check_joined, open_rows
from sayo_verl.data.contract import Demands, Keys
from sayo_verl.errors import SayoError
from sayo_verl.launch.answer_forms import Asked
from sayo_verl.launch.prompt_check import check_batch, check_prompts
from sayo_verl.launch.record_check import check_images
from sayo_verl.launch.reward_function import is_ours, own_settings
from sayo_verl.launch.reward_result import check_result
from sayo_verl.launch.row_check import Counted, check_parquet
from sayo_verl.launch.split_check import check_boxes_of_run, check_leakage
from sayo_verl.methods import Method
from sayo_verl.reward.walk import is_walk

Plan = list[tuple[str, str]]
SPLITS = ("train", "val")
OUR_DATASET = "pkg://sayo_verl.models.internvl_data"


def demands_of(config: DictConfig, method: Method | None) -> Demands:
    """What the rows of a run must hold."""
    reward, data = config.reward, config.data
    return Demands(
        attention=method is not None,
        # without a function of its own, a reward model sees the response alone
        rewarded=reward.custom_reward_function.path is not None or not reward.reward_model.enable,
        judge=own_settings(config)["judge"] if is_ours(config) else None,
        qwen_resize=data.custom_cls.path is None,
        headers=int(config.sayo.preflight_images) > 0,
        web=bool(config.sayo.web_images),
        keys=Keys(data.prompt_key, data.image_key, data.get("video_key", "videos"), data.get("audio_key", "audios")),
    )


def check_data(config: DictConfig, method: Method | None, model_type: str | None, *, dry_run: bool = False) -> Plan:
    """Check the data of a run.

    Args:
        config: the composed configuration.
        method: the run's method; None for an estimator of verl's own.
        model_type: of the model's config.json; None if the model is not on this machine.
        dry_run: report missing files instead of refusing them.

    Returns:
        Lines of the plan.

    Raises:
        SayoError: L40 if no file is named, L41 for a kind of file that verl does not read, D01 for a missing file, D75
            for fewer rows than a batch, and what ``check_parquet``, ``check_result`` and ``check_prompts`` raise.
    """
    foreign = config.data.custom_cls.path
    files = {split: files_of(config, split) for split in SPLITS}
    if method is None and foreign not in (None, OUR_DATASET):
        return [("data", f"not checked: {foreign} reads the files in its own way")]
    demands, plan, there, counted = demands_of(config, method), [], {}, {}
    for split in SPLITS:
        there[split], lines = _present(files[split], f"data.{split}_files", dry_run)
        check_joined(there[split])
        counted[split] = Counted()
        for path in there[split]:
            found = _with_progress(config, path, demands, len(there[split]))
            counted[split].add(found, keep_of(config))
            lines.append(f"{path}: {found}")
        plan.append((f"{split} data", "; ".join(lines)))
    scored = {split: counted[split] for split in SPLITS if split == "train" or validates(config)}
    of_scored = {split: of_split.asked for split, of_split in scored.items()}
    asked = sum(of_scored.values(), Counter[Asked]())
    tagged = Counter({key: n for key, n in asked.items() if not is_walk(key[0])})
    silent, rows = sum(n for (_, forms), n in tagged.items() if "<answer>" not in forms), tagged.total()
    if silent and demands.judge is not None:
        plan.append(
            (
                "instruction",
                f"{silent} of {rows} prompts do not ask for <answer>, where the reward reads the answer. WARNING: a "
                "model that was not trained to answer so, as the tiny policy was, gets no reward. Prepare rows with an "
                "instruction for it; scenes: `sayo prepare synthetic --prompt instruction`",
            )
        )
    samples = {split: of_split.samples for split, of_split in scored.items()}
    plan.append(("reward gives", check_result(config, method, samples, of_scored, dry_run=dry_run)))
    complete = {split: len(there[split]) == len(files[split]) for split in SPLITS}
    if complete["val"]:
        check_images(config, counted["val"].with_images, counted["val"].rows)
    if complete["train"]:
        if method is not None and method.gives:
            check_boxes_of_run(counted["train"], "data.train_files", boxes=method.needs().boxes)
        check_batch(config, counted["train"].rows - counted["train"].narrow)
    held = "not compared with training (sayo.held_out=false)"
    if config.sayo.held_out:
        held = (
            "not checked: a file does not exist yet, or is not a local parquet file"
            if not all(complete.values())
            else check_leakage(
                there["train"],
                there["val"],
                image_key=demands.keys.images,
                max_images=int(config.sayo.preflight_images),
            )
        )
    return [*plan, ("held out", held), ("prompts", check_prompts(config, demands, model_type, counted))]


def validates(config: DictConfig) -> bool:
    """Whether verl's trainer validates at all; else no response to a validation row is scored."""
    trainer = config.trainer
    return int(trainer.test_freq) > 0 or bool(trainer.get("val_before_train", True))


def files_of(config: DictConfig, split: str) -> list[str]:
    """The files of a split, as the configuration names them.

    Raises:
        SayoError: L40 if there is none; verl opens both splits, also if it never validates.
    """
    files = config.data.get(f"{split}_files")
    files = [files] if isinstance(files, str) else list(files or [])
    folder, kind = config.sayo.get("data"), {"train": "training", "val": "validation"}[split]
    if folder and not files:
        raise SayoError(
            "L40",
            f"this folder has no {kind} rows",
            where=f"sayo.data={folder}",
            wanted=f"{split}-*.parquet",
            fix="prepare it with another --val-share, or join folders with `sayo prepare mix`",
        )
    if not files or not all(isinstance(file, str) and file for file in files):
        raise SayoError(
            "L40",
            "no data file is named",
            where=f"data.{split}_files",
            got=files or "none",
            wanted="a parquet file or a list of them",
            fix="name a file; verl opens validation files too, also if it never validates",
        )
    return files


def _present(files: Sequence[str], where: str, dry_run: bool) -> tuple[list[Path], list[str]]:
    """The files that can be checked, and a line of the plan for each other file."""
    there, lines = [], []
    for file in files:
        path = Path(file).expanduser()
        if not file.endswith((".parquet", ".json", ".jsonl")):
            raise SayoError(
                "L41",
                "verl does not read this kind of file",
                where=where,
                got=file,
                wanted=".parquet, .json or .jsonl",
                fix="convert it, or correct the name",
            )
        if "://" in file or not file.endswith(".parquet"):
            lines.append(f"{file} - not checked: only local parquet files are")
        elif path.is_file():
            there.append(path)
        elif dry_run:
            lines.append(f"{file} - NOT THERE YET, needed before the run")
        else:
            raise SayoError(
                "D01",
                "there is no such parquet file",
                where=where,
                got=file,
                fix="correct the path; `sayo prepare synthetic` draws the tiny task",
            )
    return there, lines


def keep_of(config: DictConfig) -> int:
    """How many rows of a split go through the processor."""
    return max(0, int(config.sayo.preflight_prompts)) if int(config.sayo.preflight_images) > 0 else 0


def _with_progress(config: DictConfig, path: Path, demands: Demands, n_files: int) -> Counted:
    n_rows = open_rows(path, demands).metadata.num_rows
    with progress_bar() as progress:
        task = progress.add_task(f"checking {path.name}", total=n_rows)
        return check_parquet(
            path,
            demands,
            max_images=int(config.sayo.preflight_images),
            keep=keep_of(config),
            spread=-(-keep_of(config) // (2 * n_files)),
            drops_narrow=bool(config.data.filter_overlong_prompts),
            tick=lambda: progress.advance(task),
        )
