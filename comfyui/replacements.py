"""Nodes of other PuLID packs that these nodes replace in existing workflows.

ComfyUI knows replacements since version 0.14; before, old workflows need their own packs.
"""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyAPI, io

SHARED_INPUTS = {
    "model": "model",
    "face_models": "face_analysis",
    "image": "image",
    "scale": "weight",
    "start": "start_at",
    "end": "end_at",
    "mask": "attn_mask",
}
"""Our input -> input of the old node, in all nodes that apply PuLID."""

APPLY_NODES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "ApplyPulid": ({"pulid": "pulid", "method": "method"}, {"projection": "ortho_v2"}),
    "ApplyPulidAdvanced": (
        {"pulid": "pulid", "projection": "projection", "num_zero": "fidelity"},
        {"method": "custom"},
    ),
    "ApplyPulidFlux": ({"pulid": "pulid_flux"}, {"method": "neutral", "projection": "none"}),
}
"""Old node -> its other inputs, and values of ours that it does not have."""

WIDGETS = {
    "ApplyPulid": ["method", "weight", "start_at", "end_at"],
    "ApplyPulidAdvanced": ["weight", "projection", "fidelity", "noise", "start_at", "end_at"],
    "ApplyPulidFlux": ["weight", "start_at", "end_at"],
}
"""Old node -> its widgets in the order in which a workflow stores their values."""

ADAPTER_LOADERS = ("PulidModelLoader", "PulidFluxModelLoader")
FACE_LOADERS = (
    "PulidInsightFaceLoader",
    "PulidFluxInsightFaceLoader",
    "PulidEvaClipLoader",
    "PulidFluxEvaClipLoader",
)
"""Both kinds of face models are one node here; a second one that nothing uses does not run."""


def list_replacements() -> list[dict[str, Any]]:
    """Return the arguments of ComfyUI's `NodeReplace` for each old node."""
    replacements = []
    for old, (inputs, values) in APPLY_NODES.items():
        mapping: list[dict[str, Any]] = [
            {"new_id": new_id, "old_id": old_id}
            for new_id, old_id in {**SHARED_INPUTS, **inputs}.items()
        ]
        defaults = {"num_zero": 20, **values}
        mapping += [
            {"new_id": new_id, "set_value": value}
            for new_id, value in defaults.items()
            if new_id not in inputs
        ]
        replacements.append(_replacement("OpenPulidApplyImages", old, mapping, WIDGETS[old]))
    for old in ADAPTER_LOADERS:
        mapping = [{"new_id": "file", "old_id": "pulid_file"}]
        replacements.append(_replacement("OpenPulidLoad", old, mapping, ["pulid_file"]))
    for old in FACE_LOADERS:
        mapping = [
            {"new_id": "pack", "set_value": "antelopev2"},
            {"new_id": "device", "set_value": "default"},
        ]
        replacements.append(_replacement("OpenPulidLoadFaceModels", old, mapping, []))
    return replacements


def _replacement(
    new: str, old: str, mapping: list[dict[str, Any]], widgets: list[str]
) -> dict[str, Any]:
    return {
        "new_node_id": new,
        "old_node_id": old,
        "old_widget_ids": widgets,
        "input_mapping": mapping,
        # Outputs keep their index. With a mapping, the server would look for the old inputs of
        # nodes that it may have replaced before.
        "output_mapping": None,
    }


async def register_replacements() -> None:
    """Register the replacements, if this version of ComfyUI has them."""
    api = ComfyAPI()
    if not hasattr(io, "NodeReplace") or not hasattr(api, "node_replacement"):
        return
    from server import PromptServer

    PromptServer.instance.add_on_prompt_handler(add_missing_masks)
    for arguments in list_replacements():
        await api.node_replacement.register(io.NodeReplace(**arguments))


def add_missing_masks(request: dict[str, Any]) -> dict[str, Any]:
    """Give an old node without a mask the input with no value, in a workflow that is queued.

    ComfyUI's replacement needs every input of the mapping, also an optional one.
    """
    prompt = request.get("prompt")
    for node in prompt.values() if isinstance(prompt, dict) else ():
        if node.get("class_type") in APPLY_NODES and isinstance(node.get("inputs"), dict):
            node["inputs"].setdefault(SHARED_INPUTS["mask"], None)
    return request
