"""Constants of the edge world, each with where it comes from. SI units; decibels end in ``_db``."""

from __future__ import annotations

from typing import Final

__all__ = [
    "BASE_STATION_POWER_W",
    "CARRIER_HZ",
    "DECORRELATION_DISTANCE_M",
    "MIN_DISTANCE_M",
    "NOISE_DENSITY_W_HZ",
    "PATH_LOSS_AT_1_KM_DB",
    "PATH_LOSS_PER_DECADE_DB",
    "SHADOWING_DB",
    "SPEED_OF_LIGHT_M_S",
]

SPEED_OF_LIGHT_M_S: Final = 299_792_458.0
"""By definition of the metre."""
CARRIER_HZ: Final = 2e9
"""3GPP TR 36.814, A.2.1.1: the frequency that its path loss is for."""
PATH_LOSS_AT_1_KM_DB: Final = 128.1
"""3GPP TR 36.814, table A.2.1.1-2, macro cell."""
PATH_LOSS_PER_DECADE_DB: Final = 37.6
"""The same table: an exponent of 3.76."""
MIN_DISTANCE_M: Final = 35.0
"""3GPP TR 36.814, table A.2.1.1-2: least distance between a device and a macro base station."""
SHADOWING_DB: Final = 8.0
"""3GPP TR 36.814, table A.2.1.1-2: standard deviation."""
DECORRELATION_DISTANCE_M: Final = 50.0
"""3GPP TR 36.814, table A.2.1.1-2: correlation distance of shadowing."""
NOISE_DENSITY_W_HZ: Final = 10 ** (-174 / 10) / 1e3
"""-174 dBm/Hz: k T at 290 K, as in Yang et al. (2019), arXiv:1911.02417."""
BASE_STATION_POWER_W: Final = 10 ** (46 / 10) / 1e3
"""46 dBm on the whole band: 3GPP TR 36.814, table A.2.1.1-2, for 10 and 20 MHz."""
