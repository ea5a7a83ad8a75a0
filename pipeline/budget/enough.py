"""Whether there are enough images for what a run will compute. Found before the first long stage, not in the last."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from conf.schema import Settings
from stages.runtime.errors import InputError


def require_enough(settings: Settings, stages: Collection[str], dataset: Path | None) -> None:
    """Check the numbers of images that the scores compare.

    Args:
        settings: Settings of all stages.
        stages: Names of the stages that will run.
        dataset: The finished artifact of stage `dataset`; None if it is not made yet.

    Raises:
        InputError: There are too few.
    """
    if "evaluate" not in stages:
        return
    evaluate = settings.evaluate
    numbers = {
        "sample.num_samples": settings.sample.num_samples,
        "evaluate.compared": evaluate.compared,
        "evaluate.max_reference": evaluate.max_reference,
    }
    for name, number in numbers.items():
        if number is not None and number <= evaluate.neighbours:
            raise _too_few(f"{name} is {number}", evaluate.neighbours, "raise it")
    if dataset is None:
        return
    from stages.stores.image_index import num_images_of_parts

    num_train, num_heldout = num_images_of_parts(dataset)
    if num_train <= evaluate.neighbours:
        raise _too_few(f"the data set has {num_train} training images", evaluate.neighbours, "add images")
    if evaluate.ladder and num_heldout == 1:
        raise InputError(
            "one image is held out, expected none or at least two: a distance needs a covariance. Raise "
            "dataset.heldout_fraction, set it to 0, or set evaluate.ladder to false"
        )


def repeated_images(settings: Settings, stages: Collection[str], dataset: Path) -> Iterator[str]:
    """One line for each training among `stages` whose batch is larger than the training images of `dataset`."""
    from stages.stores.image_index import num_images_of_parts

    num_train, _ = num_images_of_parts(dataset)
    for name in stages:
        section = getattr(settings, name)
        trains = hasattr(section, "training") and getattr(section, "source", "train") == "train"
        if trains and section.training.global_batch_size > num_train:
            yield (
                f"{name}.training.global_batch_size is {section.training.global_batch_size} and there are {num_train} "
                "training images: every step takes some of them several times"
            )


def _too_few(found: str, neighbours: int, action: str) -> InputError:
    return InputError(
        f"{found}, expected more than {neighbours}, the neighbours of precision and recall: {action}, or lower "
        "evaluate.neighbours"
    )
