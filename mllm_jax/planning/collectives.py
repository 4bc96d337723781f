"""What a compiled program sends over the network, read from its HLO; what a loop sends counts as often as it runs."""

import dataclasses
import functools
import math
import re
from collections import defaultdict

# Bytes that a chip sends in a ring of n chips, as a multiple of the operation's larger side (all arrays together).
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-broadcast": lambda n: 1.0,
    "collective-permute": lambda n: 1.0,
}
WIDTHS = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
}
WIDTHS |= {"u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}

_COMPUTATION = re.compile(r"^(?:ENTRY )?(%[^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?(%\S+) = ((?:\(.*?\)|\S+)) ([\w-]+)\((.*)$")
_ARRAY = re.compile(r"\b(" + "|".join(WIDTHS) + r")\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|true_computation|false_computation)=(%[^\s,)}]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    operation: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%[\w.-]+", self.rest.split("), ", 1)[0])

    @property
    def bytes(self) -> int:
        """Of all arrays of the result."""
        return sum(
            WIDTHS[kind] * math.prod(int(side) for side in sides.split(",") if side)
            for kind, sides in _ARRAY.findall(self.shape)
        )


def collective_bytes(hlo: str, devices: int) -> dict[str, float]:
    """Bytes that each chip sends in one run of a compiled program, by kind of collective.

    A ring is taken for every kind; all-reduce sends twice. A product of matrices whose parts travel while they are
    multiplied (XLA's collective matmul) shows as collective-permute.

    Args:
      hlo: `Compiled.as_text()`.
      devices: that run it, for collectives which name no groups.
    """
    program = _Program(hlo)
    return dict(sorted(program.sent(program.entry, devices).items()))


class _Program:
    def __init__(self, hlo: str):
        self.computations: dict[str, list[_Instruction]] = {}
        current: list[_Instruction] = []
        self.entry = ""
        for line in hlo.splitlines():
            if found := _COMPUTATION.match(line):
                current = self.computations.setdefault(found[1], [])
                if line.startswith("ENTRY"):
                    self.entry = found[1]
            elif found := _INSTRUCTION.match(line):
                current.append(_Instruction(*found.groups()))
        self.sent = functools.cache(self._sent)

    def _sent(self, computation: str, devices: int) -> dict[str, float]:
        total: dict[str, float] = defaultdict(float)
        there = {each.name: each for each in self.computations.get(computation, ())}
        root = list(there.values())[-1:]
        cut = [each.operands[0] for each in root if each.operation == "dynamic-slice"]
        for each in there.values():
            kind = each.operation.removesuffix("-start")
            if kind == "all-reduce" and each.name in cut:  # as XLA writes what TPUs do in one operation
                kind = "reduce-scatter"
            if kind in SENT:
                size = sum(there[name].bytes for name in each.operands)
                # The only one that makes more than it is given, which "-start" repeats.
                if kind == "all-gather":
                    size = each.bytes - (size if each.operation != kind else 0)
                total[kind] += size * SENT[kind](_group_size(each.rest, devices))
                continue
            if each.operation in ("async-update", "async-done"):  # of what "async-start" has begun
                continue
            times = self.trip_count(computation, each) if each.operation == "while" else 1
            called = _CALLED.findall(each.rest)
            for branches in _BRANCHES.findall(each.rest):
                called += re.findall(r"%[^\s,]+", branches)
            for name in called:
                for inner, size in self.sent(name, devices).items():
                    total[inner] += times * size
        return total

    def trip_count(self, computation: str, loop: _Instruction) -> int:
        """How often a `while` runs: a counter that is compared with a constant; 1 where it is anything else."""
        if found := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest):
            return int(found[1])
        called = dict(re.findall(r"(condition|body)=(%[^\s,)}]+)", loop.rest))
        condition = {each.name: each for each in self.computations.get(called.get("condition", ""), ())}
        compare = next((each for each in condition.values() if each.operation == "compare"), None)
        if compare is None or "direction=LT" not in compare.rest:
            return 1
        counter, limit = (condition.get(name) for name in compare.operands[:2])
        if limit is None or counter is None or counter.operation != "get-tuple-element":
            return 1
        place = int(re.search(r"index=(\d+)", counter.rest)[1])
        end = _constant(limit)
        start = self._start(computation, loop.operands[0], place)
        step = self._step(called.get("body", ""), place)
        return 1 if end is None else max(1, -(-(end - start) // step))

    def _start(self, computation: str, name: str, place: int) -> int:
        there = {each.name: each for each in self.computations[computation]}
        tuples = there.get(name)
        if tuples is None or tuples.operation != "tuple" or place >= len(tuples.operands):
            return 0
        source = there.get(tuples.operands[place])
        while source is not None and source.operation in ("copy", "bitcast", "copy-done", "copy-start"):
            source = there.get(source.operands[0])
        return (_constant(source) or 0) if source is not None else 0

    def _step(self, body: str, place: int) -> int:
        """What the body adds to the counter: constants added one after the other."""
        there = {each.name: each for each in self.computations.get(body, ())}
        root = next((e for e in reversed(list(there.values())) if e.operation == "tuple"), None)
        if root is None or place >= len(root.operands):
            return 1
        source, step = there.get(root.operands[place]), 0
        while source is not None and source.operation in ("add", "copy", "bitcast"):
            constants = [c for name in source.operands if (c := _constant(there.get(name))) is not None]
            step += sum(constants)
            rest = [there.get(n) for n in source.operands if _constant(there.get(n)) is None]
            source = rest[0] if rest else None
        return step or 1


def _constant(instruction: _Instruction | None) -> int | None:
    if instruction is None or instruction.operation != "constant":
        return None
    found = re.match(r"(-?\d+)\)", instruction.rest)
    return int(found[1]) if found else None


def _group_size(rest: str, devices: int) -> int:
    """Chips that take part in one group of a collective.

    Raises:
      ValueError: groups in a form that is not known.
    """
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return found[1].count(",") + 1
    # Axes of a mesh, whole or the part of one: mesh['a'=4,'b'=16] {'a','b':(2)8} are 4 x 8 chips.
    if found := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if found := re.search(r"replica_groups=(?!\{\})\S.{,80}", rest):
        raise ValueError(f"a collective of the compiled program has groups in an unknown form: {found[0]}")
    return devices
