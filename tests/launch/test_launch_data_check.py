"""Files and rows of a run: what is refused, and what the plan says."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.launch_config import ROWS, refused, write_rows

from sayo_verl.launch.preflight import preflight


def test_grpo_passes_the_same_files_without_boxes(make, tmp_path):
    bare = [str(write_rows(tmp_path / name, boxes=None)) for name in ("bare.parquet", "bare_val.parquet")]
    values = {"data.train_files": bare[0], "data.val_files": bare[1]}
    refused(make(**values), "D04")
    plan = dict(preflight(make(**values, **{"algorithm.adv_estimator": "grpo"})))
    assert plan["estimator"] == "grpo (verl's own code, untouched)"
    assert plan["method"] == "-"
    assert plan["train data"].endswith("bare.parquet: 16 rows, 16 images decoded")
    assert "0 with boxes" in dict(preflight(make(**values, **{"algorithm.attn.region.weight": 0.0})))["train data"]


def test_the_plan_says_when_prompts_do_not_ask_for_what_the_reward_reads(make, tmp_path):
    assert dict(preflight(make()))["instruction"].startswith("32 of 32 prompts do not ask for <answer>")
    asking = write_rows(
        tmp_path / "asking.parquet", boxes=[[[0.0, 0.0, 0.5, 0.5]]], question="What? <answer> ... </answer>"
    )
    plan = dict(preflight(make(**{"data.train_files": str(asking)})))
    assert plan["instruction"].startswith("16 of 32")
    (tmp_path / "mine.py").write_text("def compute_score(**kwargs): return 1.0\n")
    assert "instruction" not in dict(preflight(make(**{"reward.custom_reward_function.path": "mine.py"})))


def test_training_rows_without_an_image_are_refused_for_a_method_that_acts(make, tmp_path):
    text = tmp_path / "text.parquet"
    bare = {"images": None, "prompt": [{"role": "user", "content": "What?"}], "extra_info": {"index": 0}}
    rows = [row | bare for row in pq.read_table(make()["data"]["train_files"]).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows), text)
    for estimator in ("attn_dual", "attn_region"):
        changed = {"data.train_files": str(text), "algorithm.adv_estimator": estimator, "sayo.held_out": False}
        assert "no training row has an image" in refused(make(**changed), "D04").what
    preflight(make(**{"data.train_files": str(text), "algorithm.adv_estimator": "grpo", "sayo.held_out": False}))


@pytest.mark.parametrize("split", ["train_files", "val_files"])
def test_a_missing_parquet_file_is_refused(make, split):
    error = refused(make(**{f"data.{split}": "absent.parquet"}), "D01")
    assert (error.where, error.got) == (f"data.{split}", "absent.parquet")


def test_validation_on_training_images_is_refused(make, tmp_path):
    same = str(tmp_path / "train.parquet")
    error = refused(make(**{"data.val_files": same}), "D65")
    assert "sayo.held_out=false" in error.fix
    plan = dict(preflight(make(**{"data.val_files": same, "sayo.held_out": False})))
    assert "not compared" in plan["held out"]
    assert "1 images of validation are not among 0 and 1 of training" in dict(preflight(make()))["held out"]


def test_every_file_of_a_list_is_checked(make, tmp_path):
    good = str(tmp_path / "train.parquet")
    assert dict(preflight(make(**{"data.train_files": [good, good]})))["train data"].count("16 rows") == 2
    refused(make(**{"data.train_files": [good, "absent.parquet"]}), "D01")


def test_boxes_are_asked_for_over_all_training_files_together(make, tmp_path):
    bare, good = str(write_rows(tmp_path / "bare.parquet", boxes=[[]])), str(tmp_path / "train.parquet")
    error = refused(make(**{"data.train_files": bare}), "D04")
    assert error.where == "data.train_files"
    assert "METHOD=dual, anchor, faithful" in error.fix
    assert "0 with boxes" in dict(preflight(make(**{"data.train_files": [bare, good]})))["train data"]
    preflight(make(**{"data.val_files": bare}))


def test_boxes_are_nothing_to_verls_own_estimators(make, tmp_path):
    bad = str(write_rows(tmp_path / "bad.parquet", boxes=[[[0.5, 0.5, 0.25, 0.25]]]))
    refused(make(**{"data.train_files": bad}), "V02")
    preflight(make(**{"data.train_files": bad, "algorithm.adv_estimator": "grpo"}))


def test_the_columns_are_those_of_the_configuration(make):
    assert "'questions'" in str(refused(make(**{"data.prompt_key": "questions"}), "D03"))
    for estimator in ("attn_region", "grpo"):
        error = refused(make(**{"data.image_key": "pictures", "algorithm.adv_estimator": estimator}), "D09")
        assert "data.image_key" in error.fix


@pytest.mark.parametrize("split", ["train_files", "val_files"])
@pytest.mark.parametrize("files", [None, [], "", [None]], ids=str)
def test_a_split_without_a_file_is_refused(make, split, files):
    for estimator in ("attn_region", "grpo"):
        error = refused(make(**{f"data.{split}": files, "algorithm.adv_estimator": estimator}), "L40")
        assert error.where == f"data.{split}"
        refused(make(**{f"data.{split}": files, "algorithm.adv_estimator": estimator}), "L40", dry_run=True)
    if files == []:  # of a folder of the other split only
        error = refused(make(**{f"data.{split}": files, "sayo.data": "data/mine"}), "L40")
        assert error.where == "sayo.data=data/mine"
        assert {"train_files": "no training rows", "val_files": "no validation rows"}[split] in error.what


def test_a_kind_of_file_that_verl_does_not_read_is_refused(make, tmp_path):
    error = refused(make(**{"data.train_files": str(tmp_path / "rows.csv")}), "L41")
    assert (error.where, error.got) == ("data.train_files", str(tmp_path / "rows.csv"))
    for other in ("rows.jsonl", "hdfs://there/rows.parquet"):
        plan = dict(preflight(make(**{"data.train_files": other})))
        assert plan["train data"] == f"{other} - not checked: only local parquet files are"
        assert plan["held out"].startswith("not checked")


def test_a_data_set_class_of_ones_own_reads_the_files_in_its_own_way(make):
    values = {"data.custom_cls.path": "pkg://mine", "data.train_files": "absent.parquet"}
    plan = dict(preflight(make(**values, **{"algorithm.adv_estimator": "grpo"})))
    assert plan["data"].startswith("not checked: pkg://mine")
    refused(make(**values), "D01")  # a method of ours needs the row contract


def test_fewer_rows_than_a_batch_are_refused(make, tmp_path):
    for estimator in ("attn_region", "grpo"):
        few = {"data.train_batch_size": ROWS + 1, "algorithm.adv_estimator": estimator}
        assert f"{ROWS} rows" in str(refused(make(**few), "D75"))
        preflight(make(**few, **{"data.train_files": [str(tmp_path / "train.parquet")] * 2}))
    assert "8 rows" in str(refused(make(**{"data.train_max_samples": 8}), "D75"))


def test_training_files_that_verl_cannot_join_are_refused(make, tmp_path):
    good, other = tmp_path / "train.parquet", tmp_path / "other.parquet"
    rows = [{**row, "extra_info": "{}"} for row in pq.read_table(write_rows(other, boxes=None)).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows), other)
    error = refused(make(**{"data.train_files": [str(good), str(other)]}), "D64")
    assert "extra_info: string" in str(error.got)


def test_the_judge_of_the_run_says_which_truths_can_be_graded(make, tmp_path):
    config, rows = make(), pq.read_table(tmp_path / "train.parquet").to_pylist()
    for row in rows:
        row["reward_model"]["ground_truth"] = "\\boxed{3}"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    error = refused(config, "D74")
    assert "row 0, reward_model.ground_truth" in error.where
    refused(make(**{"data.val_files": config.data.train_files, "data.train_files": config.data.val_files}), "D74")
    (tmp_path / "mine.py").write_text("def compute_score(**kwargs): return 1.0\n")
    preflight(make(**{"reward.custom_reward_function.path": "mine.py"}))
