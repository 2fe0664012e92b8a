"""Image placeholders in requests to verl's SGLang server. SGLang itself is not here: its server is a stand-in."""

import ast
import asyncio
import inspect
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from transformers import AutoProcessor

from sayo_verl.hooks.sglang import NEVER, mask_placeholders

SERVER = "sglang_rollout/async_sglang_server.py"


@pytest.fixture
def server():
    class SGLangHttpServer:
        async def generate(self, prompt_ids, sampling_params, request_id, image_data=None):
            return prompt_ids, sampling_params, request_id, image_data

    module = ModuleType("async_sglang_server")
    module.SGLangHttpServer = SGLangHttpServer
    mask_placeholders(module)
    return SGLangHttpServer


def test_no_placeholder_can_be_sampled(server, random_policy):
    processor = AutoProcessor.from_pretrained(random_policy)
    one = server()
    one.model_config = SimpleNamespace(processor=processor)
    shared = {"temperature": 1.0, "logit_bias": {"7": 2.0}}
    out = asyncio.run(one.generate(prompt_ids=[1], sampling_params=shared, request_id="a", image_data=["b"]))
    banned = {str(processor.image_token_id): NEVER, str(processor.video_token_id): NEVER}
    assert out == ([1], {"temperature": 1.0, "logit_bias": {"7": 2.0, **banned}}, "a", ["b"])
    assert shared == {"temperature": 1.0, "logit_bias": {"7": 2.0}}
    assert list(inspect.signature(server.generate).parameters)[:4] == [
        "self",
        "prompt_ids",
        "sampling_params",
        "request_id",
    ]


def test_a_model_without_images_is_left_alone(server):
    one = server()
    one.model_config = SimpleNamespace(processor=None)
    assert asyncio.run(one.generate([1], {}, "a"))[1] == {}


def test_verls_server_is_as_the_stand_in():
    """Read, not imported: the module imports SGLang."""
    root = Path(find_spec("verl.workers.rollout").submodule_search_locations[0])
    classes = [node for node in ast.parse((root / SERVER).read_text()).body if isinstance(node, ast.ClassDef)]
    (cls,) = (node for node in classes if node.name == "SGLangHttpServer")
    (generate,) = (node for node in cls.body if getattr(node, "name", "") == "generate")
    assert isinstance(generate, ast.AsyncFunctionDef)
    assert [arg.arg for arg in generate.args.args][:4] == ["self", "prompt_ids", "sampling_params", "request_id"]
    assert "mm_processor_kwargs" not in [arg.arg for arg in generate.args.args], "L85 is no longer needed"
