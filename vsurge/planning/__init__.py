"""What a model would take of a slice of TPUs, and do there: compiled for it, on any machine."""

from .assumptions import PlanAssumptions
from .plan import DecodeStep, PrefillStep, SlicePlan, plan_slice
from .question import Question
from .slices import SLICE_KINDS, Slice, parse_slice

__all__ = [
    "SLICE_KINDS",
    "DecodeStep",
    "PlanAssumptions",
    "PrefillStep",
    "Question",
    "Slice",
    "SlicePlan",
    "parse_slice",
    "plan_slice",
]
