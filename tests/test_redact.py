"""Secrets appear in no file of a run folder, and settings that only look like one stay."""

import json
import shlex
import string
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support.launch_config import composed
from verl.trainer import main_ppo as verl_main

from sayo_verl.errors import SayoError
from sayo_verl.launch.ending import record_end, report_at_end, say_how_to_resume
from sayo_verl.launch.preflight import show
from sayo_verl.launch.run_card import write_run_card
from sayo_verl.redact import REDACTED, is_secret, redact, redact_command, redact_override, redact_values

NAMES = st.sampled_from(
    ("WANDB_API_KEY", "HF_TOKEN", "token", "OPENAI_KEY", "AWS_SECRET_ACCESS_KEY", "db_password", "api-key", "apiKey")
) | st.sampled_from(("auth_token", "GOOGLE_APPLICATION_CREDENTIALS", "MY_KEY_2", "Authorization"))
CANARY = st.text(string.ascii_letters + string.digits + "_-+/=.", min_size=4).map("canary{}".format)
SHAPES = (
    "{name}={value}",
    "a.b.{name}={value},c=1",
    "{{'{name}': '{value}', 'x': 1}}",
    '{{"{name}": "{value}"}}',
    "{{{name}:{value}}}",
    "env_vars.{name}='{value} and more'",
    "{name}=Bearer {value}",
    "https://user:{value}@host/path",
    "redis://:{value}@host",
)


@given(NAMES, CANARY, st.sampled_from(SHAPES), st.text(max_size=8), st.text(max_size=8))
@example("WANDB_API_KEY", "canary", "{name}={value}", "got ", " | fix: x")
def test_a_value_behind_a_name_or_in_an_address_is_redacted_and_twice_is_once(name, value, shape, before, after):
    if "//" in shape:
        value = value.replace("/", "")
    line = redact(f"{before} {shape.format(name=name, value=value)} {after}")
    assert "canary" not in line
    assert REDACTED in line
    assert redact(line) == line


@pytest.mark.parametrize(
    "secret",
    ["hf_" + "a1" * 17, "sk-proj-" + "a1" * 20, "ghp_" + "a1" * 18, "AKIA" + "A1" * 8, "github_pat_" + "a1" * 20],
)
def test_a_token_is_known_by_its_form_under_any_name(secret):
    assert redact(f"the index {secret} was refused") == f"the index {REDACTED} was refused"
    assert redact_values({"index": [secret]}) == {"index": [REDACTED]}


@pytest.mark.parametrize(
    "text",
    [
        "https://canary1@host/x",
        "https://user:pa@canary1@host/",
        "url=https://h/x?token=canary1&sig=canary2",
        "X-Amz-Signature=canary1",
        "MYPASS=canary1 DB_PASS=canary2 DB_PWD=canary3",
        "OPENAI_API_KEYS=canary1,canary2",
        "client_secret: [canary1, canary2]",
        "password=canary1,canary2",
        "--api-key canary1",
        "bearer canary12345 and eyJcanary.canary2.canary3",
        "x -----BEGIN RSA PRIVATE KEY-----\\ncanary1\\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_no_part_of_a_secret_stays(text):
    assert "canary" not in redact(text)


def test_a_long_text_is_read_once():
    start = time.monotonic()
    for piece in ("a", "a:", "A-", "x="):
        redact(piece * 50_000)
    assert time.monotonic() - start < 10  # each is far below a second; quadratic time is minutes


def test_in_the_command_that_resumes_the_placeholder_is_no_redirection():
    line = "RESUME=/out bash run.sh +a.API_KEY=canary '+a.B_KEY=canary' trainer.nnodes=1"
    command = redact_command(line)
    assert command == f"RESUME=/out bash run.sh +a.API_KEY='{REDACTED}' '+a.B_KEY={REDACTED}' trainer.nnodes=1"
    assert shlex.split(command)[3:5] == [f"+a.API_KEY={REDACTED}", f"+a.B_KEY={REDACTED}"]


def test_an_error_keeps_the_words_of_a_harmless_reward_setting(monkeypatch):
    monkeypatch.setattr("sys.argv", ["main", "+reward.custom_reward_function.reward_kwargs.answer_key=ground_truth2"])
    error = SayoError("D10", "column ground_truth2 is missing", where="/data/ground_truth2_v2", fix="add it")
    assert str(error) == "SAYO-D10: column ground_truth2 is missing | at /data/ground_truth2_v2 | fix: add it"


def test_a_secret_of_the_environment_or_of_an_argument_is_found_without_its_name(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "canary-of-environment")
    monkeypatch.setenv("OTHER_KEY", "short")
    monkeypatch.setattr("sys.argv", ["main", "+a.env_vars.X_SECRET='canary-of-argument-1'", "api_key=not-needed"])
    assert redact("401: canary-of-environment, canary-of-argument-1, not-needed, short") == (
        f"401: {REDACTED}, {REDACTED}, not-needed, short"
    )


@pytest.mark.parametrize("kept", ["${oc.env:B}", "null", "True"])
def test_a_reference_or_an_empty_value_is_no_secret(kept):
    assert redact(f"MY_TOKEN={kept} x") == f"MY_TOKEN={kept} x"
    assert redact_values({"MY_TOKEN": kept}) == {"MY_TOKEN": kept}


@pytest.mark.parametrize(
    "text",
    [
        "SAYO-L34: unknown key: color | at data.image_key | got image_key=images, wanted data.prompt_key=prompt",
        "actor.ppo_max_token_len_per_gpu=2048 tokenizer=/a/b max_tokens=5 num_tokens: 7",
        "TOKENIZERS_PARALLELISM=false pad_token='<pad>' focus_token: <Focus> eos_token_id=5",
        "ssh://git@host/x http://host:8000/y http://host/x@2 token 3: the image",
        "reward_kwargs.answer_key=ground_truth data.bbox_key=bbox stop_token=</s> think_token=x teacher.key=math",
        "PWD=/a OLDPWD=/b PROXY_BYPASS=1 PASS: 3 --token is missing, bearer certificate",
    ],
)
def test_what_only_looks_like_a_secret_stays(text):
    assert redact(text) == text


def test_no_setting_of_verl_or_of_ours_is_taken_for_a_secret(repo):
    settings = OmegaConf.to_container(composed(repo, "+hardware=cpu"), resolve=False)
    assert redact_values(settings) == settings
    assert not is_secret("actor_rollout_ref.actor.ppo_max_token_len_per_gpu")


def test_an_error_does_not_quote_a_secret():
    error = SayoError("L70", "unknown setting", where="trainer.x", got="{API_KEY:canary}", fix="remove it")
    assert str(error) == f"SAYO-L70: unknown setting | at trainer.x | got {{API_KEY:{REDACTED}}} | fix: remove it"


def test_an_override_of_a_secret_is_redacted_as_a_whole():
    assert redact_override("+env_vars.API_KEY='a, b} c'") == f"+env_vars.API_KEY={REDACTED}"
    assert redact_override("~data") == "~data"


def test_a_secret_is_in_no_file_of_a_run_and_in_no_line_of_the_launcher(tmp_path, monkeypatch, capsys):
    secrets = {
        "WANDB_API_KEY": "canary-override",
        "INDEX": "https://user:canary-address@index.example/simple",
        "PLAIN": "hf_canary" + "a" * 20,
    }
    overrides = [f"+ray_kwargs.ray_init.runtime_env.env_vars.{key}={value}" for key, value in secrets.items()]
    monkeypatch.setattr("sys.argv", ["main_ppo", *overrides])
    monkeypatch.setenv("B_TOKEN", "canary-environment")
    monkeypatch.setenv("SAYO_RESUME_COMMAND", f"RESUME=/out bash scripts/run_tiny.sh {' '.join(overrides)}")
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "metrics.jsonl"))
    env_vars = {**secrets, "B": "${oc.env:B_TOKEN}"}
    config = OmegaConf.create(
        {
            "algorithm": {"adv_estimator": "grpo"},
            "trainer": {"total_training_steps": 1, "logger": ["file"], "default_local_dir": str(tmp_path)},
            "ray_kwargs": {"ray_init": {"runtime_env": {"env_vars": env_vars}}},
        }
    )
    monkeypatch.setattr("sayo_verl.launch.ending.how_to_resume", lambda _: f"to resume after step 1: {overrides[0]}")
    show([("reward", f"pkg://mine {{'api_key': '{secrets['WANDB_API_KEY']}'}}")])
    write_run_card(config)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "data": {"critic/score/mean": 1.0}}\n')
    record_end(config, RuntimeError("401 for canary-environment"))
    report_at_end(config)
    say_how_to_resume(config)
    # verl's own output, which goes to train.log
    verl_main.print(f"ray init kwargs: {config.ray_kwargs.ray_init}", flush=True)
    verl_main.pprint(OmegaConf.to_container(config, resolve=True))
    printed = capsys.readouterr()
    assert printed.out.count(REDACTED) >= 8
    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert files.keys() == {"run.json", "run.yaml", "metrics.jsonl", "report.html"}
    assert {
        name for name, text in (files | {"out": printed.out, "err": printed.err}).items() if "canary" in text
    } == set()
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / "run.yaml"))["ray_kwargs"]["ray_init"]["runtime_env"] == {
        "env_vars": {
            "WANDB_API_KEY": REDACTED,
            "INDEX": f"https://{REDACTED}@index.example/simple",
            "PLAIN": REDACTED,
            "B": "${oc.env:B_TOKEN}",
        }
    }
    assert json.loads(files["run.json"])["ended"]["error"].count(f"RuntimeError: 401 for {REDACTED}") == 1
