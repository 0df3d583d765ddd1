"""How long a step takes, part by part. Plain numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .assumptions import PlanAssumptions
from .collectives import Collective, Interconnect
from .deployment import Product

Bound = Literal["weights", "products", "attention", "interconnect", "sampling", "between steps"]


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """A step, in microseconds of a device.

    Attributes:
        weights: reading them, where that takes longer than the product's operations.
        products: the operations, where those take longer.
        attention: the kernels, of all layers.
        interconnect: collectives.
        sampling: passes over logits.
        between: until the next step.
        ideal: what the step cannot do without, at the peak rates: the longer of its operations, and of the
            weights and the keys and values that it reads.
    """

    weights: float
    products: float
    attention: float
    interconnect: float
    sampling: float
    between: float
    ideal: float

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[Bound, float]:
        return {
            "weights": self.weights,
            "products": self.products,
            "attention": self.attention,
            "interconnect": self.interconnect,
            "sampling": self.sampling,
            "between steps": self.between,
        }

    @property
    def bound(self) -> Bound:
        """The part that takes longest."""
        return max(self.parts, key=lambda part: self.parts[part])

    @property
    def roofline(self) -> float:
        """The share of the time that the ideal is."""
        return self.ideal / self.total


@dataclass(frozen=True, kw_only=True)
class Attention:
    """What the attention kernels do in a step, on a device, in all layers.

    Attributes:
        time_us: predicted.
        useful_bytes: keys and values that are seen.
        useful_flops: operations for pairs of query and token that are not masked.
    """

    time_us: float
    useful_bytes: float
    useful_flops: float


def time_of_step(
    *,
    products: Iterable[Product],
    num_rows: int,
    num_logit_rows: int,
    local_vocab: int,
    attention: Attention,
    collectives: Counter[Collective],
    interconnect: Interconnect,
    assumptions: PlanAssumptions,
    cores: int,
) -> StepTime:
    """The time of a step.

    Args:
        products: of a device.
        num_rows: tokens.
        num_logit_rows: of them, those whose logits are computed.
        local_vocab: tokens of the vocabulary that a device has logits of.
        attention: of the step.
        collectives: of the step.
        interconnect: between the devices.
        assumptions: rates of a core, and the rest.
        cores: of a device.
    """
    bytes_per_us, flops_per_us = assumptions.gbytes_per_s * 1e3 * cores, assumptions.tflops * 1e6 * cores
    reading = computing = all_bytes = all_flops = 0.0
    for product in products:
        rows = num_logit_rows if product.is_head else num_rows
        num_bytes, flops = product.read_bytes(rows), product.flops(rows)
        read_us, compute_us = num_bytes / bytes_per_us, flops / flops_per_us
        reading += read_us if read_us >= compute_us else 0.0
        computing += compute_us if compute_us > read_us else 0.0
        all_bytes, all_flops = all_bytes + num_bytes, all_flops + flops
    logit_bytes = assumptions.logit_passes * num_logit_rows * local_vocab * 4
    return StepTime(
        weights=reading,
        products=computing,
        attention=attention.time_us,
        interconnect=sum(count * interconnect.time_us(one) for one, count in collectives.items()),
        sampling=logit_bytes / bytes_per_us,
        between=assumptions.step_us,
        ideal=max(
            (all_bytes + attention.useful_bytes) / bytes_per_us,
            (all_flops + attention.useful_flops) / flops_per_us,
        ),
    )
