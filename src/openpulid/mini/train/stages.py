"""All stages of the miniature's build, in their order."""

from __future__ import annotations

from functools import partial

from openpulid.mini.train.adapter_stage import train_adapter
from openpulid.mini.train.base_stage import train_base
from openpulid.mini.train.build_context import Stage
from openpulid.mini.train.clip_stages import train_clip, train_vision_encoder
from openpulid.mini.train.face_stages import (
    train_attribute_classifier,
    train_detector,
    train_recognition,
    train_value_reader,
)
from openpulid.mini.train.image_stages import plan_world, render_world, train_autoencoder
from openpulid.mini.train.student_stage import train_student

STAGES: list[Stage] = [
    Stage("world", 12, render_world, find_folders=lambda context: list(plan_world(context))),
    Stage("detector", 8, train_detector),
    Stage(
        "recognition-encoder", 16, partial(train_recognition, name="encoder", seed=11, details=True)
    ),
    Stage("recognition-loss", 16, partial(train_recognition, name="loss", seed=12)),
    Stage("recognition-scorer", 12, partial(train_recognition, name="scorer", seed=13)),
    Stage("clip", 8, train_clip),
    Stage("values", 12, train_value_reader),
    Stage("vision", 10, train_vision_encoder),
    Stage("attribute-classifier", 6, train_attribute_classifier),
    Stage("autoencoder", 16, train_autoencoder),
    Stage("base", 66, train_base),
    Stage("lightning", 12, train_student),
    Stage("stage1", 45, partial(train_adapter, name="stage1")),
    Stage("naive", 15, partial(train_adapter, name="naive")),
    Stage("stage2", 110, partial(train_adapter, name="stage2")),
    Stage("stage3", 250, partial(train_adapter, name="stage3")),
]
"""The miniature: under four hours on two cores to the first adapter, six hours for the others."""
