"""How often the label of an image is in its own score map: maps whose classes are in another order agree by chance."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from refiner_ds.data.index import ShardIndex
from refiner_ds.data.samples import SampleReader
from refiner_ds.data.score_maps import decode

MOST_IMAGES = 20_000  # a sample of a larger set says the same
PLAUSIBLE = 0.25  # of the way from chance to always
FEWEST_OF_A_CLASS = 5  # images from which a class is judged by itself
SHOWN_CLASSES = 3


@dataclass
class ClassCount:
    """Images of one class: how many, in how many the label comes first somewhere, and what comes first most."""

    images: int = 0
    first: int = 0
    leading: Counter[int] = field(default_factory=Counter)

    @property
    def leader(self) -> int:
        """The class that is top-1 in most of the images' maps."""
        return self.leading.most_common(1)[0][0]


@dataclass
class Agreement:
    """Counts over images, and the shares that class numbers at random would give.

    Attributes:
        images: looked at.
        listed: whose label is among the classes of some place.
        first: whose label is the first class of some place.
        by_chance_listed, by_chance_first: sums of the probabilities of that, were the label any class.
    """

    classes: list[str]
    images: int = 0
    listed: int = 0
    first: int = 0
    by_chance_listed: float = 0.0
    by_chance_first: float = 0.0
    by_class: dict[int, ClassCount] = field(default_factory=dict)

    def add(self, classes_Khw: np.ndarray, label: int) -> None:
        """Count one image's map."""
        listed, (first, places) = np.unique(classes_Khw), np.unique(classes_Khw[0], return_counts=True)
        self.images += 1
        self.listed += label in listed
        self.first += label in first
        self.by_chance_listed += len(listed) / len(self.classes)
        self.by_chance_first += len(first) / len(self.classes)
        count = self.by_class.setdefault(label, ClassCount())
        count.images += 1
        count.first += label in first
        count.leading[int(first[places.argmax()])] += 1

    def describe(self) -> str:
        """The counts in one line."""
        images = max(self.images, 1)
        return (
            f"labels in their own maps: {self.listed / images:.1%} of {self.images:,} images "
            f"({self.by_chance_listed / images:.1%} by chance), as the first class of a place "
            f"{self.first / images:.1%} ({self.by_chance_first / images:.1%} by chance)"
        )

    def warnings(self) -> list[str]:
        """A sentence where the labels cannot be those that the annotator means, for the set or for a few classes."""
        images = max(self.images, 1)
        found, chance = self.first / images, self.by_chance_first / images
        enough = chance + PLAUSIBLE * (1 - chance)
        if found < enough:
            return [
                "the labels are hardly in their own maps: the annotator may number its classes in another order than "
                "the set, or not know such images; do not train on these maps before that is clear"
            ]
        alone = [
            f"{self.classes[label]} (its maps say {self.classes[count.leader]})"
            for label, count in sorted(self.by_class.items())
            if count.images >= FEWEST_OF_A_CLASS and count.first / count.images < enough and count.leader != label
        ]
        if not alone:
            return []
        more = f" and {len(alone) - SHOWN_CLASSES} more" if len(alone) > SHOWN_CLASSES else ""
        return [f"classes that are hardly in their own maps: {', '.join(alone[:SHOWN_CLASSES])}{more}"]


def measure(maps: ShardIndex) -> Agreement:
    """Compare the maps of a set with its labels; of a large set, samples evenly spread over it.

    Raises:
        DataError: a sample is damaged.
    """
    reader = SampleReader(maps)
    found = Agreement(maps.classes)
    for sample in np.linspace(0, maps.count - 1, min(maps.count, MOST_IMAGES)).round().astype(int).tolist():
        raw = reader.read(sample)
        found.add(decode(raw.score_map, raw.location).classes_Khw, raw.label)
    return found
