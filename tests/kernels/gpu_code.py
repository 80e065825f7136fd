"""The CUDA bodies, compiled for a GPU that need not be there; a program that writes JSON.

It calls the bodies as training does, with tensors of a CPU, and lets Triton compile what they would
launch: the same specialisation by dtypes, alignment and ones, down to the machine code of
``ptxas``, which says what a kernel takes. Every autotuned configuration is compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from cpo_arabic.kernels import triton_infonce, triton_logprob
from cpo_arabic.kernels.infonce import Problem, Tile

from .cases import ContrastCase, HeadCase


@dataclass(frozen=True)
class Code:
    """What one compiled kernel takes."""

    kernel: str
    case: str
    shared: int  # bytes a program
    registers: int  # a thread
    stack: int  # bytes a thread: what registers had no room for


class AbsentDriver:
    """Says which GPU to compile for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def compiled(capability: int) -> Iterator[Code]:
    """Every kernel of both bodies, as the cases below would launch it."""
    triton.runtime.driver.set_active(AbsentDriver(capability))
    found: list[tuple[str, Any]] = []
    launch = JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, warmup: bool, **options: Any) -> None:
        code = launch(kernel, *arguments, warmup=True, **options)
        found.append((kernel.__name__, code))

    JITFunction.run = compile_only
    for case in chain(head_cases(), contrast_cases()):
        for name, code in found:
            yield described(name, case, code)
        found.clear()


def head_cases() -> Iterator[str]:
    """A tile in float32, with and without what a head may have."""
    body = triton_logprob.TritonBody()
    head = HeadCase.random(64, 16, 8192).to(torch.float32)
    rows = torch.empty(64)
    for softcap in (None, 30.0):
        for pulling in (False, True):
            tile = torch.empty(64, 8192)
            body.absorb(tile, head.targets, rows, rows, softcap=softcap, pulling=pulling)
            yield f"softcap {softcap}, pulling {pulling}"
    body.differentiate(tile, head.targets, rows, rows, tile)
    yield "float32"


def contrast_cases() -> Iterator[str]:
    """Live keys and a queue, one scale and two, one query and many, in every configuration."""
    body = triton_infonce.TritonBody()
    kernels = (triton_infonce._mask_kernel, triton_infonce._exponentials_kernel)
    for queries, keys in ((64, 8192), (1, 37)):
        case = ContrastCase.random(queries, keys, 0, 8).to(torch.float32)
        problem = Problem(
            case.queries, case.keys, case.positives, case.query_labels, case.key_labels,
            None, None, None, case.temperature, case.concentration,
        )  # fmt: skip
        similarity = torch.empty(queries, keys)
        for configuration in triton_infonce._CONFIGS:
            for kernel in kernels:
                kernel.configs = [configuration]
            for live in (False, True):
                body.mask(problem, Tile(case.keys, similarity, case.key_labels, 0, live))
            for scales in ((10.0,), (10.5, 0.5)):
                list(body.exponentials(similarity, torch.empty(queries), scales))
            yield f"{queries} queries, {keys} keys, {configuration}"


def described(kernel: str, case: str, code: Any) -> Code:
    """What Triton and the machine code say."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    taken = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", usage)}
    return Code(kernel, case, code.metadata.shared, taken["REG"], taken["STACK"])


if __name__ == "__main__":
    codes = [asdict(code) for code in compiled(int(sys.argv[1]))]
    Path(sys.argv[2]).write_text(json.dumps(codes), encoding="utf-8")
