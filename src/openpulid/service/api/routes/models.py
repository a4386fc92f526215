"""The presets and methods that are offered."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from openpulid.io.hub import WEIGHTS
from openpulid.service.api.access import Owner
from openpulid.service.api.context import Context
from openpulid.service.api.problems import Problem, document
from openpulid.service.catalog import Catalog, Offer

router = APIRouter(tags=["models"])


class MethodAnswer(BaseModel):
    """A method of a preset."""

    name: str
    options: list[str] = Field(description="Fields of a request that have an effect.")
    defaults: dict[str, Any] = Field(description="Values of the fields that are left out.")
    weights: list[str] = Field(description="Installed ControlNets and IP-Adapters.")


class LicenseAnswer(BaseModel):
    """The license of weights."""

    weights: str
    license: str
    commercial: bool | None = Field(description="Whether commercial use is allowed, if known.")


class SizeAnswer(BaseModel):
    """The sizes of images in pixels."""

    native: int = Field(description="Side of the images of the training.")
    multiple: int
    min: int
    max: int


class ModelAnswer(BaseModel):
    """A preset, as a model of OpenAI's API."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "openpulid"
    description: str
    family: str
    size: SizeAnswer
    methods: list[MethodAnswer]
    licenses: list[LicenseAnswer]


class ModelList(BaseModel):
    """All presets, the default one first."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


@router.get("/v1/models", response_model=ModelList, responses=document(401))
async def list_models(owner: Owner, context: Context) -> ModelList:
    """Return the presets: methods, options with defaults, sizes and licenses."""
    catalog = context.backend.catalog
    return ModelList(data=[_describe(catalog, name) for name in catalog.names])


@router.get("/v1/models/{model}", response_model=ModelAnswer, responses=document(401, 404))
async def get_model(model: str, owner: Owner, context: Context) -> ModelAnswer:
    """Return one preset."""
    catalog = context.backend.catalog
    if model not in catalog.names:
        raise Problem(
            404, f"there is no model {model!r}; choose one of {', '.join(catalog.names)}."
        )
    return _describe(catalog, model)


def _describe(catalog: Catalog, name: str) -> ModelAnswer:
    methods = catalog.methods(name)
    presets = [offer.preset for offer in methods.values()]
    models = presets[0].models
    weights = dict.fromkeys(weight for preset in presets for weight in preset.published)
    licenses = [
        LicenseAnswer(
            weights=weight,
            license=WEIGHTS[weight].license,
            commercial=WEIGHTS[weight].commercial,
        )
        for weight in weights
    ]
    if models.is_miniature:
        licenses.append(LicenseAnswer(weights="miniature", license="Apache-2.0", commercial=True))
    return ModelAnswer(
        id=name,
        description=presets[0].description,
        family=models.family,
        size=SizeAnswer(
            native=models.native_side,
            multiple=models.size_multiple,
            min=models.min_side,
            max=models.max_side,
        ),
        methods=[_describe_method(method, offer) for method, offer in methods.items()],
        licenses=licenses,
    )


def _describe_method(name: str, offer: Offer) -> MethodAnswer:
    return MethodAnswer(
        name=name,
        options=sorted(offer.preset.options),
        defaults=offer.preset.defaults.model_dump(exclude_none=True),
        weights=list(offer.weights),
    )
