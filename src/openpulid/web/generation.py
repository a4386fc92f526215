"""Generate the images of a request, and report them to the page."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from PIL import Image

from openpulid.pipelines.prompts import check_words
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.result import save_generated
from openpulid.web.inputs import open_request, save_original
from openpulid.web.session import WebSession
from openpulid.web.updates import PageImage, StepWatch, Update, pair_images


def generate_images(
    session: WebSession,
    request: GenerationRequest,
    also_without_identity: bool = False,
    report: Callable[[Update], object] = lambda update: None,
    job: str = "",
) -> list[PageImage]:
    """Generate the images of a request.

    Args:
        session: the backend.
        request: the request; its input files are uploads.
        also_without_identity: generate every image a second time, with the same seed and
            without the person.
        report: receives every step, and every image as soon as it is saved.
        job: name of this call for `WebSession.stop`.

    Returns:
        The images. After `WebSession.stop` those that were finished.
    """
    models = request.model or session.models
    preset = session.preset(models)
    check_words(preset, preset.resolve(request))  # before anything is loaded
    inputs = open_request(session, request, models)
    inputs.check(preset.models)
    studio = session.studio(models)
    directory = session.make_folder()
    has_pairs = bool(request.people) and also_without_identity
    watch = StepWatch(report, partial(session.is_stopped, job), num_runs=1 + has_pairs)
    images: list[PageImage] = []
    before = save_original(session, inputs, request, directory)

    def save(image: Image.Image, shown: GenerationRequest) -> None:
        directory.mkdir(exist_ok=True)  # the visitor may have deleted all images meanwhile
        file = save_generated(image, shown, directory, fingerprints, signer=session.signer)
        caption = f"seed {shown.seed}" + ("" if shown.people else ", no identity")
        images.append(PageImage(str(file), shown.seed, caption, before))
        report(images[-1])

    fingerprints = inputs.fingerprints
    studio.generate(request, inputs=inputs, on_image=save, callback=watch)
    if not has_pairs or watch.is_stopped():
        return images
    with_identity = list(images)
    images.clear()
    watch.start_run()
    inputs = inputs.without_people()
    fingerprints = inputs.fingerprints
    studio.generate(request.without_people(), inputs=inputs, on_image=save, callback=watch)
    return pair_images(with_identity, images)
