"""What is measured and where: two disjoint worlds, one to train on and one that is held out.

Nothing of a world's sensor kinds, places, sites or marks for "no value" occurs in the other.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ForeignUnit:
    """Another unit for the same quantity: `value * factor + offset`."""

    unit: str
    factor: float
    offset: float = 0.0


@dataclass(frozen=True)
class SensorKind:
    """A quantity, the range that its readings live in, and how finely they are written.

    A reading has at most four digits, as the product's routes write no more.
    """

    quantity: str
    unit: str
    low: float
    high: float
    decimals: int
    foreign: tuple[ForeignUnit, ...] = ()


@dataclass(frozen=True)
class World:
    """Where scenarios come from. `marks` are what sensors send in place of a value."""

    kinds: tuple[SensorKind, ...]
    places: tuple[str, ...]
    sites: tuple[str, ...]
    marks: tuple[str, ...]


_FAHRENHEIT = ForeignUnit("°F", 1.8, 32.0)

TRAINING = World(
    kinds=(
        SensorKind("temperature", "°C", 5, 90, 1, (_FAHRENHEIT, ForeignUnit("K", 1.0, 273.15))),
        SensorKind("air temperature", "°C", -19, 38, 1, (_FAHRENHEIT,)),
        SensorKind("freezer temperature", "°C", -30, -6, 1, (_FAHRENHEIT,)),
        SensorKind("pressure", "bar", 1, 25, 1, (ForeignUnit("psi", 14.5038), ForeignUnit("kPa", 100.0))),
        SensorKind("humidity", "%", 20, 95, 1),
        SensorKind("flow", "l/min", 20, 400, 0, (ForeignUnit("m3/h", 0.06), ForeignUnit("gal/min", 0.26417))),
        SensorKind("level", "m", 0.4, 8, 2, (ForeignUnit("cm", 100.0), ForeignUnit("ft", 3.28084))),
        SensorKind("voltage", "V", 10, 60, 1, (ForeignUnit("mV", 1000.0),)),
        SensorKind("current", "A", 1, 80, 1, (ForeignUnit("mA", 1000.0),)),
        SensorKind("vibration", "mm/s", 0.5, 18, 1, (ForeignUnit("in/s", 0.03937),)),
        SensorKind("CO2", "ppm", 400, 3000, 0, (ForeignUnit("%", 0.0001),)),
        SensorKind("power", "kW", 1, 50, 1, (ForeignUnit("W", 1000.0), ForeignUnit("hp", 1.34102))),
        SensorKind("speed", "rpm", 500, 3000, 0, (ForeignUnit("Hz", 0.0166667),)),
        SensorKind("air pressure", "hPa", 900, 1050, 0, (ForeignUnit("mmHg", 0.750062),)),
        SensorKind("oxygen", "mg/l", 2, 9.5, 2, (ForeignUnit("%", 11.0),)),
        SensorKind("noise", "dB", 25, 120, 0),
        SensorKind("mains frequency", "Hz", 40, 70, 1, (ForeignUnit("kHz", 0.001),)),
        SensorKind("gauge", "mbar", 15, 400, 0, (ForeignUnit("mmH2O", 10.1972),)),
    ),
    places=(
        *("pump 1", "pump 7", "pump 12", "boiler", "boiler 2", "cold store", "cold store 3", "kitchen"),
        *("greenhouse", "greenhouse 4", "compressor 2", "compressor 9", "tank", "tank 5", "well 3", "silo 2"),
        *("workshop", "server room", "battery A", "battery B", "inverter", "mixer 6", "oven 1", "line 8"),
        *("main valve", "filter 2", "stable", "milk tank", "office", "stairwell"),
    ),
    sites=(
        *("north", "south", "east", "west", "cellar", "roof", "yard", "hall", "lab", "gate", "loft"),
        *("depot", "ramp", "bridge", "canteen", "foyer", "garage", "store", "pit", "hut"),
    ),
    marks=(
        *("null", "nan", "--", "n/a", "ERR", "lost", "error", "no data", "timeout", "-", "#N/A", "missing"),
        *("offline", "*", "bad", "void", "unknown", "x", "OL", "invalid", "....", "!!", "sensor?", "open"),
    ),
)

HELD_OUT = World(
    kinds=(
        SensorKind("wind speed", "m/s", 1, 30, 1, (ForeignUnit("km/h", 3.6), ForeignUnit("kn", 1.94384))),
        SensorKind("weight", "kg", 20, 900, 0, (ForeignUnit("lb", 2.20462), ForeignUnit("t", 0.001))),
        SensorKind("conductivity", "µS/cm", 50, 1500, 0, (ForeignUnit("mS/cm", 0.001),)),
        SensorKind("acidity", "pH", 4, 9.6, 2),
        SensorKind("turbidity", "NTU", 0.5, 9, 2, (ForeignUnit("FTU", 1.1),)),
        SensorKind("illuminance", "lx", 50, 2000, 0, (ForeignUnit("klx", 0.001),)),
        SensorKind("distance", "mm", 100, 2500, 0, (ForeignUnit("in", 0.03937),)),
        SensorKind("methane", "%LEL", 1, 40, 1),
    ),
    places=(
        *("crane 3", "belt 2", "turbine", "turbine 6", "basin 1", "clarifier", "digester 2", "weighbridge"),
        *("mast", "hopper 4", "fish pond", "tunnel 5"),
    ),
    sites=("attic", "barn", "dock", "quarry", "tower", "harbour", "mill", "shed", "island", "kiosk"),
    marks=("none", "---", "fault", "?"),
)
