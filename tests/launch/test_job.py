"""A job's short settings: what the launcher makes of them, and the keys of a command line."""

import copy
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from support.family_models import TINY
from support.launch_config import composed
from transformers import AutoConfig

from sayo_verl.data import build as building
from sayo_verl.data.build import BuildOptions, build
from sayo_verl.data.rows import Example, ImageRef, Source
from sayo_verl.errors import SayoError
from sayo_verl.launch.job import LOGGER_PATH, check_added, composition_error, keys_of, write_out
from sayo_verl.launch.memory import shapes_of
from sayo_verl.launch.type_check import check_types
from sayo_verl.scenes import SceneConfig
from sayo_verl.tiny.prepared import prepare_scenes

REWARD = "reward.custom_reward_function.reward_kwargs"


JOBS = sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "job").glob("*.yaml"))


@pytest.fixture(scope="module")
def base(repo: Path) -> DictConfig:
    return composed(repo, "+job=sayo_qwen3vl_8b", "+method=region")


@pytest.fixture
def written(base: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DictConfig]:
    """``written(**{key: value})``: the configuration that the launcher checks, with keys of the command line."""
    monkeypatch.setenv(LOGGER_PATH, "")  # what ``write_out`` sets ends with the test
    monkeypatch.delenv(LOGGER_PATH)
    monkeypatch.chdir(tmp_path)

    def make(*, dry_run: bool = False, **values: Any) -> DictConfig:
        config = copy.deepcopy(base)
        for key, value in ({"sayo.data": None, "sayo.dry_run": dry_run} | values).items():
            OmegaConf.update(config, key, value)
        write_out(config, values.keys())
        return config

    return make


class Squares(Source):
    """Rows with one picture each."""

    name = "squares"

    def facts(self) -> dict[str, Any]:
        return {}

    def examples(self) -> Iterator[Example]:
        for n in range(20):
            png = io.BytesIO()
            Image.new("RGB", (30, 30), (10 * n, 0, 0)).save(png, "PNG")
            yield Example(
                id=str(n),
                question="What?",
                answer="red",
                images=(ImageRef(str(n), data=png.getvalue()),),
                boxes=(((0.0, 0.0, 9.0, 9.0),),),
                box_names=(("square",),),
                box_format="xyxy",
                box_source="drawn",
                data_source="sayo/squares",
            )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "SHARD_ROWS", 8)
        folder = tmp_path_factory.mktemp("prepared") / "squares"
        return build(Squares(), folder, BuildOptions(val_share=0.2)).folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_scenes(tmp_path_factory.mktemp("scenes"), SceneConfig(n_train=4, n_val=2)).path


def files(config: DictConfig, split: str) -> list[str]:
    return [os.path.relpath(file) for file in config.data[f"{split}_files"]]


def test_a_folder_of_prepared_rows_is_all_its_shards(written, shards):
    config = written(**{"sayo.data": str(shards)})
    assert config.data.train_files == [str(file) for file in sorted(shards.glob("train-*.parquet"))]
    assert config.data.val_files == [str(file) for file in sorted(shards.glob("val-*.parquet"))]
    assert len(config.data.train_files) >= 2


def test_a_folder_of_drawn_scenes_is_taken_as_well(written, scenes):
    config = written(**{"sayo.data": str(scenes)})
    assert config.data.train_files == [str(scenes / "train-00000.parquet")]
    assert config.data.val_files == [str(scenes / "val-00000.parquet")]


@pytest.mark.parametrize("kind", ["shards", "scenes"])
def test_a_folder_with_a_truncated_file_is_refused(written, kind, request, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in request.getfixturevalue(kind).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    written(**{"sayo.data": "copy"})
    cut = next(folder.glob("val*.parquet"))
    cut.write_bytes(cut.read_bytes()[:-9])
    with pytest.raises(SayoError, match="D56: a file of a prepared folder is not as its manifest says"):
        written(**{"sayo.data": "copy"})


def test_a_folder_that_is_not_prepared_is_refused_and_in_a_dry_run_it_may_be_missing(written, tmp_path):
    with pytest.raises(SayoError, match="D56: there is no prepared folder"):
        written(**{"sayo.data": "absent"})
    config = written(dry_run=True, **{"sayo.data": "absent"})
    assert config.data.train_files == [f"{tmp_path}/absent/train-*.parquet"]
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "manifest.json").write_text('{"files": {"config.json": 2}}')
    with pytest.raises(SayoError, match="D56: a file of a prepared folder is not as its manifest says"):
        written(dry_run=True, **{"sayo.data": "policy"})


def test_files_of_the_command_line_win_over_the_folder_of_the_job(base, written, scenes):
    config = copy.deepcopy(base)
    config.sayo.data, config.data.train_files, config.data.val_files = str(scenes), "a.parquet", ["b.parquet"]
    write_out(config, {"data.train_files", "data.val_files"})
    assert config.data.train_files == os.path.abspath("a.parquet")
    assert files(config, "val") == ["b.parquet"]
    config = written(**{"sayo.data": str(scenes), "data.val_files": "b.parquet"})
    assert config.data.train_files == [str(scenes / "train-00000.parquet")]
    assert config.data.val_files == os.path.abspath("b.parquet")


def test_training_rows_named_twice_are_refused(written, scenes):
    with pytest.raises(SayoError, match=r"L68: .* got a.parquet and sayo.data=.* fix: leave out DATA="):
        written(**{"sayo.data": str(scenes), "data.train_files": "a.parquet"})


def test_an_empty_folder_beside_files_is_no_second_source(written):
    config = written(**{"sayo.data": None, "data.train_files": "a.parquet", "data.val_files": "b.parquet"})
    assert config.data.train_files == os.path.abspath("a.parquet")


def test_a_jobs_own_file_beside_an_inherited_folder_is_refused(base, written, scenes):
    config = copy.deepcopy(base)
    config.sayo.data, config.data.train_files = str(scenes), "a.parquet"
    with pytest.raises(SayoError, match=r"L68: .* set sayo.data to null"):
        write_out(config, set())


def test_a_jobs_own_training_file_is_not_replaced_when_the_command_line_names_validation_rows(base, written, scenes):
    config = copy.deepcopy(base)
    config.sayo.data, config.data.train_files, config.data.val_files = str(scenes), "a.parquet", "b.parquet"
    with pytest.raises(SayoError, match=r"L68: the training rows are named twice"):
        write_out(config, {"data.val_files"})


def test_a_job_that_never_resumes_still_resumes_when_asked_to(base, written, tmp_path):
    (tmp_path / "run" / "checkpoints" / "global_step_2").mkdir(parents=True)
    config = copy.deepcopy(base)
    config.sayo.data, config.sayo.resume, config.trainer.resume_mode = None, "run", "disable"
    write_out(config, set())
    assert config.trainer.resume_mode == "auto"


def test_training_files_alone_beside_the_folder_of_the_job_are_refused(base, written, scenes):
    config = copy.deepcopy(base)
    config.sayo.data, config.data.train_files = str(scenes), "a.parquet"
    with pytest.raises(SayoError, match=r"L68: training and validation rows .* fix: set data.val_files too"):
        write_out(config, {"data.train_files"})


def test_checkpoints_elsewhere_are_found_and_a_named_checkpoint_is_not_looked_for(written, tmp_path):
    (tmp_path / "elsewhere" / "global_step_2").mkdir(parents=True)
    config = written(**{"sayo.resume": "run", "trainer.default_local_dir": f"{tmp_path}/elsewhere"})
    assert config.trainer.default_local_dir == f"{tmp_path}/elsewhere"
    named = {"trainer.resume_mode": "resume_path", "trainer.resume_from_path": f"{tmp_path}/elsewhere/global_step_2"}
    assert written(**{"sayo.resume": "run"} | named).trainer.resume_mode == "resume_path"


@pytest.mark.parametrize("given", ["old/global_step_2/", "old/global_step_2", "./old//global_step_2//"])
def test_a_named_checkpoint_may_end_in_a_slash(written, tmp_path, given):
    """verl reads the step from the end of the path."""
    named = {"trainer.resume_mode": "resume_path", "trainer.resume_from_path": given}
    assert written(**named).trainer.resume_from_path == f"{tmp_path}/old/global_step_2"


def test_paths_of_data_and_model_become_absolute(written, tmp_path):
    (tmp_path / "model").mkdir()
    named = {"data.train_files": ["a b.parquet", "/c.parquet", "hdfs://d/e.parquet"], "data.val_files": "~/f.parquet"}
    config = written(**named, **{"actor_rollout_ref.model.path": "model"})
    assert config.data.train_files == [f"{tmp_path}/a b.parquet", "/c.parquet", "hdfs://d/e.parquet"]
    assert config.data.val_files == os.path.expanduser("~/f.parquet")
    assert config.actor_rollout_ref.model.path == f"{tmp_path}/model"
    hub = {"actor_rollout_ref.model.path": "Qwen/Qwen3-VL-8B-Instruct"}
    assert written(**hub).actor_rollout_ref.model.path == hub["actor_rollout_ref.model.path"]


def test_a_new_run_lies_in_its_folder(written, tmp_path):
    config = written(**{"sayo.out": "run"})
    assert config.trainer.default_local_dir == f"{tmp_path}/run/checkpoints"
    assert config.trainer.resume_mode == "disable"
    assert os.environ[LOGGER_PATH] == f"{tmp_path}/run/metrics.jsonl"


def test_without_a_folder_verls_own_settings_stay(base, written):
    assert written().trainer == base.trainer
    assert LOGGER_PATH not in os.environ


def test_the_command_line_and_the_environment_win_over_the_folder(written, monkeypatch):
    monkeypatch.setenv(LOGGER_PATH, "mine.jsonl")
    config = written(**{"sayo.out": "run", "trainer.default_local_dir": "/mine", "trainer.resume_mode": "auto"})
    assert (config.trainer.default_local_dir, config.trainer.resume_mode) == ("/mine", "auto")
    assert os.environ[LOGGER_PATH] == "mine.jsonl"


def test_a_resumed_run_has_a_metrics_file_of_its_own(written, tmp_path):
    (tmp_path / "run" / "checkpoints" / "global_step_2").mkdir(parents=True)
    for name in ("metrics.jsonl", "run.json", "metrics-2.jsonl", "run-3.json"):
        (tmp_path / "run" / name).touch()
    config = written(**{"sayo.resume": "run", "sayo.out": "other"})
    assert config.trainer.default_local_dir == f"{tmp_path}/run/checkpoints"
    assert config.trainer.resume_mode == "auto"
    assert os.environ[LOGGER_PATH] == f"{tmp_path}/run/metrics-4.jsonl"


def test_a_resume_without_a_checkpoint_is_refused(written, tmp_path):
    with pytest.raises(SayoError, match=f"L44: there is no checkpoint to resume .* at {tmp_path}/run/checkpoints"):
        written(**{"sayo.resume": "run"})


def test_what_a_job_computes_follows_its_parts_and_needs_no_resolver_of_ours(repo, written):
    config = written(**{"data.max_response_length": 200, "data.train_batch_size": 48})
    assert config.actor_rollout_ref.rollout.max_model_len == 6700
    assert config.actor_rollout_ref.actor.ppo_mini_batch_size == 48
    for job in (repo / "configs" / "job").glob("*.yaml"):
        config = composed(repo, f"+job={job.stem}", "+method=grpo")
        config.sayo.dry_run = True
        write_out(config, ())
        assert "${sayo." not in OmegaConf.to_yaml(config), job.stem


@pytest.mark.parametrize(("method", "weight"), [("region", 0.0), ("dual", 1.0), ("grpo", 1.0)])
def test_sayos_job_rewards_accuracy_for_other_methods(repo, method, weight):
    config = composed(repo, "+job=sayo_qwen3vl_8b", f"+method={method}")
    assert OmegaConf.select(config, f"{REWARD}.accuracy_weight") == weight
    config.algorithm.adv_estimator = "rloo"
    assert OmegaConf.select(config, f"{REWARD}.accuracy_weight") == 1.0
    config = composed(repo, "+job=sayo_qwen3vl_8b", f"+method={method}", f"{REWARD}.accuracy_weight=0.5")
    assert OmegaConf.select(config, f"{REWARD}.accuracy_weight") == 0.5


@pytest.mark.parametrize(
    ("job", "changed"),
    [
        ("sayo_qwen3vl_4b", {"Qwen/Qwen3-VL-8B"}),
        ("sayo_qwen3vl_4b_1gpu", {"Qwen/Qwen3-VL-8B", "n_gpus_per_node: 8"}),
        ("sayo_internvl3_5_8b", {"Qwen/Qwen3-VL-8B", "exclude_modules: .*visual.*", "mm_processor_kwargs: {}"}),
    ],
)
def test_sayos_other_models_differ_where_they_say(repo, job, changed):
    large, small = (
        Counter(OmegaConf.to_yaml(composed(repo, f"+job={name}", "+method=region"), resolve=True).splitlines())
        for name in ("sayo_qwen3vl_8b", job)
    )
    gone = large - small
    assert all(any(text in line for text in changed) for line in gone)
    assert {text for text in changed for line in gone if text in line} == changed


def test_the_adapter_of_internvl_leaves_out_its_tower(repo, tmp_path):
    """Its modules have other names than Qwen's, and vLLM serves adapters of the decoder."""
    TINY["internvl"].build(tmp_path)
    excluded = composed(repo, "+job=sayo_internvl3_5_8b").actor_rollout_ref.model.exclude_modules
    config = AutoConfig.from_pretrained(tmp_path)
    assert not shapes_of(config, lora_rank=4, target_modules="all-linear", exclude_modules=excluded).vision_trained
    assert shapes_of(config, lora_rank=4, target_modules="all-linear").vision_trained


def test_keys_of_overrides():
    assert keys_of(["a.b=1", "+c=2", "++d=x=y", "~e"]) == {"a.b", "c", "d", "e"}
    assert keys_of(["data={train_files:/a,x:{y:1}}", "p='{z}'"]) == {"data.train_files", "data.x.y", "p"}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "actor_rollout_ref.actor.optim.lrr=1",
            r"\(did you mean 'lr'\?\) \| at actor_rollout_ref.actor.optim.lrr \| got lrr",
        ),
        ("actor_rollout_ref.actr.optim.lr=1", r"\(did you mean 'actor'\?\) \| at actor_rollout_ref.actr "),
        ("actor_rollout_ref.xyz=1", r"unknown setting \| at actor_rollout_ref.xyz \| got xyz, wanted actor, ref, "),
        ("trainer.nnodes.x=1", r"unknown setting \| at trainer.nnodes.x \| got x \| fix"),
        ("+trainer.nnodes=1", r"An item is already at 'trainer.nnodes'"),
        ("data.train_files=[a", r"no viable alternative at input '\[a'"),
        ("+rl=grppo", r"Could not find 'rl/grppo'"),
    ],
)
def test_what_hydra_cannot_compose_is_one_line(repo, override, says):
    with pytest.raises(HydraException) as caught:
        composed(repo, override)
    error = str(composition_error(caught.value))
    assert re.search(rf"^SAYO-L70: .*{says}", error)
    assert "\n" not in error


@pytest.mark.parametrize("pair", [("sayo.out=a", "sayo.out=b"), ("sayo.resume=a", "sayo.out=b")])
def test_the_folder_of_a_run_named_twice_is_refused(pair):
    with pytest.raises(SayoError, match=r"L68: the folder of the run is named twice .* got a and b"):
        keys_of(pair)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("data.max_response_length=long", "a number, such as 512"),
        ("actor_rollout_ref.actor.optim.lr=abc", "a number, such as 1e-06"),
        ("trainer.balance_batch=no", "true or false"),
        ("sayo.dry_run=no", "true or false"),
    ],
)
def test_text_in_place_of_a_number_or_a_switch_is_refused(repo, override, wanted):
    key, _, value = override.partition("=")
    with pytest.raises(SayoError, match=f"L73: a value of the wrong type | at {key} | got '{value}', wanted {wanted}"):
        check_types(composed(repo, override), composed(repo))


@pytest.mark.parametrize("job", JOBS)
def test_the_values_of_every_job_have_the_types_of_verls_defaults(repo, job):
    for method in ("region", "dual", "grpo"):
        check_types(composed(repo, f"+job={job}", f"+method={method}"), composed(repo))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("trainer.total_training_steps", "ten", "got 'ten', wanted an integer "),
        ("trainer.total_training_steps", 2.5, "got 2.5, wanted an integer "),
        ("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu", "a", "got 'a', wanted an integer "),
        ("actor_rollout_ref.rollout.n", None, "got null, wanted an integer, such as 1 "),
        ("data.train_batch_size", None, "got null, wanted a number, such as 1024 "),
    ],
)
def test_the_type_of_a_number_is_known_where_the_default_or_the_value_is_null(repo, base, key, value, says):
    config = copy.deepcopy(base)
    OmegaConf.update(config, key, value)
    with pytest.raises(SayoError, match=rf"^SAYO-L73: .* at {key} \| {says}"):
        check_types(config, composed(repo))


def test_null_is_left_alone_where_it_has_a_meaning(repo, base):
    config = copy.deepcopy(base)
    for key in (
        "trainer.v1.sampler.max_off_policy_threshold",
        "algorithm.attn.spread_floor",
        "actor_rollout_ref.rollout.max_model_len",
        "data.seed",
    ):
        OmegaConf.update(config, key, None)
    check_types(config, composed(repo))


@pytest.mark.parametrize(
    ("key", "where", "near"),
    [
        ("trainer.total_traning_steps", "trainer.total_traning_steps", "total_training_steps"),
        ("trainr.nnodes", "trainr", "trainer"),
        ("data.train_batchsize", "data.train_batchsize", "train_batch_size"),
        ("actor_rollout_ref.rollout.temprature", "actor_rollout_ref.rollout.temprature", "temperature"),
        ("ray_kwargs.ray_init.num_gpuss", "ray_kwargs.ray_init.num_gpuss", "num_gpus"),
    ],
)
def test_an_added_key_beside_one_of_nearly_the_same_name_is_refused(repo, key, where, near):
    begin = rf"^SAYO-L70: unknown setting \(did you mean '{near}'\?\) \| at {where} "
    with pytest.raises(SayoError, match=begin + r".*fix: correct the name$"):
        check_added([key], composed(repo))


def test_keys_that_may_be_added_pass(repo):
    keys = ["ray_kwargs.ray_init._temp_dir", "ray_kwargs.ray_init.num_gpus", "trainer.nnodes", "sayo.out"]
    keys += ["actor_rollout_ref.model.override_config.attn_implementation", "data.mm_processor_kwargs.max_patches"]
    keys += ["distillation.teacher_models.teacher_model1.key"]  # as verl documents it
    keys += ["ray_kwargs.ray_init.runtime_env.env_vars.NCCL_DEBUG", "actor_rollout_ref.rollout.engine_kwargs.vllm.x"]
    check_added(keys, composed(repo))
