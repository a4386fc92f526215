"""The list of MultiID-Bench (arXiv 2510.14975): cases of one person with a prompt of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from openpulid.bench.files import read_json
from openpulid.bench.run_dir import Subject
from openpulid.bench.suite import MAX_PEOPLE, Prompt, Suite, Text
from openpulid.errors import OptionError
from openpulid.io.images import open_image


@dataclass(frozen=True)
class Case:
    """An entry of the list. The benchmark's converter writes it; further fields are ignored.

    Attributes:
        prompt: describes the ground truth.
        image_paths: reference images, one per person.
        ori_img_path: the ground truth, another image of the person.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore")

    prompt: Text
    image_paths: Annotated[Sequence[Text], Field(min_length=1)]
    ori_img_path: Text


def load_cases(suite: Suite, folder: Path, limit: int | None = None) -> tuple[Suite, list[Subject]]:
    """Load the cases of a suite: the suite with their prompts, and their people.

    A case is called like the file of its ground truth, which is the second image of its person.

    Args:
        suite: names the list.
        folder: with the list NAME.json, and the images in NAME/untar.
        limit: number of cases; None loads all.

    Raises:
        OptionError: the list is missing or invalid, or a case shows several people.
        ImageError: an image cannot be read.
    """
    path = folder / suite.case_list
    if not path.is_file():
        raise OptionError(
            f"{path} does not exist; pass the folder that the benchmark's hf2bench.py writes "
            "with --people."
        )
    cases = read_json(list[Case], path, "convert the benchmark again.")[: limit or MAX_PEOPLE]
    images = folder / path.stem / "untar"
    prompts = []
    subjects = []
    for case in cases:
        name = Path(case.ori_img_path).stem
        if len(case.image_paths) > 1:
            raise OptionError(f"{path}: case {name} has several people; use a list of one person.")
        for file in (case.image_paths[0], case.ori_img_path):
            if Path(file).name != file:
                raise OptionError(f"{path}: {json.dumps(file)} is not the name of a file.")
        prompts.append(Prompt(case.prompt, person=name))
        reference, ground_truth = (
            open_image(images / file) for file in (case.image_paths[0], case.ori_img_path)
        )
        subjects.append(Subject(name, reference, ground_truth))
    if len({subject.name for subject in subjects}) < len(subjects) or not subjects:
        raise OptionError(f"{path}: every case needs a ground truth of another name.")
    return replace(suite, prompts=prompts), subjects
