"""Nodes of other PuLID packs that these nodes replace in existing workflows.

The page of ComfyUI offers them since version 0.14. A workflow that is queued with old nodes runs in
all versions.
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
        "output_mapping": [{"new_idx": 0, "old_idx": 0}],
    }


async def register_replacements() -> None:
    """Register the replacements for the page, if this version has them, and for the queue."""
    from server import PromptServer

    PromptServer.instance.add_on_prompt_handler(replace_queued_nodes)
    api = ComfyAPI()
    if not hasattr(io, "NodeReplace") or not hasattr(api, "node_replacement"):
        return
    for arguments in list_replacements():
        await api.node_replacement.register(io.NodeReplace(**arguments))


def replace_queued_nodes(request: dict[str, Any]) -> dict[str, Any]:
    """Replace the nodes of packs that are not installed, in a workflow that is queued.

    ComfyUI would do it after this, but it needs titles and all optional inputs, and fails where two
    linked nodes are replaced.
    """
    from nodes import NODE_CLASS_MAPPINGS

    prompt = request.get("prompt")
    replacements = {
        replacement["old_node_id"]: replacement
        for replacement in list_replacements()
        if replacement["old_node_id"] not in NODE_CLASS_MAPPINGS
    }
    for node in prompt.values() if isinstance(prompt, dict) else ():
        replacement = replacements.get(node.get("class_type"))
        if replacement is not None:
            node["class_type"] = replacement["new_node_id"]
            node["inputs"] = map_inputs(replacement["input_mapping"], node.get("inputs", {}))
    return request


def map_inputs(mapping: list[dict[str, Any]], inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of the new node, without those that the old one does not have."""
    new = {}
    for entry in mapping:
        if "set_value" in entry:
            new[entry["new_id"]] = entry["set_value"]
        elif entry["old_id"] in inputs:
            new[entry["new_id"]] = inputs[entry["old_id"]]
    return new
