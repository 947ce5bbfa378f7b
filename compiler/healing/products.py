"""The dtype that a healing multiplies in: bfloat16 on a CPU that has instructions for it, where
that changes the outputs by far less than there is to heal.

Weights, gradients, the optimiser and the losses stay in float32, and what decides whether anything
is kept is computed in float32 throughout. Sources: mixed precision with float32 masters,
Micikevicius et al. 2018 (arXiv:1710.03740, section 3.1), in the dtype of Kalamkar et al. 2019
(arXiv:1905.12322), whose range needs no scaling of losses.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from attnopt.compiler.cpu_support import cpu_flags, native_products
from attnopt.compiler.healing import loss
from attnopt.compiler.healing.working import Working, device_of
from attnopt.compiler.program import Batch
from attnopt.compiler.verify import own_dtype

SHARE = 0.02  # of the loss to heal, that rounding may be
log = logging.getLogger("attnopt")


@dataclass(frozen=True)
class Products:
    """How a healing multiplies; a call gives the context that its forward passes run in."""

    narrow: bool = False

    def __call__(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.narrow)

    @staticmethod
    def of(student: Working, teacher: Working, batch: Batch) -> Products:
        """In bfloat16 where the CPU has it and one batch shows that it does no harm."""
        forms = (student, teacher)
        if not all(_on_cpu(form) for form in forms):
            return Products()
        if not native_products(torch.bfloat16, cpu_flags()):
            return Products()
        batch = student.ready(batch)
        with torch.no_grad():
            outputs = [form(batch) for form in forms]
            least = SHARE * float(loss.distance(outputs[1], outputs[0], batch))
            try:
                with Products(narrow=True)():
                    rounded = [form(batch) for form in forms]
            except RuntimeError as error:  # an operator that takes no two dtypes
                log.debug("healing in float32: %s", str(error).splitlines()[0])
                return Products()
            wrong = [
                float(loss.distance(exact, rough, batch))
                for exact, rough in zip(outputs, rounded, strict=True)
            ]
        log.debug("rounding to bfloat16 is %s of %.3g to heal", wrong, least / SHARE)
        return Products(narrow=all(x < least for x in wrong))


def _on_cpu(form: Working) -> bool:
    return device_of(form.program).type == "cpu" and own_dtype(form.program) is torch.float32
