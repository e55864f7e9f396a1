"""The table of checks: what each demands, and what usually causes its failure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cachekit.testing.mixing import check_batch_items_independent, check_branches_do_not_mix, check_standing_still
from cachekit.testing.parts import (
    check_dtype,
    check_history_length,
    check_linear_ramp,
    check_names,
    check_no_writes,
    check_spec_round_trip,
)
from cachekit.testing.planned import check_composes, check_counts_match_plan, check_origin, check_schedule_is_pure
from cachekit.testing.ranks import check_ranks
from cachekit.testing.repeating import (
    check_again,
    check_compiled,
    check_deepcopy,
    check_differs,
    check_interrupt,
    check_noop_is_exact,
    check_runs,
    check_second_image_is_independent,
    check_shape_change,
    check_threads,
    check_undo,
)
from cachekit.testing.subject import Subject


@dataclass(frozen=True)
class Check:
    """One invariant: a function that raises where it doesn't hold, and the likely cause of that.

    Where the policy doesn't run at all, only checks that are `static` are made.
    """

    run: Callable[[Subject], None]
    cause: str
    static: bool = False

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.run.__name__

    @property
    def invariant(self) -> str:
        """What it demands, in one line."""
        return (self.run.__doc__ or "").partition("\n")[0]


_ALL = (
    Check(check_spec_round_trip, "a key that isn't a field, or a text of its own", static=True),
    Check(check_names, "a misspelt method or class variable", static=True),
    Check(
        check_runs,
        "a method that raises, or returns what is no tuple of tensors like those kept",
        static=True,
    ),
    Check(check_differs, "a stand-in that is never used, or a target outside of what the run computes"),
    Check(check_noop_is_exact, "code that acts outside of the methods of a policy"),
    Check(check_undo, "a module or a tensor of the model that the policy has changed"),
    Check(check_again, "randomness, or state on the policy, its class or a module; use at.memory"),
    Check(check_second_image_is_independent, "state that outlives the run; use at.memory and at.shared"),
    Check(check_interrupt, "state that is reset at the end of a run alone; use at.memory"),
    Check(check_shape_change, "tensors kept on the policy, or a shape that it remembers"),
    Check(check_threads, "state that threads share; use at.memory, which is the run's own"),
    Check(check_ranks, "a decision from values outside of decide and needs, whose answers alone are agreed on"),
    Check(check_deepcopy, "a reference to the model or a module"),
    Check(check_compiled, "a side effect that compiled code doesn't repeat, or a value that the same call has written"),
    Check(check_schedule_is_pure, "a counter in the schedule; use at.step and at.origin"),
    Check(check_counts_match_plan, "a reuse before the first full step, or a schedule that counts calls"),
    Check(check_origin, "a schedule that uses at.step where it should use at.step - at.origin"),
    Check(check_composes, "a schedule or a stand-in that assumes to be the only policy"),
    Check(check_branches_do_not_mix, "halves of a batch swapped, joined or averaged over the branches"),
    Check(check_batch_items_independent, "a number taken over the whole batch"),
    Check(check_standing_still, "a wrong residual, halves swapped, or weights that don't add up to 1"),
    Check(check_linear_ramp, "a wrong sign, gap or order in a forecast; set order = 0 where it is none"),
    Check(check_history_length, "an entry beyond the length, or a history that is still short"),
    Check(check_no_writes, "an operation in place, such as add_ or an assignment to a slice"),
    Check(check_dtype, "a conversion, such as float(), without the way back"),
)

#: The checks by name, in the order in which they are made.
CHECKS = {check.name: check for check in _ALL}
