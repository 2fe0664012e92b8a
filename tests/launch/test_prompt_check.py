"""Rows of a run through the model's processor."""

import io
import re
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from support.launch_config import refused, write_model

from sayo_verl.launch.preflight import preflight


def write_sizes(path: Path, *sizes: tuple[int, int], text: str = "<image>What colour?") -> str:
    """A row for each size of an image; (0, 0) is a row without one."""
    rows = []
    for i, size in enumerate(sizes):
        png = io.BytesIO()
        Image.new("RGB", (max(1, size[0]), max(1, size[1])), (i, zlib.crc32(path.name.encode()) % 256, 0)).save(
            png, "PNG"
        )
        rows.append(
            {
                "data_source": "sayo/scenes",
                "prompt": [{"role": "user", "content": text if size[0] else text.replace("<image>", "")}],
                "images": [{"bytes": png.getvalue(), "path": None}] if size[0] else [],
                "reward_model": {"style": "rule", "ground_truth": "red"},
                "extra_info": {"index": i, "boxes": [[[0.0, 0.0, 0.5, 0.5]]] if size[0] else []},
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture
def through(make, random_policy, tmp_path):
    """``through((width, height), ..., **values)``: a configuration whose rows go through a processor."""

    def composed_with(*sizes: tuple[int, int], text: str = "<image>What colour?", **values: Any) -> DictConfig:
        return make(
            **{
                "actor_rollout_ref.model.path": str(random_policy),
                "sayo.preflight_prompts": 8,
                "actor_rollout_ref.model.use_remove_padding": False,
                "data.train_batch_size": 2,
                "actor_rollout_ref.actor.ppo_mini_batch_size": 2,
                "data.train_files": write_sizes(tmp_path / "some.parquet", *sizes, text=text),
            }
            | values
        )

    return composed_with


SMALL, LARGE = (64, 64), (640, 640)  # 4 and 64 visual tokens of the tiny policy


@pytest.mark.parametrize("estimator", ["attn_region", "grpo"])
def test_the_plan_gives_the_lengths_of_prompts_that_fit(through, estimator, capfd):
    plan = dict(preflight(through(*[SMALL] * 20, **{"algorithm.adv_estimator": estimator})))
    assert re.match(r"train: [4-8] rows tried, up to \d+ tokens of \d+; val: ", plan["prompts"])
    assert "" not in capfd.readouterr().err.splitlines(), "an error would follow empty lines"


@pytest.mark.parametrize("estimator", ["attn_region", "grpo"])
def test_the_largest_image_is_tried_wherever_it_is(through, estimator):
    sizes = [SMALL] * 77
    sizes[41] = LARGE
    values = {"algorithm.adv_estimator": estimator, "data.max_prompt_length": 60}
    error = refused(through(*sizes, **values), "D68")
    assert error.where.endswith("some.parquet row 41")
    assert "data.max_prompt_length" in error.fix
    plan = dict(preflight(through(*sizes, **values, **{"data.filter_overlong_prompts": True})))
    assert "verl's filter drops 0 of 4 evenly spread rows" in plan["prompts"]


def test_a_length_filter_that_leaves_less_than_a_batch_is_refused(through):
    drops = {"data.max_prompt_length": 60, "data.filter_overlong_prompts": True}
    error = refused(through(LARGE, LARGE, LARGE, **drops), "D68")
    assert "3 of 3 rows" in str(error.got)
    error = refused(through(LARGE, SMALL, LARGE, **drops), "D75")
    assert "1 rows" in str(error.got)
    preflight(through(LARGE, SMALL, SMALL, **drops))


def test_a_narrow_image_is_refused_or_left_to_verls_filter(through):
    assert "row 1" in refused(through(SMALL, (402, 2), SMALL), "D77").where
    line = dict(preflight(through(SMALL, (402, 2), SMALL, **{"data.filter_overlong_prompts": True})))
    assert "1 rows too narrow" in line["train data"]
    assert "drops 1 of" in line["prompts"]
    refused(through(SMALL, (402, 2), (402, 2), **{"data.filter_overlong_prompts": True}), "D75")


def test_images_by_path_are_checked_as_their_bytes(through, tmp_path):
    config = through(SMALL, SMALL, LARGE)
    of_bytes, file = dict(preflight(config)), Path(config.data.train_files)
    rows = pq.read_table(file).to_pylist()
    for n, row in enumerate(rows):
        (tmp_path / f"{n}.png").write_bytes(row["images"][0]["bytes"])
        row["images"] = [{"image": str(tmp_path / f"{n}.png")}]
    pq.write_table(pa.Table.from_pylist(rows), file)
    assert dict(preflight(config)) == of_bytes
    (tmp_path / "1.png").unlink()
    assert refused(config, "D73").where.endswith("row 1, images[0]")


def test_long_text_prompts_are_counted_since_verl_cuts_them(through):
    config = through(SMALL, (0, 0), SMALL, text="<image>" + "What colour? " * 40, **{"data.max_prompt_length": 120})
    config.algorithm.adv_estimator = "grpo"
    images = refused(config, "D68")
    assert "row 0" in images.where
    OmegaConf.update(
        config,
        "data.train_files",
        write_sizes(Path(config.data.train_files), (0, 0), (0, 0), text="What colour? " * 400),
    )
    assert "2 text prompts are cut on the left" in dict(preflight(config))["prompts"]


def test_the_chat_template_of_the_run_is_used(through):
    longer = "{% for m in messages %}" + "what " * 300 + "{% endfor %}"
    config = through((0, 0), (0, 0), SMALL, **{"actor_rollout_ref.model.custom_chat_template": longer})
    config.algorithm.adv_estimator = "grpo"
    refused(config, "D68")


def test_a_model_without_its_processor_is_refused(make):
    assert "cannot be loaded" in str(refused(make(**{"sayo.preflight_prompts": 8}), "D68"))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"sayo.preflight_prompts": 0}, "sayo.preflight_prompts"),
        ({"sayo.preflight_images": -1}, "preflight_images"),
        ({"actor_rollout_ref.model.path": "Qwen/Qwen3-VL-8B-Instruct"}, "not on this machine"),
    ],
    ids=str,
)
def test_the_plan_says_what_was_not_checked(through, values, says):
    line = dict(preflight(through(SMALL, SMALL, **values), dry_run=True))["prompts"]
    assert line.startswith("not checked")
    assert says in line


def test_a_model_of_another_family_is_not_asked_for_prompts(through, tmp_path):
    other = str(write_model(tmp_path / "other", model_type="llama", num_hidden_layers=2))
    values = {"actor_rollout_ref.model.path": other, "algorithm.adv_estimator": "grpo"}
    assert "not checked: the processor of llama" in dict(preflight(through(SMALL, SMALL, **values)))["prompts"]
