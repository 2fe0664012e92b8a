"""Drawn scenes with questions and exact boxes: the data of the tiny task, and harder ones of the same make."""

from sayo_verl.data.scenes.rows import (
    GENERATOR_VERSION,
    QUESTIONS,
    ROW_SCHEMA,
    Scene,
    SceneConfig,
    SceneObject,
    image_digest,
    prepare,
    sample_scene,
    scene_row,
    write_scenes,
)

__all__ = [
    "GENERATOR_VERSION",
    "QUESTIONS",
    "ROW_SCHEMA",
    "Scene",
    "SceneConfig",
    "SceneObject",
    "image_digest",
    "prepare",
    "sample_scene",
    "scene_row",
    "write_scenes",
]
