"""How signals reach a device: loss over distance, shadows of buildings, fading, and the rate left.

All arrays broadcast; by convention the last axis is that of the devices.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Complex, Float
from numpy.polynomial.polynomial import polyval

from fedpeat.mec.constants import (
    DECORRELATION_DISTANCE_M,
    MIN_DISTANCE_M,
    PATH_LOSS_AT_1_KM_DB,
    PATH_LOSS_PER_DECADE_DB,
    SPEED_OF_LIGHT_M_S,
)

__all__ = [
    "achievable_rate_bps",
    "bessel_j0",
    "cosine",
    "decibels",
    "fading_correlation",
    "fresh_fading",
    "linear",
    "next_fading",
    "next_shadowing",
    "path_loss_db",
    "shadowing_correlation",
]

Array = np.ndarray
_NEAR_ZERO = (1, -2.2499997, 1.2656208, -0.3163866, 0.0444479, -0.0039444, 0.00021)
_AMPLITUDE = (0.79788456, -7.7e-7, -0.0055274, -9.512e-5, 0.00137237, -7.2805e-4, 1.4476e-4)
_PHASE = (-0.78539816, -0.04166397, -3.954e-5, 0.00262573, -5.4125e-4, -2.9333e-4, 1.3558e-4)


def linear(ratio_db: Float[Array, ...] | float) -> Float[Array, ...]:
    """Return a power ratio given in dB as a number."""
    return np.asarray(np.exp(np.asarray(ratio_db) * (math.log(10) / 10)))


def decibels(ratio: Float[Array, ...] | float) -> Float[Array, ...]:
    """Return a power ratio in dB; 0 gives -inf."""
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(ratio))


def path_loss_db(distance_m: Float[Array, ...]) -> Float[Array, ...]:
    """Return the mean loss between a base station and a device [dB].

    Args:
        distance_m: Distance [m]; below ``MIN_DISTANCE_M`` it counts as that.

    Source:
        3GPP TR 36.814, table A.2.1.1-2 (macro cell at 2 GHz): 128.1 + 37.6 log10(d / 1 km).
    """
    distance_km = np.maximum(distance_m, MIN_DISTANCE_M) / 1e3
    return np.asarray(PATH_LOSS_AT_1_KM_DB + PATH_LOSS_PER_DECADE_DB * np.log10(distance_km))


def achievable_rate_bps(
    snr: Float[Array, ...], bandwidth_hz: Float[Array, ...]
) -> Float[Array, ...]:
    """Return the Shannon rate on a band of its own [bit/s].

    Args:
        snr: Signal-to-noise ratio on that band, linear (not dB).
        bandwidth_hz: Width of the band [Hz].

    Source:
        Shannon (1948), theorem 17: C = W log2(1 + P / N).
    """
    return np.asarray(bandwidth_hz * np.log2(1 + snr))


def shadowing_correlation(moved_m: Float[Array, ...]) -> Float[Array, ...]:
    """Return the correlation of shadowing [dB] before and after a device moved [m].

    Source:
        Gudmundson (1991), Correlation model for shadow fading in mobile radio systems:
        exp(-d / d_corr), d_corr of 3GPP TR 36.814 for macro cells.
    """
    return np.asarray(np.exp(-np.asarray(moved_m) / DECORRELATION_DISTANCE_M))


def fading_correlation(
    speed_m_s: Float[Array, ...], carrier_hz: float, elapsed_s: Float[Array, ...]
) -> Float[Array, ...]:
    """Return the correlation of a Rayleigh channel's amplitude after some time.

    Args:
        speed_m_s: Speed of the device, or of what moves about it [m/s].
        carrier_hz: Carrier frequency [Hz].
        elapsed_s: Time between the two looks [s].

    Source:
        Clarke (1968), Jakes (1974): J0(2 pi f_D t) with the Doppler shift f_D = v f / c.
    """
    doppler_hz = np.asarray(speed_m_s) * carrier_hz / SPEED_OF_LIGHT_M_S
    return bessel_j0(np.asarray(2 * np.pi * doppler_hz * elapsed_s))


def bessel_j0(argument: Float[Array, ...]) -> Float[Array, ...]:
    """Return the Bessel function J0 of numbers that are 0 or more, to 1e-7.

    Source:
        Abramowitz and Stegun (1964), 9.4.1 and 9.4.3.
    """
    large = np.maximum(argument, 3.0)
    inverse = 3 / large
    phase = large + polyval(inverse, _PHASE)
    value = np.asarray(polyval(inverse, _AMPLITUDE) * cosine(phase) / np.sqrt(large))
    small = argument <= 3
    if small.any():  # seldom, between rounds
        value[small] = polyval((argument[small] / 3) ** 2, _NEAR_ZERO)
    return value


def cosine(angle: Float[Array, ...]) -> Float[Array, ...]:
    """Return the cosine, by the tangent of half the angle: NumPy is much faster at tangents."""
    square = np.tan(angle / 2) ** 2
    return np.asarray((1 - square) / (1 + square))


def next_shadowing(
    shadowing_db: Float[Array, ...],
    correlation: Float[Array, ...],
    deviation_db: float,
    rng: np.random.Generator,
) -> Float[Array, ...]:
    """Return the shadowing of the next round [dB]: normal, of the same deviation for ever."""
    fresh = rng.standard_normal(shadowing_db.shape) * deviation_db
    return np.asarray(correlation * shadowing_db + np.sqrt(1 - correlation**2) * fresh)


def fresh_fading(shape: tuple[int, ...], rng: np.random.Generator) -> Complex[Array, ...]:
    """Return Rayleigh channels: in-phase and quadrature amplitudes, of mean power 1."""
    parts = rng.standard_normal((*shape, 2)) * math.sqrt(0.5)
    return np.asarray(parts.view(np.complex128)[..., 0])


def next_fading(
    amplitude: Complex[Array, ...], correlation: Float[Array, ...], rng: np.random.Generator
) -> Complex[Array, ...]:
    """Return the channels of the next round; their mean power stays 1 for ever."""
    fresh = fresh_fading(amplitude.shape, rng)
    return np.asarray(correlation * amplitude + np.sqrt(1 - correlation**2) * fresh)
