"""Shares of a band with which all who take part in a round finish at the same time."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float

__all__ = ["equal_finish_shares", "finish_times_s", "uplink_s"]

Array = np.ndarray
_MOST_PASSES, _STEPS, _TOLERANCE = 30, 2, 1e-6
_NOTHING_S = 1e-200
_LEAST_SNR = 1e-8  # below, the rate is snr / ln 2 whatever the share, to 8 digits


def uplink_s(
    shares: Float[Array, "*worlds devices"],
    up_bits_per_hz: Float[Array, "*worlds devices"],
    snr: Float[Array, "*worlds devices"],
) -> Float[Array, "*worlds devices"]:
    """Return how long each device sends: up / (w log2(1 + snr / w)).

    Args:
        shares: Share w of the band, in (0, 1].
        up_bits_per_hz: Bits to send, over the width of the whole band [bit/Hz].
        snr: Signal-to-noise ratio on the whole band, all power spread over it, linear.
    """
    return np.asarray(up_bits_per_hz * math.log(2) / (shares * np.log1p(snr / shares)))


def finish_times_s(
    shares: Float[Array, "*worlds devices"],
    fixed_s: Float[Array, "*worlds devices"],
    down_s: Float[Array, "*worlds devices"],
    up_bits_per_hz: Float[Array, "*worlds devices"],
    snr: Float[Array, "*worlds devices"],
) -> Float[Array, "*worlds devices"]:
    """Return when each device is done: fixed + down / w + up / (w log2(1 + snr / w)).

    A device has the same share w of both bands. The base station spreads its power evenly over its
    band, so that downlink time goes with 1 / w; a device puts all its power into its share, so that
    a narrow band is used better.

    Args:
        shares: Share w of the band, in (0, 1].
        fixed_s: Time that no band shortens: the local steps [s].
        down_s: Downlink time on the whole band [s].
        up_bits_per_hz: As of ``uplink_s``, as is the next.
        snr: Signal-to-noise ratio on the whole band, linear.
    """
    return np.asarray(fixed_s + down_s / shares + uplink_s(shares, up_bits_per_hz, snr))


def equal_finish_shares(
    fixed_s: Float[Array, "*worlds devices"],
    down_s: Float[Array, "*worlds devices"],
    up_bits_per_hz: Float[Array, "*worlds devices"],
    snr: Float[Array, "*worlds devices"],
    active: Bool[Array, "*worlds devices"],
) -> Float[Array, "*worlds devices"]:
    """Return the shares of a band that make the round as short as can be.

    Each time falls with its share, and the longest one is a convex function of the shares, so at
    the optimum the whole band is given out and all are done at once; only a device with nothing to
    send gets nothing. In 1 / w each time is concave and nearly straight. Each pass puts tangents in
    place of the times and solves that: tangents lie above, so that the passes come down on the
    optimum, each with about twice the digits of the one before.

    Args:
        fixed_s: As of ``finish_times_s``, as are the next three.
        down_s: Downlink time on the whole band [s].
        up_bits_per_hz: Bits to send over the width of the whole band [bit/Hz].
        snr: Signal-to-noise ratio on the whole band, linear.
        active: Who takes part.

    Returns:
        Shares that sum to 1 in each world where somebody takes part; 0 for those who do not.

    Source:
        Yang et al. (2019), Energy efficient federated learning over wireless communication networks
        (arXiv:1911.02417), whose minimum-time problem is solved by bisection; tangents are ours.
    """
    used = active & (down_s + up_bits_per_hz > 0)
    fixed, down, up, gain = (
        np.where(used, part, unused).reshape(-1, used.shape[-1]).T.copy()  # (devices, worlds)
        for part, unused in (
            (fixed_s, 0.0),
            (down_s, _NOTHING_S),
            (up_bits_per_hz * math.log(2), 0.0),
            (np.maximum(snr, _LEAST_SNR), 1.0),
        )
    )
    inverse = np.full(fixed.shape, float(len(fixed)))  # 1 / w, from equal shares
    finish = np.zeros(fixed.shape[1]), np.zeros(fixed.shape[1])
    for _ in range(_MOST_PASSES):
        before = inverse
        ratio = gain * inverse
        nats = np.log1p(ratio)
        slope = down + up / nats * (1 - ratio / (1 + ratio) / nats)
        start = fixed + (down + up / nats - slope) * inverse
        inverse, finish = _straight(start, slope, finish)
        if (np.abs(inverse - before) <= _TOLERANCE * inverse).all():
            break
    shares = np.where(used, (1 / inverse).T.reshape(used.shape), 0.0)
    return np.asarray(shares / np.maximum(shares.sum(-1, keepdims=True), _NOTHING_S))


def _straight(
    start: Float[Array, "devices worlds"],
    slope: Float[Array, "devices worlds"],
    guess: tuple[Float[Array, " worlds"], Float[Array, " worlds"]],
) -> tuple[Float[Array, "devices worlds"], tuple[Float[Array, " worlds"], Float[Array, " worlds"]]]:
    """Return 1 / w, and the time at which all with finish times start + slope / w are done.

    That time T solves sum slope / (T - start) = 1. The reciprocal of the sum is concave and rises,
    so that Newton's method on it comes up on T from below; the few steps taken here go on in the
    next pass, from the guess. T is kept as the last start and the time beyond it, lest it lose its
    digits where that is late.

    Source:
        Reinsch (1971), Smoothing by spline functions II: Newton's method on the reciprocal.
    """
    last, total = start.max(0), slope.sum(0)
    early = last - start
    alone, alike = (slope - early).max(0), total - (slope * early).sum(0) / total
    least = np.maximum(alone, alike)  # by the slowest alone, and by the mean start for all
    beyond = np.maximum(least, guess[1] + (guess[0] - last))
    for _ in range(_STEPS):
        shares = slope / (beyond + early)
        given = shares.sum(0)
        beyond = np.maximum(least, beyond + (given - 1) * given / (shares**2 / slope).sum(0))
    return (beyond + early) / slope, (last, beyond)
