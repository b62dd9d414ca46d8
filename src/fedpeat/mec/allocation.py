"""Shares of a band with which all who take part in a round finish at the same time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float

__all__ = ["equal_finish_shares", "finish_times_s", "uplink_s"]

Array = np.ndarray
_OUTER, _INNER = 14, 10
_LEAST_SHARE, _TINY = 1e-9, 1e-300


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
    return np.asarray(up_bits_per_hz / (shares * np.log2(1 + snr / shares)))


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
    send gets nothing. That time is found outside, the shares that it takes inside, both by secants
    between bounds, in logarithms, in which the curves are nearly straight.

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
        (arXiv:1911.02417), whose minimum-time problem is solved by bisection.
    """
    used = active & (down_s + up_bits_per_hz > 0)
    fixed, down, up = (np.where(used, part, 0.0) for part in (fixed_s, down_s, up_bits_per_hz))
    gain = np.where(used, snr, 1.0)
    whole = np.ones_like(gain)

    def sending_s(shares: Array) -> Array:
        return np.where(used, finish_times_s(shares, 0 * fixed, down, up, gain), 1.0)

    def wanted(deadline_s: Array) -> Array:
        """Return the least shares with which all are done in time."""
        budget = np.where(used, np.maximum(deadline_s - fixed, _TINY), 1.0)
        shares = _root(
            lambda share: np.log(sending_s(np.exp(share)) / budget),
            np.log(_LEAST_SHARE * whole),
            np.zeros_like(gain),
            _INNER,
        )
        return np.where(used, np.exp(shares), 0.0)

    def last_s(shares: Array) -> Array:
        finish = np.where(used, fixed + sending_s(shares), _TINY)
        return np.asarray(finish.max(-1, keepdims=True))

    finish = _root(
        lambda log_s: np.log(np.maximum(wanted(np.exp(log_s)).sum(-1, keepdims=True), _TINY)),
        np.log(last_s(whole)),
        np.log(last_s(whole / np.maximum(used.sum(-1, keepdims=True), 1))),
        _OUTER,
    )
    shares = wanted(np.exp(finish))
    return np.asarray(shares / np.maximum(shares.sum(-1, keepdims=True), _TINY))


def _root(falling: Callable[[Array], Array], low: Array, high: Array, iterations: int) -> Array:
    """Return where a falling function is 0, between bounds, by the Illinois method.

    Source:
        Dowell and Jarratt (1971), A modified regula falsi method.
    """
    above, below = falling(low), falling(high)
    side = np.zeros(low.shape)
    root = high
    for _ in range(iterations):
        width = above - below
        straight = np.divide(above, width, out=np.full_like(above, 0.5), where=width > 0)
        root = low + (high - low) * np.clip(straight, 0, 1)
        value = falling(root)
        left = value < 0  # the root is left of here
        above = np.where(left, np.where(side > 0, above / 2, above), value)
        below = np.where(left, value, np.where(side < 0, below / 2, below))
        low, high = np.where(left, low, root), np.where(left, root, high)
        side = np.where(left, 1, -1)
    return root
