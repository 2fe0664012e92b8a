"""What errors of the launcher advise, as far as it depends on the run."""

from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support.refusals import refusal

from sayo_verl.launch import preflight
from sayo_verl.launch.prompt_check import check_batch
from sayo_verl.methods import METHODS


@given(
    rows=st.integers(0, 40),
    devices=st.integers(1, 8),
    n=st.integers(2, 16),
    gen=st.sampled_from([None, 64]),
    refill=...,
)
def test_the_batch_that_is_offered_passes_and_can_be_divided_among_the_devices(
    rows: int, devices: int, n: int, gen: int | None, refill: bool
):
    config = OmegaConf.create(
        {
            "data": {"train_batch_size": 48, "gen_batch_size": gen},
            "algorithm": {"filter_groups": {"enable": False}},
            "trainer": {
                "nnodes": 1,
                "n_gpus_per_node": devices,
                "v1": {"sampler": {"sync_refill_failed_groups": refill}},
            },
            "actor_rollout_ref": {"rollout": {"n": n}, "actor": {"ppo_mini_batch_size": 48}},
        }
    )
    with refusal("D75") as caught:
        check_batch(config, rows)
    overrides = [word for word in caught.value.fix.split() if "=" in word]
    if not overrides:
        assert caught.value.fix == "add rows"
        assert all(size * n % devices for size in range(1, rows + 1))
        return
    config.merge_with_dotlist(overrides)
    check_batch(config, rows)
    assert config.data.train_batch_size * n % devices == 0
    assert config.actor_rollout_ref.actor.ppo_mini_batch_size == config.data.train_batch_size


def test_a_module_that_registers_no_method_is_told_how_to(monkeypatch):
    built_in = {name: cls for name, cls in METHODS.items() if cls.__module__.startswith("sayo_verl.")}
    monkeypatch.setattr("sayo_verl.methods.METHODS", built_in)
    config = OmegaConf.create({"algorithm": {"adv_estimator": "attn_mine"}, "sayo": {"modules": ["mine.py"]}})
    with refusal("L01") as caught:
        preflight.check_estimator(config)
    assert "@register_method" in caught.value.fix
    assert "mine.py" in caught.value.fix
    config.sayo.modules = []
    with refusal("L01") as caught:
        preflight.check_estimator(config)
    assert caught.value.fix == "correct the name"
