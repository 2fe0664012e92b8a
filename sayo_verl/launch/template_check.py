"""The chat template of a run: does it open the think block, or a block that our reward reads from the response?"""

import functools
import json
import re
import textwrap
import warnings
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from sayo_verl.errors import SayoError
from sayo_verl.launch.model_check import model_folder
from sayo_verl.launch.reward_function import is_ours, kwargs_of, own_settings
from sayo_verl.launch.unread_keys import KWARGS
from sayo_verl.reward import TAGS


def check_template(config: DictConfig) -> str:
    """Check, for our reward function, whether the generation prompt opens the think block.

    The prompt is rendered as verl does it: by the processor, else the tokenizer, with ``custom_chat_template`` and
    ``data.apply_chat_template_kwargs``. An empty block that the template adds and closes does not
    count: responses are graded without it.

    Returns:
        One line for the plan.

    Raises:
        SayoError: L33 for a ``think_opened`` that contradicts the template, and for a tag that is a special token of
            the tokenizer: verl drops those from the text of a response. L33 also for a template that has opened the
            answer block: no response then holds ``<answer>``.
    """
    if not is_ours(config):
        return "-"
    found = _prompt(config)
    if isinstance(found, str):
        return f"not checked: {found}"
    released = own_settings(config)["format"] == "released"
    dropped = [tag for tag in (TAGS[2:] if released else TAGS) if tag in found.dropped]
    if dropped:
        raise SayoError(
            "L33",
            "a tag is a special token of the tokenizer, and verl drops those from responses",
            where="actor_rollout_ref.model.path",
            got=", ".join(dropped),
            wanted="the tag as plain text",
            fix="add the token to the tokenizer with special=False",
        )
    if found.opens(TAGS[2], TAGS[3]):
        raise SayoError(
            "L33",
            "the chat template opens the answer block, and responses are read for <answer>",
            where="actor_rollout_ref.model.path",
            got=repr(found.text[-80:]),
            wanted="no open <answer>",
            fix="set actor_rollout_ref.model.custom_chat_template to one that does not",
        )
    if released:
        return "format=released reads no think block"
    asked = kwargs_of(config).get("think_opened")
    if asked is not None and asked != found.opened:
        raise SayoError(
            "L33",
            f"the chat template {'opens' if found.opened else 'does not open'} the think block",
            where=f"{KWARGS}.think_opened",
            got=asked,
            wanted=found.opened,
            fix="leave it out: the launcher sets it from the template",
        )
    if found.opened:
        return "the chat template opens <think>: responses are graded as its continuation"
    if TAGS[1] in found.text:
        return "the chat template adds a closed think block: responses are graded without it"
    return "the chat template opens no <think>"


def describe_focus(config: DictConfig) -> str:
    """A line for the plan of ``attn_faithful``: whether prompts end in ``<Focus>``, which its anchoring stage trained.

    The reinforcement stage measures the attention of response tokens, so it runs without the token as well.
    """
    from sayo_verl.focus.token import FOCUS

    found = _prompt(config)
    if isinstance(found, str):
        return f"not checked: {found}"
    if found.text.endswith(FOCUS):
        return f"prompts end in {FOCUS}: the model is of the anchoring stage"
    return (
        f"prompts do not end in {FOCUS}: reinforcement alone. For both stages run the anchoring stage first "
        "(docs/anchoring.md) and give its folder as the model (MODEL_PATH=...), without a custom_chat_template"
    )


def configure(config: DictConfig) -> None:
    """Set ``think_opened`` of our reward function if the chat template opens the think block."""
    found = _prompt(config) if is_ours(config) and own_settings(config)["format"] != "released" else ""
    if not isinstance(found, str) and found.opened:
        with open_dict(config):
            OmegaConf.update(config, f"{KWARGS}.think_opened", True, force_add=True)


@dataclass(frozen=True)
class _Prompt:
    """The text between the user's message and the response, and the tags that decoding drops."""

    text: str
    dropped: tuple[str, ...]

    @property
    def opened(self) -> bool:
        return self.opens(TAGS[0], TAGS[1])

    def opens(self, start: str, end: str) -> bool:
        return self.text.rfind(start) > self.text.rfind(end)


def _prompt(config: DictConfig) -> _Prompt | str:
    model = config.actor_rollout_ref.model
    kwargs = OmegaConf.to_container(config.data.get("apply_chat_template_kwargs") or OmegaConf.create({}))
    path, remote = model.get("tokenizer_path") or model.path, bool(model.get("trust_remote_code", False))
    return _render(str(path), model.get("custom_chat_template"), json.dumps(kwargs), remote)


@functools.lru_cache(maxsize=1)
def _render(path: str, template: str | None, kwargs: str, trust_remote_code: bool) -> _Prompt | str:
    """The generation prompt, or why it cannot be rendered here."""
    if model_folder(path, dry_run=True) is None:
        return "the model is not on this machine"
    from jinja2 import TemplateError
    from verl.utils import hf_tokenizer
    from verl.utils.tokenizer.chat_template import apply_chat_template
    from verl.workers.config import model as verl_model

    content: Any = [{"type": "text", "text": "?"}]
    try:
        tokenizer = hf_tokenizer(path, trust_remote_code=trust_remote_code)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # verl repeats this warning in a run without a processor
            renderer = verl_model.hf_processor(path, trust_remote_code=trust_remote_code)
        if renderer is None:
            renderer, content = tokenizer, "?"
        renderer.chat_template = template or renderer.chat_template or tokenizer.chat_template
        asked, plain = (
            apply_chat_template(
                renderer,
                [{"role": "user", "content": content}],
                tokenize=False,
                add_generation_prompt=generation,
                **json.loads(kwargs),
            )
            for generation in (True, False)
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, ArithmeticError, TemplateError) as error:
        said = re.split(r"(?<=[.!?]) ", " ".join(str(error).split()), maxsplit=1)[0]  # its first sentence
        return f"no prompt can be rendered here ({type(error).__name__}: {textwrap.shorten(said, 200)})"
    decoded = {
        tag: tokenizer.decode(tokenizer.encode(tag, add_special_tokens=False), skip_special_tokens=True) for tag in TAGS
    }
    return _Prompt(asked.removeprefix(plain), tuple(tag for tag, text in decoded.items() if tag not in text))
