"""Names of slices, and what is published of them."""

from __future__ import annotations

import pytest

from vsurge.planning import SLICE_KINDS, Slice, parse_slice
from vsurge.planning.slices import slices_of


@pytest.mark.parametrize(
    ("text", "chip", "chips", "devices", "name"),
    [
        ("v6e:2x4", "v6e", 8, 8, "v6e:2x4"),
        ("v5e:4x4", "v5e", 16, 16, "v5e:4x4"),
        ("tpu7x:2x2x1", "7x", 4, 8, "tpu7x:2x2x1"),
        ("7x:2x2x1", "7x", 4, 8, "tpu7x:2x2x1"),
        ("v4:2x2x2", "v4", 8, 16, "v4:2x2x2"),
        ("v5p:2x2x1", "v5p", 4, 4, "v5p:2x2x1"),
    ],
)
def test_a_name_says_chip_and_shape(text: str, chip: str, chips: int, devices: int, name: str) -> None:
    slice_ = parse_slice(text)
    assert (slice_.chip, slice_.num_chips, slice_.num_devices, slice_.name) == (chip, chips, devices, name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v6e", r"slice 'v6e': must be a chip and a shape, like v6e:2x4"),
        ("v6e-8", "must be a chip and a shape"),
        ("v9:2x4", "slice 'v9:2x4': the chip must be one of v4, v5e, v5p, v6e, 7x"),
        ("v6e:3x2", "slice 'v6e:3x2': must be one of v6e:1x1, v6e:2x2"),
        ("v5p:2x2", "must be one of v5p:2x2x1"),
    ],
)
def test_what_is_no_slice_is_refused_with_what_there_is(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_slice(text)


@pytest.mark.parametrize("chip", SLICE_KINDS)
def test_slices_are_listed_from_the_smallest_on(chip: str) -> None:
    numbers = [slice_.num_chips for slice_ in slices_of(chip)]
    assert numbers == sorted(set(numbers))


def test_a_link_has_half_of_a_port() -> None:
    """Published are both directions of all ports: v6e 800 GB/s of 4, v5e 400 of 4, 7x 1,200 of 6."""
    links = {chip: kind.link_gbytes_per_s for chip, kind in SLICE_KINDS.items()}
    assert links == {"v4": 50, "v5e": 50, "v5p": 100, "v6e": 100, "7x": 100}


@pytest.mark.parametrize(
    ("slice_", "devices", "shape"),
    [
        (Slice("v6e", (2, 4)), 8, (2, 4)),
        (Slice("v6e", (2, 4)), 4, (2, 2)),
        (Slice("v6e", (2, 4)), 1, (1, 1)),
        (Slice("7x", (2, 2, 1)), 8, (2, 2, 1)),
        (Slice("7x", (2, 2, 1)), 2, (1, 1, 1)),
        (Slice("v5e", (4, 4)), 8, (4, 2)),
    ],
)
def test_the_first_devices_fill_a_box(slice_: Slice, devices: int, shape: tuple[int, ...]) -> None:
    assert slice_.part(devices) == shape
