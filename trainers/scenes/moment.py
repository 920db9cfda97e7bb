"""The acquisition time of a scene: its season and the position of the sun."""

import math
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np

from orbithash.trainers.scenes.palette import Color, mixed

__all__ = ["SEASONS", "Light", "Season", "light_at", "random_moment"]


@dataclass(frozen=True)
class Season:
    """The colours of a season.

    Args:
        phrase: names the season at the end of a sentence, such as "in spring".
        months: months of the season, 1 to 12.
        grass: colour of grass.
        soil: colour of bare soil.
        foliage: colours of tree crowns.
        snow: amount of snow, 0 to 1.
    """

    phrase: str
    months: tuple[int, ...]
    grass: Color
    soil: Color
    foliage: tuple[Color, ...]
    snow: float = 0.0

    def covered(self, color: Color, share: float = 0.8) -> Color:
        """Return the colour of a surface seen from above; snow, if there is any, covers the fraction `share` of it."""
        return mixed(color, (236, 240, 246), share * self.snow)


SEASONS = {
    "spring": Season(
        phrase="in spring",
        months=(3, 4, 5),
        grass=(104, 134, 62),
        soil=(139, 108, 78),
        foliage=((74, 110, 46), (96, 130, 54), (58, 92, 44), (122, 144, 70)),
    ),
    "summer": Season(
        phrase="in summer",
        months=(6,),
        grass=(88, 116, 56),
        soil=(152, 122, 88),
        foliage=((48, 80, 38), (62, 94, 42), (38, 68, 36), (76, 102, 48)),
    ),
    "dry season": Season(
        phrase="in the dry season",
        months=(7, 8),
        grass=(172, 154, 100),
        soil=(184, 152, 112),
        foliage=((74, 86, 46), (92, 98, 54), (62, 78, 44), (112, 108, 62)),
    ),
    "autumn": Season(
        phrase="in autumn",
        months=(10, 11),
        grass=(124, 122, 66),
        soil=(126, 96, 70),
        foliage=((176, 104, 38), (198, 142, 52), (146, 68, 36), (104, 104, 48)),
    ),
    "winter": Season(
        phrase="after snowfall",
        months=(1, 2, 12),
        grass=(132, 122, 84),
        soil=(116, 94, 76),
        foliage=((108, 94, 82), (126, 112, 98), (92, 82, 74), (64, 78, 60)),
        snow=1.0,
    ),
}


@dataclass(frozen=True)
class Light:
    """The position of the sun: azimuth (clockwise from north) and elevation, in degrees."""

    azimuth: float
    elevation: float

    @property
    def shadow(self) -> tuple[float, float]:
        """Return the shadow vector of an object 1 m high: metres to the right and metres down the image (north up)."""
        length = 1 / math.tan(math.radians(self.elevation))
        turn = math.radians(self.azimuth)
        return -math.sin(turn) * length, math.cos(turn) * length

    @property
    def toward(self) -> tuple[float, float]:
        """Return the unit vector in the image that points towards the sun."""
        turn = math.radians(self.azimuth)
        return math.sin(turn), -math.cos(turn)


def random_moment(season: Season, rng: np.random.Generator) -> datetime:
    """Return a random time of this season between 10:00 and 14:30 UTC, when optical satellites pass."""
    month = season.months[rng.integers(len(season.months))]
    minute = int(rng.integers(10 * 60, 14 * 60 + 30))
    day = datetime(int(rng.integers(2018, 2026)), month, int(rng.integers(1, 29)))
    return day + timedelta(minutes=minute, seconds=int(rng.integers(60)))


def light_at(moment: datetime, lon: float, lat: float) -> Light:
    """Return the position of the sun at a place (degrees, WGS 84) and a time in UTC.

    The error is a few degrees at most, because the equation of time is ignored.
    """
    day_of_year = moment.timetuple().tm_yday
    declination = math.radians(-23.44 * math.cos(2 * math.pi * (day_of_year + 10) / 365))
    hour_angle = math.radians(15 * (moment.hour + moment.minute / 60 - 12) + lon)
    phi = math.radians(lat)
    sine = math.sin(phi) * math.sin(declination) + math.cos(phi) * math.cos(declination) * math.cos(hour_angle)
    east = -math.cos(declination) * math.sin(hour_angle)
    north = math.cos(phi) * math.sin(declination) - math.sin(phi) * math.cos(declination) * math.cos(hour_angle)
    return Light(azimuth=math.degrees(math.atan2(east, north)) % 360, elevation=math.degrees(math.asin(sine)))
