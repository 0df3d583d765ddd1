"""Translates the scalar half of a TPU's instructions to Python, which is how a replay executes them.

Only what decides where a program goes is translated: the scalar unit, copies, and their semaphores. A value
has a name and lies in a register: %s12_s3 is value 12 in register s3. Operands are read by name, so that a
bundle may overwrite a register and read its old value; where ways into a loop meet, by register.
"""

from __future__ import annotations

import re
from typing import Any

from .schedule import Instruction

# An address is a mark, the number of an operand or of an allocation, and the place in it. The mark is the
# highest bit, so that an address that was shifted to a smaller unit shows by how much.
PLACE_BITS, NUMBER_BITS = 48, 16
FIRST_ALLOCATION = 1000  # the numbers below are operands'
ADDRESS = re.compile(r"\[(?:smem:)?\[?([^\[\]]*)\]?\]")


class ReplayError(RuntimeError):
    """A program that cannot be replayed: an unknown instruction, or one that a TPU would stop or hang at."""


class _Unknown:
    """A number that nobody has written. It may be computed with, but decides nothing."""

    def _same(self, *_: Any) -> _Unknown:
        return self

    def _decides(self) -> Any:
        raise ReplayError("a number that was never written decides where the program goes or what it copies")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __abs__ = _same
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __mod__ = __rmod__ = _same
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __floordiv__ = __rfloordiv__ = _same
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _same  # pyright: ignore
    __bool__ = __hash__ = __index__ = __float__ = _decides  # pyright: ignore


UNKNOWN = _Unknown()


def wrapped(value: Any) -> Any:
    """As a signed number of 32 bits; addresses, which are larger, stay as they are."""
    return value if value is UNKNOWN or abs(value) >> 47 else (value + 2**31) % 2**32 - 2**31


def address(number: int) -> int:
    """The address of the beginning of an operand or allocation."""
    return (1 << NUMBER_BITS | number) << PLACE_BITS


def number_and_place(address: int) -> tuple[int, int]:
    """What an address refers to."""
    return address >> PLACE_BITS & (1 << NUMBER_BITS) - 1, address & (1 << PLACE_BITS) - 1


def unshifted(value: Any) -> Any:
    """An address that was shifted to a smaller unit, with the place in that unit."""
    if value is UNKNOWN or value.bit_length() <= PLACE_BITS + NUMBER_BITS:  # no address
        return value
    bits = value.bit_length() - (NUMBER_BITS + 1)
    number = value >> bits & (1 << NUMBER_BITS) - 1
    return address(number) | value & (1 << bits) - 1


def unsigned(value: Any) -> Any:
    return value & 0xFFFFFFFF


def least(a: Any, b: Any) -> Any:
    return UNKNOWN if a is UNKNOWN or b is UNKNOWN else min(a, b)


def most(a: Any, b: Any) -> Any:
    return UNKNOWN if a is UNKNOWN or b is UNKNOWN else max(a, b)


def both(a: Any, b: Any) -> Any:
    """And, which one false decides whatever the other is."""
    if a is False or b is False:
        return False
    return UNKNOWN if a is UNKNOWN or b is UNKNOWN else True


def opposite(a: Any) -> Any:
    return UNKNOWN if a is UNKNOWN else not a


def select(condition: Any, a: Any, b: Any) -> Any:
    if condition is UNKNOWN:
        return UNKNOWN
    return a if condition else b


# What translated lines call.
HELPERS: dict[str, Any] = {
    f.__name__: f for f in (wrapped, unsigned, unshifted, least, most, both, opposite, select)
}
HELPERS["UNKNOWN"] = UNKNOWN


# Opcode -> the result's value.
VALUES = {
    "sadd.s32": "{0} + {1}",
    "ssub.s32": "{0} - {1}",
    "smul.u32": "wrapped({0} * {1})",
    "sand.u32": "{0} & {1}",
    "sor.u32": "{0} | {1}",
    "sxor.u32": "{0} ^ {1}",
    "sshll.u32": "wrapped({0} << {1})",
    "sshrl.u32": "unsigned({0}) >> {1}",
    "sshra.s32": "{0} >> {1}",
    "smin.u32": "least(unsigned({0}), unsigned({1}))",
    "smax.u32": "most(unsigned({0}), unsigned({1}))",
    "smin.s32": "least({0}, {1})",
    "smax.s32": "most({0}, {1})",
    "pand": "both({0}, {1})",
    "pnand": "opposite(both({0}, {1}))",
    "por": "opposite(both(opposite({0}), opposite({1})))",
    "pneg": "opposite({0})",
    "pxor": "{0} != {1}",
    "smov": "{0}",
    "pmov": "{0}",
    "scalar_select": "select({0}, {1}, {2})",
    "sld": "core.load({0})",
    "vsyncmov": "core.arrived[{0}]",
    **dict.fromkeys(("spop", "spop.drf", "vpop.sfrf"), "{0}"),
    **{f"int_to_ptr.{space}": "unshifted({0})" for space in ("hbm", "vmem", "smem", "cmem")},
    **{f"scalar_lea.{space}": "{0} + {1}" for space in ("hbm", "vmem", "smem", "sflag", "cmem")},
}
for _name, _sign in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items():
    VALUES[f"scmp.{_name}.s32.totalorder"] = f"{{0}} {_sign} {{1}}"
    VALUES[f"scmp.{_name}.u32.totalorder"] = f"unsigned({{0}}) {_sign} unsigned({{1}})"
# Opcode -> a statement; `now` is the cycle of the piece's first bundle, {cycle} the bundle's place in it.
STATEMENTS = {
    "sst": "mem[{0}] = {1}",
    "vsyncadd": "core.arrived[{0}] += {1}",
    "vsyncpa": "core.arrived[{0}] = {1}",
    "dma.done.wait": "now = core.wait(now + {cycle}, {0}, {1}) - {cycle}",
    "shalt.err": "core.halt()",
    **dict.fromkeys(("sfence", "sdelay", "snop"), "pass"),
}
COPY = "core.copy(now + {cycle}, {kind!r}, source={0}, granules={1}, target={2}, flag={3})"


class Translator:
    """Translates instructions; the same address of scalar memory always to the same number."""

    def __init__(self) -> None:
        self._allocations: dict[str, int] = {}

    def allocation(self, name: str) -> int:
        """The address of an allocation like "#allocation5"."""
        number = self._allocations.setdefault(name, FIRST_ALLOCATION + len(self._allocations))
        return address(number)

    def lines(self, instruction: Instruction, cycle: int) -> list[str]:
        """Python lines for an instruction of the bundle `cycle` bundles into its piece of program.

        Raises:
            ReplayError: the instruction is unknown.
        """
        effect = self._effect(instruction, cycle)
        condition = self.condition(instruction)
        if condition is None:
            return [effect]
        lines = [f"if {condition}:", f" {effect}"]
        if effect.startswith("v["):  # schedules also compute ahead what is then not used
            lines = [
                f"if {condition} is UNKNOWN:",
                f" {_assign(instruction, 'UNKNOWN')}",
                f"el{lines[0]}",
                lines[1],
            ]
        if instruction.otherwise is not None:
            lines += ["else:", f" {_assign(instruction, self._value(instruction.otherwise))}"]
        return lines

    def condition(self, instruction: Instruction) -> str | None:
        """A Python expression for an instruction's predicate; None if it has none."""
        if instruction.predicate is None:
            return None
        value = f"v[{instruction.predicate.lstrip('!')!r}]"
        return f"opposite({value})" if instruction.predicate[0] == "!" else value

    def _effect(self, instruction: Instruction, cycle: int) -> str:
        """A Python statement for an instruction, its predicate aside."""
        opcode = instruction.opcode
        operands = [self._value(operand) for operand in instruction.operands]
        if opcode == "sphi":  # all of its operands lie in the result's register
            return _assign(instruction, f"v[{_register(instruction.result or '')!r}]")
        if opcode.startswith("inlined_call_operand"):
            index = int(instruction.operands[0])
            by_value = opcode == "inlined_call_operand."  # of "<no memory space>"
            return _assign(instruction, f"core.operand({index})" if by_value else str(address(index)))
        if opcode == "sdivrem.u32":
            sign = "%" if instruction.remainder else "//"
            return f"v[{instruction.result!r}] = unsigned({operands[0]}) {sign} unsigned({operands[1]})"
        if opcode in STATEMENTS:
            return STATEMENTS[opcode].format(*operands, cycle=cycle)
        if opcode.startswith("dma."):
            kind = "hbm_to_hbm" if opcode == "dma.general" else opcode.removeprefix("dma.")
            return COPY.format(*operands, cycle=cycle, kind=kind)
        if opcode in VALUES:
            return _assign(instruction, VALUES[opcode].format(*operands))
        raise ReplayError(f"an unknown instruction: {instruction}")

    def _value(self, operand: str) -> str:
        """A Python expression for an operand."""
        sum_of = ADDRESS.fullmatch(operand)
        if sum_of:
            return "(" + " + ".join(self._value(part.strip()) for part in sum_of[1].split("+")) + ")"
        if operand.startswith("%"):
            return f"v[{operand!r}]"
        if operand.startswith("#"):
            return str(self.allocation(operand))
        return f"({wrapped(int(operand.lstrip('$'), 0))})"


def _register(name: str) -> str:
    return name.rsplit("_", 1)[-1]


def _assign(instruction: Instruction, value: str) -> str:
    name = instruction.result or ""
    return f"v[{name!r}] = v[{_register(name)!r}] = {value}"
