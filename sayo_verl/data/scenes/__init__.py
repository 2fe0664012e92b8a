"""Drawn scenes with questions and exact boxes: the data of the tiny task, and harder ones of the same make.

By default a scene is a grey square with one object per grid cell. Shapes and colours are distinct within a scene, so
every question has one answer and needs one object. ``kinds`` has the other questions, ``SceneConfig`` what makes them
easy or hard. The same generator serves ``sayo_verl.data.sources.scenes`` and the warm-up of the tiny policy, whose
tokenizer has only the words of the first two kinds. Nothing here imports torch.
"""

from sayo_verl.data.scenes.config import QUESTIONS, SceneConfig
from sayo_verl.data.scenes.kinds import sample_scene
from sayo_verl.data.scenes.scene import Scene, SceneObject

__all__ = ["QUESTIONS", "Scene", "SceneConfig", "SceneObject", "sample_scene"]
