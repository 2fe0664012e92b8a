"""What leaves a worker: at most the response tokens times the declared width, whatever the prompt and its images."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.measured import variants
from support.probe_rows import Rows

from sayo_verl.hooks.capture import wire_tensors
from sayo_verl.methods import Needs
from sayo_verl.probe.statistics import PER_ROW, WIRE_PREFIX, StatisticsRequest


@pytest.fixture(scope="module")
def wire(repo) -> Iterator:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repo / "benchmarks"))
        from cost import wire

        yield wire


def bytes_of(rows: Rows, asked) -> list[dict[str, int]]:
    """Bytes per key, row by row, as the engine mixin sends them."""
    measurement = rows.measurement(asked)
    measurement.read(0, *rows.tensors(0, True), rows.scale)
    measurement.read_hidden(rows.hidden_states(True))
    sent = wire_tensors(rows.plans, measurement.finish(), 0.0, torch.device("cpu"))
    by_key = {key: [part.numel() * part.element_size() for part in values.unbind()] for key, values in sent.items()}
    return [dict(zip(by_key, row, strict=True)) for row in zip(*by_key.values(), strict=True)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 25), st.integers(1, 12)), min_size=1, max_size=4))
def test_every_statistic_is_as_large_as_it_declares(wire, lengths):
    asked = variants()
    rows = Rows([(text + visual, visual, response) for text, visual, response in lengths])
    for sent, (text, visual, response) in zip(bytes_of(rows, asked), lengths, strict=True):
        row = wire.Row(text + visual, visual, response)
        for s in asked:
            one = wire.declared(Needs(StatisticsRequest((s,))), row, Rows.H)
            assert sent[WIRE_PREFIX + s.key] == one - 4 * len(PER_ROW), s.key
        assert sum(sent.values()) == wire.declared(Needs(StatisticsRequest(tuple(asked))), row, Rows.H)


def test_only_the_sums_of_patches_grow_with_the_image(wire):
    asked = variants()
    small, large = bytes_of(Rows([(9, 4, 5), (90, 80, 5)]), asked)
    grown = {key for key in small if small[key] != large[key]}
    assert grown == {WIRE_PREFIX + s.key for s in asked if s.name == "patch_sums"}


def test_no_method_requests_what_grows_with_the_image(wire):
    for name, needs in wire.methods().items():
        short, long = (wire.declared(needs, wire.Row(visual + 100, visual, 50)) for visual in (16, 4096))
        assert short == long, name


def test_verls_own_bytes_are_those_of_rows_of_its_agent_loop(wire, random_policy):
    from support.engine_rows import make_rows, model_config

    rows = make_rows(model_config(random_policy, packed=True).processor, shapes=[(96, 96, 6, []), (128, 64, 9, [])])
    for row in rows:
        pixels = row["multi_modal_inputs"]["pixel_values"]
        visual = pixels.shape[0] // 4
        own = wire.verl_tensors(wire.Row(len(row["prompts"]), visual, len(row["responses"])), pixels.nbytes // visual)
        ids = [row[name] for name in ("prompts", "responses", "response_mask", "loss_mask", "input_ids")]
        assert own["token ids, masks"] == sum(values.nbytes for values in ids)
        assert own["position_ids"] == row["position_ids"].nbytes
        assert own["pixel_values"] == pixels.nbytes
