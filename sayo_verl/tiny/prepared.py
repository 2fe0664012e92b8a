"""Folders of the tiny task, scenes and policies: built once from a configuration and reused afterwards."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from sayo_verl.data.build import BuildOptions, build
from sayo_verl.data.folder import KIND, check_folder, new_folder, write_manifest
from sayo_verl.data.rows import Source
from sayo_verl.data.sources.scenes import SceneSource
from sayo_verl.data.sources.walks import WalkSource
from sayo_verl.errors import SayoError
from sayo_verl.scenes import SceneConfig
from sayo_verl.scenes.walk import WalkConfig


class Prepared(NamedTuple):
    """A finished folder that is named by what it is made of, and whether it was there before."""

    path: Path
    reused: bool


def content_hash(*parts: Any) -> str:
    """Ten hexadecimal digits that depend on the values of ``parts`` alone (numbers, texts, lists, dicts of them)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


def prepare_scenes(out_root: Path | str, config: SceneConfig, prompt: str = "question") -> Prepared:
    """``out_root/scenes-<hash>/``, built unless it is there. ``prompt``: as ``reward.prompts.messages_of``."""
    folder = Path(out_root) / f"scenes-{content_hash(asdict(config), prompt)}"
    return _prepare_rows(folder, SceneSource(config), prompt)


def prepare_walks(out_root: Path | str, config: WalkConfig) -> Prepared:
    """``out_root/walks-<hash>/``, built unless it is there. A prompt is the question alone."""
    return _prepare_rows(Path(out_root) / f"walks-{content_hash(asdict(config))}", WalkSource(config), "question")


def _prepare_rows(folder: Path, source: Source, prompt: str) -> Prepared:
    if _is_complete(folder, KIND):
        return Prepared(folder, True)
    build(source, folder, BuildOptions(prompt=prompt, trust_boxes=True, overwrite=True))
    return Prepared(folder, False)


def prepare_folder(folder: Path, kind: str, build: Callable[[Path], dict[str, Any]]) -> Prepared:
    """``folder``, filled by ``build`` unless a complete one is there; an incomplete one is replaced.

    Args:
        folder: its name has a hash of the configuration.
        kind: stands in the manifest.
        build: fills the (empty) folder that it is given, and returns facts for the manifest.
    """
    if _is_complete(folder, kind):
        return Prepared(folder, True)
    shutil.rmtree(folder, ignore_errors=True)
    with new_folder(folder, overwrite=False) as fresh:
        write_manifest(fresh, kind=kind, **build(fresh))
    return Prepared(folder, False)


def _is_complete(folder: Path, kind: str) -> bool:
    """Whether the folder is there, of this version, and as its manifest says."""
    try:
        check_folder(folder, kind)
    except SayoError:
        return False
    return True
