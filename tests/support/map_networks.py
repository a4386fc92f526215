"""Random networks in the classes of those that detect control images, in small form."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
    VitPoseImageProcessor,
)


def save_depth_estimator(path: Path) -> Path:
    """Save a depth network, with a visible effect, and its image processor."""
    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14,
        out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, patch_size=14,
        neck_hidden_sizes=[4, 8, 8, 8], fusion_hidden_size=8, head_hidden_size=4,
    )  # fmt: skip
    network = DepthAnythingForDepthEstimation(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # the default gives no visible depth
    network.save_pretrained(path)
    size = {"height": 56, "width": 56}
    processor = DPTImageProcessor(size=size, keep_aspect_ratio=True, ensure_multiple_of=14)
    processor.save_pretrained(path)
    return path


def save_pose_models(folder: Path) -> tuple[Path, Path]:
    """Save a detector that finds people everywhere, and a pose network."""
    paths = folder / "detector", folder / "pose"
    torch.manual_seed(0)
    resnet = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = RTDetrConfig(
        backbone_config=resnet, encoder_in_channels=[8, 8, 8], encoder_hidden_dim=16, d_model=16,
        encoder_ffn_dim=16, decoder_ffn_dim=16, decoder_layers=2, num_queries=4,
        encoder_attention_heads=2, decoder_attention_heads=2, decoder_in_channels=[16, 16, 16],
        id2label={0: "person", 1: "dog"}, anchor_image_size=None,
    )  # fmt: skip
    detector = RTDetrForObjectDetection(config).eval()
    for layer in detector.model.decoder.class_embed:
        torch.nn.init.zeros_(layer.weight)
        layer.bias.data = torch.tensor([2.0, -2.0])
    detector.save_pretrained(paths[0])
    RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(paths[0])
    backbone = VitPoseBackboneConfig(
        image_size=[64, 48], patch_size=[16, 16], hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, out_indices=[2],
    )  # fmt: skip
    pose = VitPoseConfig(backbone_config=backbone, num_labels=17, use_simple_decoder=True)
    VitPoseForPoseEstimation(pose).save_pretrained(paths[1])
    VitPoseImageProcessor(size={"height": 64, "width": 48}).save_pretrained(paths[1])
    return paths
