"""What a program's text says of collectives, and how long they take."""

from __future__ import annotations

from collections import Counter

import pytest

from vsurge.planning import parse_slice
from vsurge.planning.collectives import Collective, Interconnect, read_collectives, scaled

TEXT = """HloModule step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%called (p: f32[8,128]) -> f32[8,128] {
  ROOT %r = f32[8,128]{1,0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
}

%body (p: (s32[], f32[64])) -> (s32[], f32[64]) {
  %in_loop = f32[64]{0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
}

%branch (p: f32[64]) -> f32[64] {
  %in_branch = bf16[4,64,20]{1,2,0:T(8,128)} all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main.1 (a: f32[8]) -> f32[8] {
  %a = bf16[64,4096]{1,0:T(8,128)(2,1)} all-reduce(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}
  %two = (f32[64]{0:T(128)S(1)}, f32[64]{0}) all-reduce(%x, %y), replica_groups={{0,1},{2,3}}, to_apply=%add
  %three = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%x), replica_groups=[1,4]<=[4], dimensions={0}
  %done = bf16[32,16]{1,0} all-gather-done(%three)
  %four = f32[2,16]{1,0} reduce-scatter(%x), replica_groups=[1,4]<=[4], to_apply=%add
  %five = f8e4m3fn[16]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  %six = f32[384] all-reduce(%x), replica_groups=mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'a'}
  %call = f32[8,128]{1,0} call(%z), to_apply=%called
  %loop = (s32[], f32[64]) while(%t), condition=%condition, body=%body
  ROOT %choice = f32[64] conditional(%i, %u, %v), branch_computations={%branch, %other}
}
"""


def test_a_programs_collectives_are_read_with_bytes_and_groups() -> None:
    sent = read_collectives(TEXT)
    assert sent.always == {
        Collective("all-reduce", 64 * 4096 * 2, 4): 1,
        Collective("all-reduce", 2 * 64 * 4, 2): 1,
        Collective("all-gather", 32 * 16 * 2, 4): 1,
        Collective("reduce-scatter", 4 * 2 * 16 * 4, 4): 1,
        Collective("collective-permute", 16, 2): 1,
        Collective("all-reduce", 2 * 192 * 4, 8): 1,
        Collective("all-reduce", 8 * 128 * 4, 4): 1,
    }
    assert sent.sometimes == {
        Collective("all-reduce", 64 * 4, 4): 1,
        Collective("all-gather", 4 * 64 * 20 * 2, 4): 1,
    }


def test_groups_in_an_unknown_form_are_not_guessed() -> None:
    line = "  %a = f32[8]{0} all-reduce(%x), replica_groups=all, to_apply=%add"
    with pytest.raises(ValueError, match="groups of devices in an unknown way: %a = f32"):
        read_collectives(f"ENTRY %main (a: f32[8]) -> f32[8] {{\n{line}\n}}\n")


def between(name: str, devices: int, hop_us: float = 0.0) -> Interconnect:
    slice_ = parse_slice(name)
    return Interconnect.of(slice_, devices, link_gbytes_per_s=slice_.kind.link_gbytes_per_s, hop_us=hop_us)


@pytest.mark.parametrize(
    ("name", "devices", "us"),
    [
        ("v6e:2x2", 4, 2 * 3 / 4 * 1000 / 2),  # MB at 100 GB/s in each of two dimensions
        ("v6e:2x4", 8, 2 * 7 / 8 * 1000 / 2),
        ("v6e:2x4", 2, 2 * 1 / 2 * 1000),  # one link
        ("v5e:2x2", 4, 2 * 3 / 4 * 2000 / 2),
        ("v6e:16x16", 256, 2 * 255 / 256 * 1000 / 4),  # both ends of each dimension are connected
        ("7x:2x2x1", 2, 2 * 1 / 2 * 1000 / 6),  # within a chip
        ("7x:2x2x1", 8, 2 * 1 / 2 * 1000 / 6 + 2 * 3 / 4 * 1000 / 2),
    ],
)  # fmt: skip
def test_an_all_reduce_goes_round_rings(name: str, devices: int, us: float) -> None:
    """100 MB, at the bandwidth of links alone."""
    time = between(name, devices).time_us(Collective("all-reduce", 100_000_000, devices))
    assert time == pytest.approx(us)


def test_other_operations_go_round_once() -> None:
    links = between("v6e:2x2", 4)
    whole = links.time_us(Collective("all-reduce", 1 << 20, 4))
    for kind in ("all-gather", "reduce-scatter"):
        assert links.time_us(Collective(kind, 1 << 20, 4)) == pytest.approx(whole / 2)
    permuted = links.time_us(Collective("collective-permute", 1_000_000, 2))
    assert permuted == pytest.approx(10)


def test_every_hop_takes_its_time() -> None:
    tiny = Collective("all-reduce", 4, 8)
    assert between("v6e:2x4", 8, hop_us=1.0).time_us(tiny) == pytest.approx(2 * (1 + 3), rel=1e-3)
    assert between("v6e:2x4", 8, hop_us=3.0).time_us(tiny) == pytest.approx(3 * 2 * (1 + 3), rel=1e-3)


def test_one_device_sends_nothing() -> None:
    assert between("v6e:1x1", 1, hop_us=1.0).time_us(Collective("all-reduce", 4096, 1)) == 0


def test_a_smaller_batch_sends_less_as_often() -> None:
    sent = Counter({Collective("all-reduce", 4096, 4): 3})
    assert scaled(sent, 0.25) == {Collective("all-reduce", 1024, 4): 3}
