"""Drawn scenes with questions and exact boxes: the data of the tiny task, and harder ones of the same make.

By default a scene has one object per grid cell, of distinct shapes and colours, and a question needs one of them.
``kinds`` has the other questions, ``SceneConfig`` what makes them easy or hard. ``walk`` has another task, in which it
is known for each word of a response whether it must look, and where (``walk_truth``). Nothing here imports torch.
"""

from sayo_verl.scenes.config import QUESTIONS, SceneConfig
from sayo_verl.scenes.kinds import sample_scene
from sayo_verl.scenes.scene import Scene, SceneObject

__all__ = ["QUESTIONS", "Scene", "SceneConfig", "SceneObject", "sample_scene"]
