"""Which engine and precision score a student here: what was exported, what is installed, what the CPU can do."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from recipes.arguments import UserError

EXPORT = "export.json"  # written last: the forms of a student that passed the guard
FILES = {
    "onnx-float32": "onnx/model.onnx",
    "onnx-int8": "onnx/model_int8.onnx",
    "openvino-float32": "onnx/model.onnx",  # OpenVINO reads ONNX, and multiplies it in bfloat16 where the CPU can
    "openvino-bfloat16": "onnx/model.onnx",
    "openvino-int8": "openvino/openvino_model_int8.xml",
}
# Fastest first, as recipes.bench.throughput measures them.
PREFERENCE = (
    "openvino-int8",
    "openvino-bfloat16",
    "onnx-int8",
    "openvino-float32",
    "onnx-float32",
    "torch-bfloat16",
    "torch-float32",
)
# Instructions that sum products of 8-bit numbers in 32 bits, and that multiply bfloat16. Without the first, sums are of
# 16 bits and can overflow: faster than float32 in some engines, but other values than those an export was held to.
# Without the second, torch emulates bfloat16, many times slower than float32, and OpenVINO takes float32 unasked.
INT8_FLAGS = frozenset({"amx_int8", "avx512_vnni", "avx_vnni", "avx_vnni_int8", "asimddp", "i8mm"})
BFLOAT16_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})


@dataclass(frozen=True)
class Plan:
    """What scores: `form` is engine and precision, `reason` why it is not what was asked for (empty if it is)."""

    form: str
    reason: str = ""

    @property
    def backend(self) -> str:
        """`torch`, `onnx` or `openvino`."""
        return self.form.split("-")[0]

    @property
    def precision(self) -> str:
        """`float32`, `bfloat16` or `int8`."""
        return self.form.split("-")[1]


def cpu_flags() -> frozenset[str]:
    """Return the instruction sets of this CPU as Linux names them; empty where the system does not say."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):  # x86, Arm
            return frozenset(value.split())
    return frozenset()


def multiplied(flags: Collection[str]) -> frozenset[str]:
    """Return the precisions that a CPU with these flags multiplies in hardware; float32 is always one of them.

    >>> sorted(multiplied({"avx2", "avx_vnni"}))
    ['float32', 'int8']
    """
    found = {"float32"}
    if not INT8_FLAGS.isdisjoint(flags):
        found.add("int8")
    if not BFLOAT16_FLAGS.isdisjoint(flags):
        found.add("bfloat16")
    return frozenset(found)


def exported_forms(folder: Path) -> dict[str, Path]:
    """Return the forms that `recipes.serve.export` put into `folder`, with their files; none if it never ran there.

    Raises:
        UserError: Its record is damaged.
    """
    record = folder / EXPORT
    if not record.is_file():
        return {}
    try:
        forms = json.loads(record.read_text(encoding="utf-8"))["forms"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record}: not the record of an export ({error}). Export again.") from None
    return {form: folder / FILES[form] for form in FILES if form in forms}


def installed_engines() -> set[str]:
    """Return those of `onnx`, `openvino` and `torch` whose library is installed."""
    libraries = {"onnx": "onnxruntime", "openvino": "openvino", "torch": "torch"}
    return {engine for engine, library in libraries.items() if importlib.util.find_spec(library) is not None}


def choose(
    backend: str,
    precision: str,
    exported: Mapping[str, Path] | Collection[str],
    installed: Collection[str],
    flags: Collection[str],
    cuda: bool = False,
) -> Plan:
    """Choose the fastest form that is there and that the machine multiplies.

    Args:
        backend: `auto`, `torch`, `onnx` or `openvino`.
        precision: `auto`, `float32`, `bfloat16` or `int8`.
        exported: Forms that were exported (`exported_forms`); torch needs none.
        installed: Engines that are installed.
        flags: Of the CPU (`cpu_flags`).
        cuda: There is a GPU: `auto` scores on it, in bfloat16.

    Raises:
        UserError: The engine asked for is not installed, or nothing was exported for it.

    Example:
        int8 on a CPU that does not multiply it falls back, and says so:

        >>> choose("onnx", "int8", {"onnx-float32", "onnx-int8"}, {"onnx"}, flags={"avx2"}).form
        'onnx-float32'
        >>> choose("auto", "auto", {"openvino-int8"}, {"openvino", "torch"}, flags={"avx512_vnni"}).form
        'openvino-int8'
    """
    if backend != "auto" and backend not in installed:
        raise UserError(
            f"backend {backend}: its library is not installed: pip install -e '.[export]' -c constraints.txt"
        )
    if cuda and backend in ("auto", "torch"):
        return Plan("torch-bfloat16" if precision in ("auto", "bfloat16") else "torch-float32")
    there = [
        form
        for form in PREFERENCE
        if (engine := form.split("-")[0]) in installed
        and backend in ("auto", engine)
        and (engine == "torch" or form in exported)
    ]
    if not there:
        raise UserError(f"backend {backend}: nothing was exported for it. Run python -m recipes.serve.export first.")
    able = multiplied(flags)
    usable = [form for form in there if form.split("-")[1] in able]
    if precision == "auto":
        if backend == "auto" and usable[0].startswith("torch"):
            return Plan("torch-float32")  # the reference; nothing was exported, so nothing was held against it
        if backend == "torch":
            return Plan("torch-float32")
        passed_over = there[0].split("-")[1]  # exported on another machine, and faster there
        if there[0] not in usable:
            return Plan(usable[0], f"this CPU has no instructions for {passed_over}: scoring with {usable[0]} instead")
        return Plan(usable[0])
    if precision not in able:  # exported or not: an export on such a CPU leaves these forms out
        if not usable:
            raise UserError(f"precision {precision}: this CPU does not multiply it, and there is no other form.")
        return Plan(usable[0], f"this CPU has no instructions for {precision}: scoring with {usable[0]} instead")
    wanted = [form for form in there if form.endswith(precision)]
    if not wanted:
        raise UserError(
            f"precision {precision}: there is no such form of this student for backend {backend}; there are "
            f"{', '.join(there)}. Export it, or choose one of them."
        )
    return Plan(wanted[0])


def plan_for(folder: Path, backend: str, precision: str) -> Plan:
    """Choose for a folder on this machine; a choice other than the one asked for is said as a warning."""
    import torch

    plan = choose(
        backend, precision, exported_forms(folder), installed_engines(), cpu_flags(), torch.cuda.is_available()
    )
    if plan.reason:
        warnings.warn(plan.reason, stacklevel=3)
    return plan
