"""Shared fixtures. The environment is set before verl is imported: verl picks its platform and plug-ins at import."""

import os
import sys
from collections.abc import Iterator

os.environ.setdefault("VERL_PLATFORM", "cpu")
os.environ.setdefault("VERL_USE_EXTERNAL_MODULES", "sayo_verl.plugin")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from pathlib import Path

import pytest
from hypothesis import settings
from support.browser import NO_BROWSER, close_browser

import sayo_verl.launch.settings  # noqa: F401 (Hydra composes algorithm.attn from it)

settings.register_profile("sayo-verl", deadline=None)  # no test asserts a time
settings.load_profile("sayo-verl")
REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def random_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL with random weights, in a folder that transformers and verl load."""
    from sayo_verl.tiny.policy import TinyPolicyConfig, build_model, build_processor

    config = TinyPolicyConfig()
    processor = build_processor(config)
    model = build_model(config, processor)
    folder = tmp_path_factory.mktemp("policy")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _internvl_as_it_was() -> Iterator[None]:
    """A launch check of an InternVL model guards its class in this process, which later files must not find."""
    yield
    modeling = sys.modules.get("transformers.models.internvl.modeling_internvl")
    forward = modeling.InternVLModel.forward if modeling else None
    if getattr(forward, "sayo_guarded", False):
        modeling.InternVLModel.forward = forward.__wrapped__


@pytest.fixture(scope="session", autouse=True)
def _no_other_ray() -> Iterator[None]:
    """A Ray that somebody started on this machine is not joined by runs of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray._private.services.find_bootstrap_address", lambda folder: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_browser() -> Iterator[None]:
    yield
    close_browser()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """The last line but one, after all other summaries: how many tests were skipped because no browser was found."""
    yield
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if NO_BROWSER in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} browser tests were not run: {NO_BROWSER}; as root: apt-get install chromium", yellow=True
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Nightly tests run only where -m names them, whatever else -m says.

    The runs of the real stack come first: of two processes one does these, the other nearly all the rest.
    """
    if "nightly" not in config.option.markexpr:
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if item not in nightly]
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The running interpreter's commands first; a machine whose nvidia-smi is absent."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "VERL_FILE_LOGGER_PATH", "VERL_PLATFORM")}
    return {**clean, "PATH": f"{os.path.dirname(sys.executable)}:/usr/bin:/bin", "OUT": str(tmp_path / "out")}
