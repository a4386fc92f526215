"""Parameters in images of version 0.1: one flat object, with other names."""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import from_json

from openpulid.pipelines.request import IDENTITY_NAMES, parse_size

OPTIONS = {
    "prompt": "prompt",
    "negative": "negative_prompt",
    "seed": "seed",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "true_cfg": "true_cfg_scale",
    "timestep_to_start_cfg": "timestep_to_start_cfg",
    "text_tokens": "max_sequence_length",
}
MODEL = {
    "preset": "preset",
    "base": "base",
    "method": "method",
    "adapter": "adapter",
    "faces": "face_pack",
    "memory": "memory",
}


def convert_parameters(text: str) -> str:
    """Convert the JSON of version 0.1; that of a later version, and anything else, stays.

    Files are named as they were, so they are passed again as for any image. Their hashes are
    dropped.
    """
    try:
        data = from_json(text)
    except ValueError:
        return text
    if not isinstance(data, dict) or "request" in data or "prompt" not in data:
        return text
    request: dict[str, Any] = {
        name: data[old] for old, name in OPTIONS.items() if data.get(old) is not None
    }
    request["identity"] = {name: data.get(name) for name in IDENTITY_NAMES}
    request["model"] = {name: data.get(old) for old, name in MODEL.items()}
    request["model"]["preset"] = data.get("preset", "mini")
    request["resolved"] = True
    if isinstance(data.get("size"), str):
        request["width"], request["height"] = parse_size(data["size"])
    if data.get("id") is not None:
        request["people"] = [_convert_person(data)]
    if data.get("control") is not None:
        request["controls"] = [
            {
                "model": data["control"],
                "image": data.get("control_picture"),
                "scale": 1.0 if data.get("control_scale") is None else data["control_scale"],
            }
        ]
    return json.dumps({"request": request, "version": data.get("version", "0.1.0")})


def _convert_person(data: dict[str, Any]) -> dict[str, Any]:
    path = data["id"]
    is_identity = isinstance(path, str) and path.endswith(".safetensors")
    source = {"identity": path} if is_identity else {"images": [path]}
    return {
        **source,
        "face_index": data.get("face"),
        "face_order": data.get("order") or "large-small",
        "mask": data.get("mask"),
    }
