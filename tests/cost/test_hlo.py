"""A program's text is read as the program runs, and nothing is guessed."""

import json

import pytest

from vdit_jax.cost import hlo, hlo_cost

CONFIG = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'


def priced(cycles):
  return CONFIG % cycles


# A loop of 5 turns in a loop of 3: a matmul in a fusion, a copy, and a kernel
# whose text holds newlines and lines that begin with "}".
NESTED = f"""HloModule jit_step, is_scheduled=true, entry_computation_layout={{(f32[])->f32[]}}

FileNames
1 "step.py"

%fused_matmul (a: bf16[64,32], b: bf16[32,16]) -> bf16[64,16] {{
  %a = bf16[64,32]{{1,0:T(8,128)(2,1)}} parameter(0)
  %b = bf16[32,16]{{1,0}} parameter(1)
  %scaled = bf16[64,32]{{1,0}} multiply(%a, %a), {priced(999)}
  ROOT %dot = bf16[64,16]{{1,0}} convolution(%scaled, %b), dim_labels=bf_io->bf
}}

%inner_body (p: (s32[], bf16[64,16])) -> (s32[], bf16[64,16]) {{
  %p = (s32[]{{:T(128)}}, bf16[64,16]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %y = bf16[64,16]{{1,0}} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = bf16[64,32]{{1,0}} custom-call(), custom_call_target="AllocateBuffer"
  %w = bf16[32,16]{{1,0}} broadcast(%i), dimensions={{}}
  %matmul = bf16[64,16]{{1,0}} fusion(%x, %w), kind=kOutput, calls=%fused_matmul, metadata={{op_name="mlp/dot"}}, {priced(100)}
  %kernel = bf16[64,16]{{1,0}} custom-call(%matmul), custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{
 "xprof_metadata":"{{\\"block_q_dq\\": 256, \\"block_kv_dq\\": 512}}"
}}}}, metadata={{op_name="jit(f)/attention_dq/pallas_call"}}
  %part = bf16[64,16]{{1,0}} get-tuple-element(%kernel), index=0, frontend_attributes={{kernel_metadata={{
 "xprof_metadata":"{{}}"
}}}}
  ROOT %out = (s32[], bf16[64,16]{{1,0}}) tuple(%next, %kernel)
}}

%inner_condition (p.1: (s32[], bf16[64,16])) -> pred[] {{
  %p.1 = (s32[], bf16[64,16]{{1,0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %five), direction=LT
}}

%outer_body (q: (s32[], bf16[64,16])) -> (s32[], bf16[64,16]) {{
  %q = (s32[], bf16[64,16]{{1,0}}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %z = bf16[64,16]{{1,0}} get-tuple-element(%q), index=1
  %one.1 = s32[] constant(1)
  %zero = s32[] constant(0)
  %j2 = s32[] add(%j, %one.1)
  %turned = bf16[64,16]{{0,1}} copy(%z), {priced(7)}
  %state = (s32[], bf16[64,16]{{1,0}}) tuple(%zero, %turned)
  %loop.1 = (s32[], bf16[64,16]{{1,0}}) while(%state), condition=%inner_condition, body=%inner_body
  %z2 = bf16[64,16]{{1,0}} get-tuple-element(%loop.1), index=1
  ROOT %o = (s32[], bf16[64,16]{{1,0}}) tuple(%j2, %z2)
}}

%outer_condition (q.1: (s32[], bf16[64,16])) -> pred[] {{
  %q.1 = (s32[], bf16[64,16]{{1,0}}) parameter(0)
  %j.1 = s32[] get-tuple-element(%q.1), index=0
  %three = s32[] constant(3)
  ROOT %less.1 = pred[] compare(%j.1, %three), direction=LT
}}

ENTRY %main (x0: bf16[64,16]) -> bf16[64,16] {{
  %x0 = bf16[64,16]{{1,0}} parameter(0)
  %begin = s32[] constant(0)
  %first = (s32[], bf16[64,16]{{1,0}}) tuple(%begin, %x0)
  %loop = (s32[], bf16[64,16]{{1,0}}) while(%first), condition=%outer_condition, body=%outer_body
  ROOT %end = bf16[64,16]{{1,0}} get-tuple-element(%loop), index=1
}}
"""  # noqa: E501


def entry(*lines, before=""):
  """A program of a few lines, the last of which is its result."""
  body = [f"  {line}" for line in lines]
  body[-1] = body[-1].replace("  %", "  ROOT %", 1)
  return "\n".join(
    ["HloModule m", "", before, "ENTRY %main () -> f32[] {", *body, "}", ""]
  )


def test_loops_multiply_what_is_in_them():
  found = hlo_cost.measure(NESTED)
  assert found.cycles["matmuls"] == 3 * 5 * 100
  assert found.cycles["copies"] == 3 * 7
  assert found.flops == 3 * 5 * 2 * 64 * 32 * 16
  assert found.warnings == []


def test_cycles_inside_a_fusion_are_the_fusions():
  assert sum(hlo_cost.measure(NESTED).cycles.values()) == 3 * (5 * 100 + 7)


def test_a_kernel_is_known_by_its_name_and_blocks():
  (call,) = hlo_cost.measure(NESTED).calls
  assert call.name == "attention_dq"
  assert call.times == 15
  assert call.blocks == (256, 512)
  assert call.shapes == call.results == (("bf16", (64, 16)),)
  assert call.heads is None
  assert call.nbytes == 2 * 2 * 64 * 16


def test_a_kernel_may_note_its_heads():
  noted = '\\"block_kv_dq\\": 512'
  text = NESTED.replace(noted, noted + ', \\"heads\\": 24')
  assert text != NESTED
  assert hlo_cost.measure(text).calls[0].heads == 24


def test_newlines_and_braces_in_a_kernel_end_nothing():
  program = hlo.parse(NESTED)
  body = program.computations["inner_body"]
  assert body.root == "out"
  assert list(body.instructions)[-3:] == ["kernel", "part", "out"]
  assert body.instructions["kernel"].op_name.endswith("pallas_call")


@pytest.mark.parametrize(
  "start, step, bound, direction, turns",
  [
    (0, 1, 5, "LT", 5),
    (0, 1, 5, "LE", 6),
    (2, 1, 5, "LT", 3),
    (0, 2, 5, "LT", 3),
    (1, 3, 10, "NE", 3),
    (5, 1, 5, "LT", 0),
  ],
)
def test_a_loop_turns_as_its_counter_says(start, step, bound, direction, turns):
  text = NESTED.replace(
    "%five = s32[] constant(5)", f"%five = s32[] constant({bound})"
  )
  text = text.replace(
    "%zero = s32[] constant(0)", f"%zero = s32[] constant({start})"
  )
  text = text.replace(
    "%one = s32[] constant(1)", f"%one = s32[] constant({step})"
  )
  text = text.replace(
    "compare(%i.1, %five), direction=LT",
    f"compare(%i.1, %five), direction={direction}",
  )
  assert hlo_cost.measure(text).cycles["matmuls"] == 3 * turns * 100


def test_a_bound_may_come_through_the_loops_state():
  text = NESTED.replace(
    "(s32[], bf16[64,16]{1,0})", "(s32[], bf16[64,16]{1,0}, s32[])"
  )
  text = text.replace("tuple(%zero, %turned)", "tuple(%zero, %turned, %four)")
  text = text.replace("%j2 = s32[]", "%four = s32[] constant(4)\n  %j2 = s32[]")
  text = text.replace(
    "%five = s32[] constant(5)",
    "%five = s32[] get-tuple-element(%p.1), index=2",
  )
  assert hlo_cost.measure(text).cycles["matmuls"] == 3 * 4 * 100


def test_a_known_trip_count_is_taken():
  text = NESTED.replace(
    "body=%outer_body",
    'body=%outer_body, backend_config={"known_trip_count":{"n":"11"}}',
  )
  assert hlo_cost.measure(text).cycles["copies"] == 11 * 7


def test_a_test_in_a_fusion_is_read():
  fused = """%fused_test (a.9: s32[]) -> pred[] {
  %a.9 = s32[] parameter(0)
  %five = s32[] constant(5)
  ROOT %less.9 = pred[] compare(%a.9, %five), direction=LT
}

%inner_condition"""
  text = NESTED.replace("\n%inner_condition", "\n" + fused, 1)
  text = text.replace(
    "ROOT %less = pred[] compare(%i.1, %five), direction=LT",
    "ROOT %less = pred[] fusion(%i.1), kind=kLoop, calls=%fused_test",
  )
  found = hlo_cost.measure(text)
  assert found.cycles["matmuls"] == 3 * 5 * 100
  assert found.warnings == []


def test_a_loop_of_unknown_length_is_counted_once_and_said():
  text = NESTED.replace(
    "%five = s32[] constant(5)", "%five = s32[] add(%i.1, %i.1)"
  )
  found = hlo_cost.measure(text)
  assert found.cycles["matmuls"] == 3 * 100
  assert len(found.warnings) == 1
  assert "loop.1" in found.warnings[0]


def test_the_steps_of_a_collective_are_one():
  gather = (
    "all-gather(%x), channel_id=7, dimensions={0}, use_global_device_ids=true"
  )
  found = hlo_cost.measure(
    entry(
      "%x = bf16[64,16]{1,0} parameter(0)",
      f"%g.1 = bf16[256,16]{{1,0}} {gather}",
      f"%g.2 = bf16[256,16]{{1,0}} {gather}",
      "%r = (f32[64]{0}, f32[32]{0}) all-reduce(%y, %z), channel_id=8",
      "%y = f32[64]{0} parameter(1)",
      "%z = f32[32]{0} parameter(2)",
      "%out = f32[] constant(0)",
    )
  )
  assert found.collectives == {
    "all-gather": (1, 2 * 256 * 16),
    "all-reduce": (1, 4 * (64 + 32)),
  }


def test_an_all_reduce_that_is_cut_is_a_reduce_scatter():
  fused = """%all-reduce-scatter.4 (i: f32[128,8]) -> f32[32,8] {
  %i = f32[128,8]{1,0} parameter(0)
  %all = f32[128,8]{1,0} all-reduce(%i), channel_id=3, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %cut = f32[32,8]{1,0} dynamic-slice(%all, %zero, %zero)
}
"""
  text = entry(
    "%x = f32[128,8]{1,0} parameter(0)",
    "%f = f32[32,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.4",
    before=fused,
  )
  found = hlo_cost.measure(text)
  assert found.collectives == {"reduce-scatter": (1, 4 * 128 * 8)}
  assert found.warnings == []


@pytest.mark.parametrize(
  "x, kernel, y, window, order, sums",
  [
    # A plain convolution: a tap on padding counts nothing.
    ("1,8,3", "3,3,5", "1,8,5", "size=3 pad=1_1", "b0f", 22 * 15),
    ("1,8,3", "3,3,5", "1,4,5", "size=3 stride=2 pad=0_1", "b0f", 11 * 15),
    # A matmul over a batch of 4, written as a convolution over it.
    (
      "4,6,7",
      "4,7,9",
      "4,6,9",
      "size=4 stride=3 pad=0_0 lhs_dilate=4",
      "0bf",
      4 * 6 * 7 * 9,
    ),
    # The gradient of a stride: dilated inputs.
    ("1,4,3", "3,3,5", "1,8,5", "size=3 pad=1_2 lhs_dilate=2", "b0f", 11 * 15),
  ],
)
def test_a_convolution_counts_what_is_not_padding(
  x, kernel, y, window, order, sums
):
  layout = "{2,1,0}"
  text = entry(
    f"%x = f32[{x}]{layout} parameter(0)",
    f"%k = f32[{kernel}]{layout} parameter(1)",
    f"%y = f32[{y}]{layout} convolution(%x, %k), window={{{window}}}, "
    f"dim_labels={order}_0io->{order}",
  )
  assert hlo_cost.measure(text).flops == 2 * sums


def test_what_is_not_known_is_said():
  found = hlo_cost.measure(
    entry(
      "%x = f32[4]{0} parameter(0)",
      "%y = f32[4]{0} frobnicate(%x)",
      '%z = f32[4]{0} custom-call(%y), custom_call_target="Mystery"',
      "%f = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused",
      before="%fused (a: f32[4]) -> f32[4] {\n"
      "  %a = f32[4]{0} parameter(0)\n"
      "  ROOT %b = f32[4]{0} negate(%a)\n}\n",
    )
  )
  text = json.dumps(found.warnings)
  assert len(found.warnings) == 3
  for word in ("frobnicate", "Mystery", "without estimated cycles"):
    assert word in text


def test_a_conditional_costs_its_dearest_branch():
  branches = "".join(
    f"%branch.{n} (a.{n}: f32[4]) -> f32[4] {{\n"
    f"  %a.{n} = f32[4]{{0}} parameter(0)\n"
    f"  ROOT %b.{n} = f32[4]{{0}} copy(%a.{n}), {priced(n)}\n}}\n\n"
    for n in (10, 30, 20)
  )
  text = entry(
    "%i = s32[] parameter(0)",
    "%x = f32[4]{0} parameter(1)",
    "%y = f32[4]{0} conditional(%i, %x, %x, %x), "
    "branch_computations={%branch.10, %branch.30, %branch.20}",
    before=branches,
  )
  found = hlo_cost.measure(text)
  assert found.cycles["copies"] == 30
  assert "conditional" in found.warnings[0]


def test_sizes():
  shapes = (("bf16", (3, 5)), ("pred", (8,)), ("f32", ()), ("s4", (6,)))
  assert hlo.size(shapes) == 30 + 8 + 4 + 3
  assert hlo.size((("f8e4m3fn", (7,)),)) == 7


def test_a_text_without_entry_is_refused():
  with pytest.raises(ValueError, match="ENTRY"):
    hlo.parse("HloModule nothing")
