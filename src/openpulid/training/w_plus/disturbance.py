"""The latents that W+ Adapter's disentanglement loss compares with (arXiv 2311.17461).

Shapes: B images, W width of a latent (512), E editing directions.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from openpulid.errors import OptionError

SHARES = {"extrapolate": 0.45, "own": 0.07, "noise": 0.13, "direction": 0.15, "mix": 0.20}
"""Kind of disturbance -> its share of the images, in the authors' code."""

LARGEST_FACTORS = {"extrapolate": 40.0, "own": 6.0, "noise": 8.0, "direction": 1.0, "mix": 1.0}
"""Kind of disturbance -> the largest absolute value of its factor. The last two are chosen here."""

KINDS = tuple(SHARES)


@torch.no_grad()
def disturb_latents(
    latents: Tensor, generator: Generator, directions: Tensor | None = None
) -> Tensor:
    """Return latents of another person for each image, disturbed.

    Image k gets the latents o of the image after it in a random order of the batch, so that no
    image gets its own latents w. One of five terms is added to o, with a factor t that is drawn
    uniformly from a symmetric range:

    | kind | share | term | range of t |
    |---|---|---|---|
    | `extrapolate` | 45 % | t (o - w) | -40 to 40 |
    | `own` | 7 % | t w | -6 to 6 |
    | `noise` | 13 % | t n, with n standard normal | -8 to 8 |
    | `direction` | 15 % | t d | -1 to 1 |
    | `mix` | 20 % | t (m d + (1 - m) d'), with m from 0 to 1 | -1 to 1 |

    The shares, the first three ranges and the other person's latents are the authors'. What is
    known of their code leaves open, and is chosen here:

    - Kind and factor are drawn for each image, and the factor is one for all of its 18 latents.
    - `extrapolate` follows the line through the latents of both people; in `own`, w are the image's
      own latents.
    - `direction` and `mix` take their directions at random, `mix` two that differ if there are two.
      The length of a direction is the largest edit: how far the authors go is not known.
    - Without directions these two kinds are left out, and the shares of the first three grow in
      proportion.
    - In a batch of one image, o is w.

    Args:
        latents: (B, 18, W), or any other shape (B, ...). They are not changed.
        generator: draws everything. It may be on another device.
        directions: (E, 18, W), of the latent space, such as those for age or smile. A direction
            for some of the layers is zero in the others.

    Returns:
        (B, 18, W) in the dtype and on the device of `latents`, without gradient. Computed in
        float32. How much is drawn depends on the shapes alone.

    Raises:
        OptionError: a direction has another shape than the latents of an image.
    """
    if directions is not None and directions.shape[1:] != latents.shape[1:]:
        raise OptionError(
            f"a direction has the shape {tuple(directions.shape[1:])}, and the latents of an image "
            f"have {tuple(latents.shape[1:])}; use one shape for both."
        )
    has_directions = directions is not None and len(directions) > 0
    count = len(latents)
    own = latents.float()
    other = own[_draw_others(count, generator).to(own.device)]
    kinds = _draw_kinds(count, generator, has_directions)
    terms = {
        "extrapolate": other - own,
        "own": own,
        "noise": _draw_noise(own, generator),
    }
    if directions is not None and has_directions:
        terms |= _draw_directions(directions.to(own), count, generator)
    limits = torch.tensor([LARGEST_FACTORS[kind] for kind in KINDS])
    factors = limits[kinds] * (2 * _draw_uniform(count, generator) - 1)

    disturbed = other.clone()
    for index, kind in enumerate(KINDS):
        rows = (kinds == index).nonzero()[:, 0].to(own.device)
        if len(rows):
            factor = factors.to(own)[rows].reshape(-1, *[1] * (own.ndim - 1))
            disturbed[rows] += factor * terms[kind][rows]
    return disturbed.to(latents.dtype)


def _draw_uniform(count: int, generator: Generator) -> Tensor:
    """Draw numbers from 0 to 1 on the CPU, (count,)."""
    return torch.rand(count, generator=generator, device=generator.device).cpu()


def _draw_integers(limit: int, count: int, generator: Generator) -> Tensor:
    """Draw integers below a limit on the CPU, (count,)."""
    return torch.randint(limit, (count,), generator=generator, device=generator.device).cpu()


def _draw_noise(like: Tensor, generator: Generator) -> Tensor:
    """Draw standard normal values of the shape of a tensor, on its device."""
    return torch.randn(like.shape, generator=generator, device=generator.device).to(like)


def _draw_others(count: int, generator: Generator) -> Tensor:
    """Draw for each of `count` images another one, (count,): the next of a random order."""
    order = _draw_uniform(count, generator).argsort()
    others = torch.empty_like(order)
    others[order] = order.roll(-1)
    return others


def _draw_kinds(count: int, generator: Generator, has_directions: bool) -> Tensor:
    """Draw the kind of each disturbance as its index in `KINDS`, (count,)."""
    shares = torch.tensor([SHARES[kind] for kind in KINDS], dtype=torch.float64)
    if not has_directions:
        shares[[KINDS.index("direction"), KINDS.index("mix")]] = 0
    limits = (shares / shares.sum()).cumsum(0)[:-1]
    return torch.searchsorted(limits, _draw_uniform(count, generator).double(), right=True)


def _draw_directions(directions: Tensor, count: int, generator: Generator) -> dict[str, Tensor]:
    """Draw a direction for each image, and a mix of it and another one.

    Args:
        directions: (E, ...).
        count: B.
        generator: draws everything.

    Returns:
        "direction" and "mix", each (B, ...).
    """
    total = len(directions)
    first = _draw_integers(total, count, generator)
    second = (first + 1 + _draw_integers(max(total - 1, 1), count, generator)) % total
    weight = _draw_uniform(count, generator).to(directions)
    weight = weight.reshape(-1, *[1] * (directions.ndim - 1))
    one = directions[first.to(directions.device)]
    two = directions[second.to(directions.device)]
    return {"direction": one, "mix": weight * one + (1 - weight) * two}
