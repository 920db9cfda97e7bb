"""What a run does not know about its model, and the publisher states: name, licences, provider, extent."""

import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime

from orbithash.encoders.errors import InputError, listed

__all__ = ["LICENCES", "NOT_STATED", "Licence", "Statements", "parse_bbox"]

NOT_STATED = "not stated"

# Identifiers of licences on the Hugging Face hub, and their SPDX identifiers, which STAC asks for.
LICENCES = {
    "agpl-3.0": "AGPL-3.0-only",
    "apache-2.0": "Apache-2.0",
    "bsd-2-clause": "BSD-2-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "cc-by-4.0": "CC-BY-4.0",
    "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "cc-by-nc-nd-4.0": "CC-BY-NC-ND-4.0",
    "cc-by-nc-sa-4.0": "CC-BY-NC-SA-4.0",
    "cc-by-nd-4.0": "CC-BY-ND-4.0",
    "cc-by-sa-4.0": "CC-BY-SA-4.0",
    "cc0-1.0": "CC0-1.0",
    "cdla-permissive-2.0": "CDLA-Permissive-2.0",
    "etalab-2.0": "etalab-2.0",
    "eupl-1.2": "EUPL-1.2",
    "gpl-2.0": "GPL-2.0-only",
    "gpl-3.0": "GPL-3.0-only",
    "isc": "ISC",
    "lgpl-2.1": "LGPL-2.1-only",
    "lgpl-3.0": "LGPL-3.0-only",
    "mit": "MIT",
    "mpl-2.0": "MPL-2.0",
    "odc-by": "ODC-By-1.0",
    "unlicense": "Unlicense",
}

MAX_CHARACTERS = 1000
# The pattern of `mlm:name`.
_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9_.\- ]+[a-zA-Z0-9]")


@dataclass(frozen=True)
class Licence:
    """A licence as somebody stated it; "" if nobody did."""

    text: str

    @property
    def hub_id(self) -> str:
        """The hub's identifier: one of `LICENCES`, "other", or "unknown" if no licence is stated."""
        if not self.text:
            return "unknown"
        return self.text.lower() if self.text.lower() in LICENCES else "other"

    @property
    def spdx_id(self) -> str:
        """The SPDX identifier; "other" if there is none or no licence is stated."""
        return LICENCES.get(self.text.lower(), "other")

    @property
    def short_name(self) -> str:
        """The text in the characters that the hub allows for the name of another licence."""
        return re.sub(r"[^a-z0-9.]+", "-", self.text.lower()).strip("-.")[:96] or "other"

    @property
    def shown(self) -> str:
        """The text, or "not stated"."""
        return self.text or NOT_STATED


@dataclass(frozen=True)
class Statements:
    """What the publisher states about a model; an empty text means that it is not stated.

    Attributes:
        name: name of the model; "": made of dataset, method and bits.
        licence: licence of the model.
        provider: organisation or person that publishes the model.
        data_licence: licence of the training data.
        bbox: west, south, east and north of the training data in degrees; west may exceed east across 180 degrees.
        dates: first and last date of the training data, ISO 8601, as "2020-01-01/2021-06-30".
        has_examples: whether the card lists keys and captions of test images that the model ranks worst.
    """

    name: str = ""
    licence: Licence = Licence("")
    provider: str = ""
    data_licence: Licence = Licence("")
    bbox: tuple[float, float, float, float] | None = None
    dates: str = ""
    has_examples: bool = True

    def __post_init__(self) -> None:
        """Raise `InputError` with all problems."""
        problems = []
        if self.name and not _NAME.fullmatch(self.name):
            problems.append(
                f"the name is {self.name!r}; letters, digits, spaces, '.', '_' and '-' are allowed, 3 or more, "
                "a letter first and a letter or digit last"
            )
        texts = {
            "licence": self.licence.text,
            "provider": self.provider,
            "licence of the training data": self.data_licence.text,
        }
        for what, text in texts.items():
            if len(text) > MAX_CHARACTERS or not text.isprintable():
                problems.append(
                    f"the {what} is {text[:50]!r}; one line of at most {MAX_CHARACTERS} characters is allowed"
                )
        if self.bbox is not None and not _is_bbox(self.bbox):
            problems.append(
                f"the bounding box is {','.join(f'{number:g}' for number in self.bbox)}; WEST,SOUTH,EAST,NORTH in "
                "degrees is required"
            )
        if self.dates:
            try:
                self.interval()
            except ValueError:
                problems.append(f"the dates are {self.dates!r}; START/END is required, as 2020-01-01/2021-06-30")
        if problems:
            raise listed(problems, "model card")

    def interval(self) -> tuple[datetime, datetime] | None:
        """Return start and end of `dates`, in UTC; None if they are not stated. `ValueError` for other texts."""
        if not self.dates:
            return None
        start, end = (_utc(datetime.fromisoformat(text)) for text in self.dates.split("/"))
        if start > end:
            raise ValueError("the end is before the start")
        return start, end


def _is_bbox(bbox: tuple[float, ...]) -> bool:
    if len(bbox) != 4 or not all(map(math.isfinite, bbox)):
        return False
    west, south, east, north = bbox
    return -180 <= west <= 180 and -180 <= east <= 180 and -90 <= south <= north <= 90


def _utc(time: datetime) -> datetime:
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def parse_bbox(text: str) -> tuple[float, float, float, float]:
    """Return the four numbers of WEST,SOUTH,EAST,NORTH; `InputError` for any other text."""
    try:
        west, south, east, north = map(float, text.split(","))
    except ValueError as err:
        raise InputError(f"the bounding box is {text!r}; WEST,SOUTH,EAST,NORTH in degrees is required") from err
    return west, south, east, north
