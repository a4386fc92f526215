"""Registry of published weights: where each is published, its license and its hash."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Weight:
    """A published file, or a complete diffusers pipeline.

    Attributes:
        repo: the repository on the hub; for a file that is not on the hub, its URL.
        file: the file name in the repository; empty for a pipeline.
        license: the short name of the license and what it forbids.
        commercial: whether commercial use is allowed; None if unknown.
        megabytes: approximate size; None if unknown.
        folder: subfolder of a weights folder for a file whose name another file has, too.
        repo_folder: folder of the repository that holds one network; empty for all of it.
    """

    repo: str
    file: str
    license: str
    commercial: bool | None
    megabytes: int | None
    folder: str = ""
    repo_folder: str = ""

    @property
    def name(self) -> str:
        """The name used in messages."""
        return self.file or "/".join(filter(None, (self.repo, self.repo_folder)))

    @property
    def size(self) -> str:
        """The size as it follows the name in messages; empty if unknown."""
        return f" (about {self.megabytes} MB)" if self.megabytes else ""

    @property
    def is_manual(self) -> bool:
        """Whether `repo` is a web page from which the file must be downloaded by hand."""
        return self.repo.startswith("https://") and not self.repo.endswith(self.file)


_PULID = "Apache-2.0; trained with antelopev2, whose terms forbid commercial use"
_INSIGHTFACE = "insightface model license: non-commercial research only"
_FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"
_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
_INSTANTID = "Apache-2.0; uses antelopev2, whose terms forbid commercial use"
_PHOTOMAKER = "Apache-2.0; uses buffalo_l, whose terms forbid commercial use"
_FACEID = "research only, like the insightface models"
_INFINITEYOU = "CC BY-NC 4.0, for academic research; base model FLUX.1 [dev] non-commercial"
_FLUX = "FLUX.1 [dev] non-commercial"
_OPENCV_ZOO = "https://github.com/opencv/opencv_zoo/raw/main/models"
_YUNET = "face_detection_yunet_2026may.onnx"
_FACEXLIB = "https://github.com/xinntao/facexlib/releases/download"
_W_PLUS = "https://github.com/csxmli2016/w-plus-adapter/releases/download/v1"

WEIGHTS: dict[str, Weight] = {
    "pulid-v1": Weight("guozinan/PuLID", "pulid_v1.bin", _PULID, False, 790),
    "pulid-v1.1": Weight("guozinan/PuLID", "pulid_v1.1.safetensors", _PULID, False, 980),
    "pulid-flux-v0.9.0": Weight(
        "guozinan/PuLID", "pulid_flux_v0.9.0.safetensors", _PULID, False, 1140
    ),
    "pulid-flux-v0.9.1": Weight(
        "guozinan/PuLID", "pulid_flux_v0.9.1.safetensors", _PULID, False, 1140
    ),
    "detector": Weight("DIAMONIK7777/antelopev2", "scrfd_10g_bnkps.onnx", _INSIGHTFACE, False, 17),
    "arcface": Weight("DIAMONIK7777/antelopev2", "glintr100.onnx", _INSIGHTFACE, False, 261),
    "eva": Weight("QuanSun/EVA-CLIP", "EVA02_CLIP_L_336_psz14_s6B.pt", "MIT", True, 856),
    "parsing": Weight(
        f"{_FACEXLIB}/v0.2.0/parsing_bisenet.pth", "parsing_bisenet.pth", "MIT", True, 53
    ),
    "arcface-loss": Weight(
        f"{_FACEXLIB}/v0.1.0/recognition_arcface_ir_se50.pth",
        "recognition_arcface_ir_se50.pth",
        "MIT; training data not stated",
        True,
        175,
    ),
    "yunet": Weight(
        f"{_OPENCV_ZOO}/face_detection_yunet/{_YUNET}",
        _YUNET,
        "MIT; trained on WIDER FACE, reported as CC BY-NC-ND",
        True,
        1,
    ),
    "auraface": Weight(
        "fal/AuraFace-v1",
        "glintr100.onnx",
        "Apache-2.0; training data said to allow commercial use, not listed",
        True,
        261,
        "auraface",
    ),
    "selfie-multiclass": Weight(
        "senty-au/selfie_multiclass_256x256-ONNX",
        "onnx/model.onnx",
        "Apache-2.0; training data not published",
        True,
        16,
        "selfie-multiclass",
    ),
    "e4e": Weight(
        f"{_W_PLUS}/e4e_ffhq_encode.pt",
        "e4e_ffhq_encode.pt",
        "NTU S-Lab License 1.0: non-commercial",
        False,
        1200,
    ),
    "blip2": Weight("Salesforce/blip2-opt-2.7b", "", "MIT", True, 15_500),
    "sdxl-base": Weight(
        "stabilityai/stable-diffusion-xl-base-1.0", "", "CreativeML Open RAIL++-M", True, 6940
    ),
    "lightning-4step": Weight(
        "ByteDance/SDXL-Lightning",
        "sdxl_lightning_4step_unet.safetensors",
        "CreativeML Open RAIL++-M",
        True,
        5140,
    ),
    "juggernaut": Weight("RunDiffusion/Juggernaut-XL-v9", "", "CreativeML Open RAIL-M", True, 6940),
    "flux-dev": Weight("black-forest-labs/FLUX.1-dev", "", _FLUX, False, 33_700),
    "flux-krea-base": Weight("black-forest-labs/FLUX.1-Krea-dev", "", _FLUX, False, 33_700),
    "flux-schnell-base": Weight("black-forest-labs/FLUX.1-schnell", "", "Apache-2.0", True, 33_700),
    "chroma-base": Weight("lodestones/Chroma1-HD", "", "Apache-2.0", True, 27_500),
    "flux2-klein-base": Weight(
        "black-forest-labs/FLUX.2-klein-base-4B", "", "Apache-2.0", True, 16_000
    ),
    "flux2-klein-distilled": Weight(
        "black-forest-labs/FLUX.2-klein-4B", "", "Apache-2.0", True, 16_000
    ),
    "z-image-base": Weight("Tongyi-MAI/Z-Image", "", "Apache-2.0", True, 20_500),
    "z-image-turbo": Weight("Tongyi-MAI/Z-Image-Turbo", "", "Apache-2.0", True, 32_900),
    "qwen-image-base": Weight("Qwen/Qwen-Image", "", "Apache-2.0", True, 57_700),
    "clip-h": Weight("h94/IP-Adapter", "models/image_encoder/model.safetensors", "MIT", True, 2530),
    "ip-adapter": Weight(
        "h94/IP-Adapter", "sdxl_models/ip-adapter_sdxl_vit-h.safetensors", "Apache-2.0", True, 700
    ),
    "ip-adapter-plus": Weight(
        "h94/IP-Adapter",
        "sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors",
        "Apache-2.0",
        True,
        850,
    ),
    "ip-adapter-plus-face": Weight(
        "h94/IP-Adapter",
        "sdxl_models/ip-adapter-plus-face_sdxl_vit-h.safetensors",
        "Apache-2.0",
        True,
        850,
    ),
    "clip-l": Weight(
        "openai/clip-vit-large-patch14", "model.safetensors", "MIT", True, 1710, folder="clip-l"
    ),
    "ip-adapter-flux": Weight(
        "XLabs-AI/flux-ip-adapter-v2", "ip_adapter.safetensors", _FLUX, False, 1060
    ),
    "buffalo-l": Weight(
        "public-data/insightface", "models/buffalo_l/w600k_r50.onnx", _INSIGHTFACE, False, 174
    ),
    "faceid": Weight("h94/IP-Adapter-FaceID", "ip-adapter-faceid_sdxl.bin", _FACEID, False, 1070),
    "faceid-plus": Weight(
        "h94/IP-Adapter-FaceID", "ip-adapter-faceid-plusv2_sdxl.bin", _FACEID, False, 1490
    ),
    "instantid": Weight("InstantX/InstantID", "ip-adapter.bin", _INSTANTID, False, 1690),
    "identitynet": Weight(
        "InstantX/InstantID",
        "ControlNetModel/diffusion_pytorch_model.safetensors",
        _INSTANTID,
        False,
        2500,
    ),
    "identitynet-config": Weight(
        "InstantX/InstantID", "ControlNetModel/config.json", _INSTANTID, False, 1
    ),
    "photomaker": Weight("TencentARC/PhotoMaker", "photomaker-v1.bin", "Apache-2.0", True, 930),
    "photomaker-v2": Weight(
        "TencentARC/PhotoMaker-V2", "photomaker-v2.bin", _PHOTOMAKER, False, 1800
    ),
    "infiniteyou": Weight(
        "ByteDance/InfiniteYou",
        "infu_flux_v1.0/aes_stage2/image_proj_model.bin",
        _INFINITEYOU,
        False,
        340,
    ),
    "infusenet": Weight(
        "ByteDance/InfiniteYou",
        "",
        _INFINITEYOU,
        False,
        11_950,
        repo_folder="infu_flux_v1.0/aes_stage2/InfuseNetModel",
    ),
    "infiniteyou-sim": Weight(
        "ByteDance/InfiniteYou",
        "infu_flux_v1.0/sim_stage1/image_proj_model.bin",
        _INFINITEYOU,
        False,
        340,
    ),
    "infusenet-sim": Weight(
        "ByteDance/InfiniteYou",
        "",
        _INFINITEYOU,
        False,
        11_950,
        repo_folder="infu_flux_v1.0/sim_stage1/InfuseNetModel",
    ),
    "control-edges": Weight(
        "diffusers/controlnet-canny-sdxl-1.0", "", "CreativeML Open RAIL++-M", True, 2500
    ),
    "control-depth": Weight(
        "diffusers/controlnet-depth-sdxl-1.0", "", "CreativeML Open RAIL++-M", True, 2500
    ),
    "control-pose": Weight("xinsir/controlnet-openpose-sdxl-1.0", "", "Apache-2.0", True, 2500),
    "control-flux-edges": Weight("InstantX/FLUX.1-dev-Controlnet-Canny", "", _FLUX, False, 3580),
    "control-flux-depth": Weight(
        "Shakker-Labs/FLUX.1-dev-ControlNet-Depth", "", _FLUX, False, 3190
    ),
    "control-flux-union": Weight(
        "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0", "", _FLUX, False, 4280
    ),
    "depth-estimator": Weight(
        "depth-anything/Depth-Anything-V2-Small-hf", "", "Apache-2.0", True, 99
    ),
    "person-detector": Weight("PekingU/rtdetr_r18vd", "", "Apache-2.0", True, 81),
    "pose-estimator": Weight("usyd-community/vitpose-base-simple", "", "Apache-2.0", True, 344),
    "scorer-recognition": Weight(
        "https://github.com/HuangYG123/CurricularFace",
        "CurricularFace_Backbone.pth",
        "MIT; trained on MS1M, for research",
        False,
        250,
    ),
    "scorer-sface": Weight(
        "opencv/face_recognition_sface",
        "face_recognition_sface_2021dec.onnx",
        "Apache-2.0; training data not stated",
        True,
        39,
    ),
    "scorer-clip": Weight("openai/clip-vit-large-patch14", "", "MIT", True, 1710),
    "scorer-dino": Weight(
        "timm/vit_small_patch16_224.dino",
        "model.safetensors",
        "Apache-2.0",
        True,
        87,
        folder="scorer-dino",
    ),
    "scorer-lpips": Weight(
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "alexnet-owt-7be5be79.pth",
        "BSD-3-Clause",
        True,
        233,
    ),
    "scorer-inception": Weight(f"{_FIDELITY}/{_INCEPTION}", _INCEPTION, "Apache-2.0", True, 91),
    "dreamshaper": Weight(
        "Lykon/dreamshaper-xl-lightning", "", "CreativeML Open RAIL++-M", True, 6940
    ),
}
"""Published weights by the short name that presets use. Sizes are rounded from the hub."""

SHA256 = {
    "pulid-flux-v0.9.1": "92c41c3af322b02e58e1b32842e4601e08c8f16ec1fe80089dbe957df510f51d",
    "detector": "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91",
    "arcface": "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf",
    "yunet": "ebafce4e3c118d6554634be5c27ab333b4c047a9a8c3faf1d7cf93101c22f0f0",
    "auraface": "a7933ea5330113b01c9b60351d8f4c33003f145d8470ac5f0e52ee2effe25c60",
    "scorer-sface": "0ba9fbfa01b5270c96627c4ef784da859931e02f04419c829e83484087c34e79",
    "eva": "84c3a17a228c567a155259b2245b0b59072bf7da510260a0a02ec54de6d50b05",
    "parsing": "468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567",
    "arcface-loss": "a035c768259b98ab1ce0e646312f48b9e1e218197a0f80ac6765e88f8b6ddf28",
    "clip-h": "6ca9667da1ca9e0b0f75e46bb030f7e011f44f86cbfb8d5a36590fcd7507b030",
    "ip-adapter-plus": "3f5062b8400c94b7159665b21ba5c62acdcd7682262743d7f2aefedef00e6581",
    "ip-adapter-plus-face": "677ad8860204f7d0bfba12d29e6c31ded9beefdf3e4bbd102518357d31a292c1",
    "buffalo-l": "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43",
    "faceid": "f455fed24e207c878ec1e0466b34a969d37bab857c5faa4e8d259a0b4ff63d7e",
    "instantid": "02b3618e36d803784166660520098089a81388e61a93ef8002aa79a5b1c546e1",
    "identitynet": "c8127be9f174101ebdafee9964d856b49b634435cf6daa396d3f593cf0bbbb05",
}
"""SHA-256 of single files for which several independent projects state the same value.

For other files of the hub, the hub itself reports the hash when they are downloaded.
"""
