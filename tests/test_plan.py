"""`hptjax plan` without libtpu: what it reads from a compiled text, what it counts, and what it refuses."""

from __future__ import annotations

import pytest

from hptjax.config import Config, MeshConfig
from hptjax.plan.chips import CHIPS, Slices, parse_topology
from hptjax.plan.compiled import exchanged
from hptjax.plan.groups import first_group
from hptjax.plan.topology import mesh_for
from hptjax.plan.traffic import Collective, Moved, traffic

# Sixteen devices; a loop of 3 turns around a loop of 2, an all-gather of 64 floats in the inner one, a loop that data
# decide, and a conditional whose larger branch writes 256 floats. Written by hand after the printer's format.
TEXT = """\
HloModule hand_made, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_condition (p0: (s32[], f32[64])) -> pred[] {
  %p0 = (s32[], f32[64]{0}) parameter(0)
  %limit.0 = s32[] constant(2)
  %i.0 = s32[] get-tuple-element(%p0), index=0
  ROOT %less.0 = pred[] compare(%i.0, %limit.0), direction=LT
}

%inner_body (p1: (s32[], f32[64])) -> (s32[], f32[64]) {
  %p1 = (s32[], f32[64]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p1), index=0
  %v.1 = f32[64]{0} get-tuple-element(%p1), index=1
  %kernel = f32[16]{0} custom-call(%v.1), custom_call_target="tpu_custom_call", backend_config={"description":{
"blocks":"= 512"
}}, metadata={op_name="kernel"}
  %part = f32[16]{0} slice(%v.1), slice={[0:16]}
  %gathered = f32[64]{0} all-gather(%part), channel_id=1, replica_groups=[4,4]<=[16], metadata={op_name="a/b"}
  ROOT %out.1 = (s32[], f32[64]{0}) tuple(%i.1, %gathered)
}

%outer_condition (p2: (s32[], f32[64])) -> pred[] {
  %p2 = (s32[], f32[64]{0}) parameter(0)
  %limit.2 = s32[] constant(3)
  %i.2 = s32[] get-tuple-element(%p2), index=0
  ROOT %less.2 = pred[] compare(%i.2, %limit.2), direction=LT
}

%outer_body (p3: (s32[], f32[64])) -> (s32[], f32[64]) {
  %p3 = (s32[], f32[64]{0}) parameter(0)
  ROOT %while.3 = (s32[], f32[64]{0}) while(%p3), condition=%inner_condition, body=%inner_body
}

%while_busy (p4: (pred[], f32[64])) -> pred[] {
  %p4 = (pred[], f32[64]{0}) parameter(0)
  ROOT %busy = pred[] get-tuple-element(%p4), index=0
}

%small (p5: f32[64]) -> f32[256] {
  %p5 = f32[64]{0} parameter(0)
  ROOT %zeros = f32[256]{0} constant({...})
}

%large (p6: f32[64]) -> f32[256] {
  %p6 = f32[64]{0} parameter(0)
  %summed = f32[64]{0} all-reduce(%p6), channel_id=2, replica_groups={{0,8},{1,9}}, to_apply=%add
  ROOT %wide = f32[256]{0} pad(%summed), padding=0_192
}

ENTRY %main (a: f32[64], b: pred[]) -> f32[256] {
  %a = f32[64]{0} parameter(0)
  %b = pred[] parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[64]{0}) tuple(%zero, %a)
  %while.1 = (s32[], f32[64]{0}) while(%start), condition=%outer_condition, body=%outer_body
  %carried = (pred[], f32[64]{0}) tuple(%b, %a)
  %while.2 = (pred[], f32[64]{0}) while(%carried), condition=%while_busy, body=%busy_body
  ROOT %out = f32[256]{0} conditional(%b, %a, %a), true_computation=%large, false_computation=%small
}

%busy_body (p7: (pred[], f32[64])) -> (pred[], f32[64]) {
  %p7 = (pred[], f32[64]{0}) parameter(0)
  %v.7 = f32[64]{0} get-tuple-element(%p7), index=1
  %next = f32[64]{0:T(128)S(1)} negate(%v.7)
  %flag = pred[] get-tuple-element(%p7), index=0
  ROOT %out.7 = (pred[], f32[64]{0}) tuple(%flag, %next)
}
"""


def test_plan_multiplies_loops_in_loops():
    moved = traffic(TEXT, turns=(5,), has_update=True)
    (gather,) = moved.always.collectives
    assert (gather.kind, gather.times, gather.bytes, gather.group) == ("all-gather", 6, 256.0, (0, 1, 2, 3))
    assert gather.where == "a/b"
    assert gather.wire_bytes == 6 * 256 * 3 / 4
    # a turn of the inner loop: the kernel, described over three lines, reads 256 bytes and writes 64, the slice reads
    # and writes 64, the gather reads 64 and writes 256;
    # the loop that data decide reads 256 bytes in each of 5 turns and writes to other memory
    assert moved.always.memory_bytes == 6 * (256 + 64 + 2 * 64 + 64 + 256) + 5 * 256
    assert moved.always.unknown_loops == 1


def test_plan_counts_the_larger_branch_as_the_update():
    moved = traffic(TEXT, turns=(5,), has_update=True)
    (reduce,) = moved.update.collectives
    assert (reduce.kind, reduce.group, reduce.wire_bytes) == ("all-reduce", (0, 8), 256.0)
    assert moved.update.memory_bytes == 2 * 256 + 256 + 1024
    whole = traffic(TEXT, turns=(5,))
    assert whole.update.memory_bytes == 0
    assert whole.always.memory_bytes == moved.always.memory_bytes + moved.update.memory_bytes


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,4},{1,5}}, x=1", (0, 4)),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, use_global_device_ids=true", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("source_target_pairs={{0,1},{1,0}}", (0, 1)),
        ("dimensions={0}", ()),
    ],
)
def test_plan_reads_groups(text, group):
    assert first_group(text) == group


def test_plan_topologies():
    assert parse_topology("v5e:4x4") == Slices(CHIPS["v5e"], "4x4")
    two = parse_topology("2xv5p:2x2x2")
    assert (two.count, two.chips, two.name) == (2, 16, "2xv5p:2x2x2")
    sizes = {slices for chip in CHIPS.values() for slices in (Slices(chip, name).chips for name in chip.topologies)}
    assert {4, 256} <= sizes


@pytest.mark.parametrize("text", ["v5e:3x3", "v5e", "v9:4x4", "4x4", "0xv5e:4x4", "v5p:4x4"])
def test_plan_refuses_a_topology_that_does_not_exist(text):
    with pytest.raises(ValueError, match=r"v5p:2x2x1(.|\n)*|v5e:2x4") as error:
        parse_topology(text)
    assert text in str(error.value)
    assert "--topology" in str(error.value)


def test_plan_fills_the_mesh_up():
    two = parse_topology("2xv5e:4x4")
    assert mesh_for(Config(), two).mesh == MeshConfig(replica=2, fsdp=16)
    tensor = mesh_for(Config(mesh=MeshConfig(tensor=4)), two).mesh
    assert (tensor.replica, tensor.fsdp, tensor.tensor) == (2, 4, 4)
    own = Config(mesh=MeshConfig(replica=2, data=2, fsdp=8))
    assert mesh_for(own, two) == own


def test_plan_refuses_a_mesh_that_is_not_the_chips():
    with pytest.raises(ValueError, match=r"expected a mesh of 16 devices for v5e:4x4.* = 8; .*--mesh.fsdp 8"):
        mesh_for(Config(mesh=MeshConfig(fsdp=4, tensor=2)), parse_topology("v5e:4x4"))
    with pytest.raises(ValueError, match=r"mesh.replica 2 and mesh.fsdp 16 alone would fit"):
        mesh_for(Config(mesh=MeshConfig(fsdp=16)), parse_topology("2xv5e:4x4"))
    with pytest.raises(ValueError, match=r"mesh.replica to be a multiple of the 2 slices"):
        mesh_for(Config(mesh=MeshConfig(fsdp=32)), parse_topology("2xv5e:4x4"))


BETWEEN_SLICES = """\
HloModule two_slices

ENTRY %main (a: f32[1024]) -> f32[1024] {
  %a = f32[1024]{0} parameter(0)
  %token = token[] after-all()
  %send.1 = (f32[1024]{0:T(1024)}, u32[], token[]) send(%a, %token), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %prefetch = (f32[1024]{0:S(1)}, f32[1024]{0}, u32[]) copy-start(%a)
  %part = ((f32[1024]{0}), f32[256]{0:S(1)}, s32[]) slice-start(%a), slice={[0:256]}
  ROOT %out = f32[1024]{0} negate(%a)
}
"""


def test_plan_counts_what_the_hosts_carry_between_slices():
    moved = traffic(BETWEEN_SLICES).always
    (reduce,) = moved.collectives
    assert (reduce.kind, reduce.bytes, reduce.between_slices) == ("all-reduce", 4096.0, True)
    (summed,) = exchanged(moved, [0] * 4 + [1] * 4, update=False)
    assert (summed.devices, summed.slices, summed.ici_bytes) == (2, 2, 0.0)
    assert summed.dcn_bytes == 2 * 4096 / 2  # a ring of two: half of the array out, half of the sums back
    assert moved.memory_bytes == 4096 + 1024 + 2 * 4096  # the copy, the slice, the negation


def test_plan_splits_a_group_over_slices():
    """Four devices of each of two slices reduce inside first: each sends a quarter of the array to the other slice."""
    group = tuple(range(8))
    moved = Moved(collectives=(Collective("all-reduce", 800.0, group, 3, "here"),))
    (summed,) = exchanged(moved, [0] * 4 + [1] * 4, update=False)
    assert (summed.devices, summed.slices, summed.times) == (8, 2, 3)
    assert summed.dcn_bytes == 3 * 800 / 4 * 2 / 2
    assert summed.ici_bytes + summed.dcn_bytes == pytest.approx(3 * 800 * 2 * 7 / 8)
