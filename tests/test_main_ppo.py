"""The launcher: its task runner, its command line, and what it writes about a run."""

import json

import pytest
from omegaconf import OmegaConf
from support.launch_config import composed

from sayo_verl.errors import SetupError
from sayo_verl.launch.ending import record_end, report_at_end, say_the_cause
from sayo_verl.launch.run_card import write_run_card
from sayo_verl.launch.training_check import filter_limit
from sayo_verl.main_ppo import SayoTaskRunner, launch, prepare_workers


def test_a_task_runner_that_does_not_know_the_estimator_is_refused():
    config = OmegaConf.create({"sayo": {"modules": []}, "algorithm": {"adv_estimator": "attn_of_a_guest"}})
    runner = object.__new__(SayoTaskRunner.__ray_metadata__.modified_class)
    with pytest.raises(SetupError, match="SAYO-X02: the plug-in was not loaded in the task runner"):
        runner.run(config)


def test_a_misspelt_setting_ends_the_launcher_with_one_line(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # else the launcher sets it for the tests that follow
    monkeypatch.setattr("sys.argv", ["main_ppo", "trainer.nnodse=2"])
    with pytest.raises(SystemExit) as caught:
        launch()
    assert str(caught.value.code).startswith(
        "SAYO-L70: unknown setting (did you mean 'nnodes'?) | at trainer.nnodse | "
    )


@pytest.mark.parametrize(
    ("override", "code"),
    [
        ("data.train_batch_size=${nothing}", "L70: Hydra cannot compose the configuration: .*nothing"),
        ("data.train_batch_size=many", "L73: a value of the wrong type | at data.train_batch_size | got 'many', "),
    ],
)
def test_a_value_that_cannot_be_used_ends_the_launcher_with_one_line(monkeypatch, override, code):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr("sys.argv", ["main_ppo", "trainer.device=cpu", "sayo.dry_run=True", override])
    with pytest.raises(SystemExit, match=f"^SAYO-{code}") as caught:
        launch()
    assert "\n" not in str(caught.value.code)


@pytest.mark.parametrize("enable", [True, False])
def test_workers_get_the_limit_of_group_filtering(repo, enable):
    config = composed(repo, "algorithm.adv_estimator=grpo", f"algorithm.filter_groups.enable={enable}")
    prepare_workers(config, {"NAME": "value"})
    assert config.ray_kwargs.ray_init.runtime_env.env_vars == {"NAME": "value"}
    assert config.trainer.v1.sampler.sampler_kwargs.get("filter_limit") == filter_limit(config)
    assert (filter_limit(config) is not None) == enable


@pytest.mark.parametrize(
    ("named", "files"),
    [
        ("run/metrics.jsonl", ["run/run.json", "run/run.yaml"]),
        ("run/metrics-2.jsonl", ["run/run-2.json", "run/run-2.yaml"]),
        (None, ["project/run-name.json", "project/run-name.yaml"]),
    ],
)
def test_the_configuration_of_a_run_lies_beside_its_metrics(tmp_path, monkeypatch, named, files):
    trainer = {"total_training_steps": 3, "logger": ["file"], "project_name": "project", "experiment_name": "name"}
    config = OmegaConf.create(
        {
            "algorithm": {"adv_estimator": "grpo"},
            "trainer": trainer,
            "steps": "${trainer.total_training_steps}",
            "key": "${oc.env:API_KEY}",
        }
    )
    monkeypatch.setenv("API_KEY", "a secret")
    monkeypatch.chdir(tmp_path)
    for name in ("VERL_FILE_LOGGER_PATH", "VERL_FILE_LOGGER_ROOT"):
        monkeypatch.delenv(name, raising=False)
    if named:
        monkeypatch.setenv("VERL_FILE_LOGGER_PATH", named)
    write_run_card(config)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")) == files
    assert OmegaConf.load(tmp_path / files[1]).steps == 3
    assert "a secret" not in (tmp_path / files[1]).read_text()
    assert json.loads((tmp_path / files[0]).read_text())["total_steps"] == 3


def test_a_run_without_a_metrics_file_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VERL_FILE_LOGGER_PATH", raising=False)
    write_run_card(OmegaConf.create({"trainer": {"logger": ["console"]}}))
    assert list(tmp_path.iterdir()) == []


def test_the_card_names_the_data_and_how_the_run_ended_and_its_page_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "run" / "metrics.jsonl"))
    data = tmp_path / "train.parquet"
    data.write_bytes(b"12345")
    config = OmegaConf.create(
        {
            "algorithm": {"adv_estimator": "grpo"},
            "trainer": {"total_training_steps": 2, "logger": ["file"]},
            "data": {"train_files": [str(data), "hdfs://elsewhere/x.parquet"], "val_files": str(data)},
        }
    )
    write_run_card(config)
    card = tmp_path / "run" / "run.json"
    assert json.loads(card.read_text())["data"] == {str(data): 5}
    report_at_end(config)  # no step: no page, and no error
    (tmp_path / "run" / "metrics.jsonl").write_text(
        '{"step": 1, "data": {"critic/score/mean": 1.0, "sayo/failed_rollouts": 2}}\n'
    )
    record_end(config, RuntimeError("out of memory\nTraceback"))
    report_at_end(config)
    ended = json.loads(card.read_text())["ended"]["error"]
    assert ended.startswith("SAYO-X25: an exception ended the run | at the launcher | got RuntimeError: out of memory")
    say_the_cause()
    said = capsys.readouterr()
    assert said.err == f"{ended}\n"
    assert "Failed at" in (tmp_path / "run" / "report.html").read_text()
    page, failed = said.out.splitlines()[-2:]
    assert page.startswith("page of the run: ")
    assert failed == "warning: 2 rollouts failed in 1 step and were left out of their groups."
    (tmp_path / "run" / "metrics.jsonl").write_text("damaged\n")
    report_at_end(config)
    assert "SAYO-R01" in capsys.readouterr().err
    record_end(config, None)
    assert json.loads(card.read_text())["ended"]["error"] == ""
    card.write_text("{cut")
    record_end(config, RuntimeError("out of memory"))  # does not hide the error that ended the run
    assert "the end of this run was not recorded" in capsys.readouterr().err


def test_a_run_without_a_metrics_file_has_no_end_and_no_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VERL_FILE_LOGGER_PATH", raising=False)
    config = OmegaConf.create({"trainer": {"logger": ["console"]}})
    record_end(config, None)
    report_at_end(config)
    assert list(tmp_path.iterdir()) == []
