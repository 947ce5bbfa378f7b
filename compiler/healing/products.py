"""The dtype that a healing multiplies in: bfloat16 on a CPU that has instructions for it, where
that changes the outputs by far less than there is to heal.

Weights and their gradients, the optimiser and the losses stay in float32, and what decides whether
anything is kept is computed in float32 throughout. Sources: mixed precision with float32 masters,
Micikevicius et al. 2018 (arXiv:1710.03740, section 3.1), in the dtype of Kalamkar et al. 2019
(arXiv:1905.12322), whose range needs no scaling of losses.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from attnopt.compiler.cpu_support import cpu_flags, native_products
from attnopt.compiler.healing import loss
from attnopt.compiler.healing.factors import Factors
from attnopt.compiler.healing.working import Working
from attnopt.compiler.program import Batch
from attnopt.compiler.verify import own_dtype

SHARE = 0.02  # of the loss to heal, that rounding may be
log = logging.getLogger("attnopt")


@dataclass(frozen=True)
class Products:
    """How a healing multiplies; a call gives the context that its forward passes run in."""

    narrow: bool = False

    def __call__(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16) if self.narrow else nullcontext()

    @staticmethod
    def of(student: Working, teacher: Working, factors: Factors, batch: Batch) -> Products:
        """In bfloat16 where the CPU has it and one batch shows that it does no harm."""
        if not (_on_cpu(student) and _on_cpu(teacher)):
            return Products()
        if not native_products(torch.bfloat16, cpu_flags()):
            return Products()
        try:
            return Products(narrow=_harmless(student, teacher, factors, student.ready(batch)))
        except RuntimeError as error:  # an operator that takes no two dtypes
            log.debug("healing in float32: %s", error)
            return Products()


def _harmless(student: Working, teacher: Working, factors: Factors, batch: Batch) -> bool:
    """Whether rounding moves both forms by less than a share of their distance; gradients are
    taken once, so that what cannot be trained so shows here."""
    narrow = Products(narrow=True)
    with torch.no_grad():
        expected, actual = teacher(batch), student(batch)
        most = SHARE * float(loss.distance(expected, actual, batch))
        with narrow():
            rounded = teacher(batch)
        wrong = [float(loss.distance(expected, rounded, batch))]
    with narrow():
        rounded = student(batch, factors.weights(dtype=torch.float32))
    moved = loss.distance(actual, rounded, batch)
    torch.autograd.grad(moved, list(factors.held.values()), allow_unused=True)
    wrong.append(float(moved.detach()))
    log.debug("rounding to bfloat16 is %s, %.3g is allowed", wrong, most)
    return all(x < most for x in wrong)


def _on_cpu(form: Working) -> bool:
    return form.program.device.type == "cpu" and own_dtype(form.program) is torch.float32
