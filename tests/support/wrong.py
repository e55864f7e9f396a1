"""Policies with one mistake each, of the kind that published implementations have had, and the check for it."""

from __future__ import annotations

import itertools
import time
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import PrivateAttr

from cachekit import (
    OPEN,
    Action,
    BranchChange,
    Choice,
    Entry,
    Every,
    Linear,
    Mask,
    NestedRegion,
    Policy,
    Reuse,
    Schedule,
    Sites,
    Span,
    StandIn,
    WholeDenoiser,
)  # fmt: skip


class Wrong(Policy):
    """A policy of one choice, whose parts the subclasses replace by wrong ones."""

    name: ClassVar[str] = "wrong"
    place: ClassVar[Any] = WholeDenoiser()
    schedule: ClassVar[Any] = Every(n=2)
    stand_in: ClassVar[Any] = Reuse()
    change: ClassVar[BranchChange] = BranchChange.REMAINING

    def choices(self):
        return {"it": Choice(self.place, self.schedule, self.stand_in, self.change)}


class Mistake(NamedTuple):
    """A wrong policy: the check that finds it, and the site and the step that the failure has to name.

    `nowhere` is the reason why a failure has neither.
    """

    check: str
    policy: Policy
    model: str = "pixart"
    site: str = "denoiser"
    step: int | str = 1
    nowhere: str = ""


MISTAKES: dict[str, Mistake] = {}
#: The step for which `check_linear_ramp` and `check_history_length` have a stand-in predict.
AHEAD = 21
#: Threads differ in the step in which one disturbs the other.
ANY = r"\d+"
NO_RUN = "what is wrong is a name or a text, which no run is needed to see"


def caught_by(check, model="pixart", given=None, **place):
    """Register a class of policies under its name, with fields `given`."""

    def register(policy):
        MISTAKES[policy.__name__] = Mistake(check, policy(**given or {}), model, **place)
        return policy

    return register


class Newest(StandIn):
    """Base of stand-ins that change the newest value."""

    name: ClassVar[str] = "newest"

    def predict(self, history, at, given=()):
        return tuple(self.changed(tensor, history, at) for tensor in history[0].tensors)

    def changed(self, tensor, history, at):
        raise NotImplementedError


# -- tensors ------------------------------------------------------------------------------------------------------


class PerBlock(StandIn):
    """The residual of all blocks, added in each of them."""

    name: ClassVar[str] = "per_block"
    blocks: int = 3

    def predict(self, history, at, given=()):
        return tuple(tensor * self.blocks for tensor in history[0].tensors)


@caught_by("check_standing_still", site="transformer_blocks.0")
class ResidualOfEachBlock(Wrong):
    place = Sites(kinds="block")
    stand_in = PerBlock(of="residual")


class Swapping(Newest):
    def changed(self, tensor, history, at):
        return torch.cat(tensor.chunk(2)[::-1]) if len(at.branches) == 2 else tensor


@caught_by("check_branches_do_not_mix")
class HalvesSwapped(Wrong):
    stand_in = Swapping()


@caught_by("check_branches_do_not_mix", "sd3", site="transformer_blocks.0.attn")
class HalvesSwappedInsideABlock(Wrong):
    place = Sites(kinds="joint_attention")
    stand_in = Swapping()


class Twice(Newest):
    def changed(self, tensor, history, at):
        return tensor.chunk(2)[-1].repeat(2, *[1] * (tensor.dim() - 1)) if len(at.branches) == 2 else tensor


@caught_by("check_branches_do_not_mix")
class OneBranchForBoth(Wrong):
    """The unconditional half is not kept, and read nevertheless."""

    stand_in = Twice()


class Mean(Newest):
    def changed(self, tensor, history, at):
        return (0 * tensor) + tensor.mean(0, keepdim=True)


@caught_by("check_branches_do_not_mix", site="transformer_blocks.1.attn1")
class MeanOfBranches(Wrong):
    place = Sites(kinds="self_attention")
    stand_in = Mean()


class PerBatch(Newest):
    """Reused where the first image of the batch says so, halved elsewhere."""

    def changed(self, tensor, history, at):
        first = torch.cat([part[:1] for part in tensor.chunk(len(at.branches))])
        return tensor * (0.5 if tensor.shape[0] > first.shape[0] else 1.0)


@caught_by("check_batch_items_independent")
class DecisionOfABatch(Wrong):
    stand_in = PerBatch()


class Leaking(Newest):
    """Each image gets a tenth of the batch's mean, branch by branch."""

    def changed(self, tensor, history, at):
        parts = tensor.chunk(len(at.branches))
        return torch.cat([0.9 * part + 0.1 * part.mean(0, keepdim=True) for part in parts])


@caught_by("check_batch_items_independent", "flux")
class LeakBetweenImages(Wrong):
    stand_in = Leaking()


class Adding(Newest):
    def changed(self, tensor, history, at):
        return tensor.add_(0.01)


@caught_by("check_no_writes")
class ChangedInPlace(Wrong):
    stand_in = Adding()


class Halving(Newest):
    def changed(self, tensor, history, at):
        tensor[..., :1] = 0
        return tensor


@caught_by("check_no_writes", "flux", site="single_transformer_blocks.1..single_transformer_blocks.2")
class ChangedASlice(Wrong):
    place = Span(first=1)
    stand_in = Halving(of="residual")


class Wide(Newest):
    def changed(self, tensor, history, at):
        return tensor.double()


@caught_by("check_runs")
class OtherDtype(Wrong):
    stand_in = Wide()


class Float(Newest):
    def changed(self, tensor, history, at):
        return tensor.float()


@caught_by("check_dtype")
class FloatInBfloat16(Wrong):
    stand_in = Float()


class Bare(StandIn):
    name: ClassVar[str] = "bare"

    def predict(self, history, at, given=()):
        return history[0].tensors[0]


@caught_by("check_runs")
class BareTensor(Wrong):
    stand_in = Bare()


class OneRow(Newest):
    def changed(self, tensor, history, at):
        return tensor[:1]


@caught_by("check_runs")
class BatchOfOne(Wrong):
    stand_in = OneRow()


class Divided(Newest):
    def changed(self, tensor, history, at):
        return tensor / tensor.abs().clamp(max=0)


@caught_by("check_runs")
class DividedByZero(Wrong):
    stand_in = Divided()


# -- state --------------------------------------------------------------------------------------------------------


class OfTheClass(Newest):
    calls: ClassVar[list] = []

    def changed(self, tensor, history, at):
        self.calls.append(at.step)
        return tensor * (1 + 0.01 * len(self.calls))


@caught_by("check_again")
class StateOnTheClass(Wrong):
    stand_in = OfTheClass()


class Private(Newest):
    _first: Any = PrivateAttr(default=None)

    def changed(self, tensor, history, at):
        if self._first is None or self._first.shape != tensor.shape:
            self._first = tensor.clone()
        return 0.5 * tensor + 0.5 * self._first


@caught_by("check_second_image_is_independent", "sd")
class PrivateState(Wrong):
    def choices(self):
        return {"it": Choice(WholeDenoiser(), Every(n=2), Private())}


class Interrupted(Newest):
    """Counts predictions, and begins anew after the last step alone."""

    _count: int = PrivateAttr(default=0)

    def changed(self, tensor, history, at):
        self._count = 0 if at.step >= at.steps - 1 else self._count + 1
        return tensor * (1 + 0.01 * self._count)


@caught_by("check_interrupt")
class ResetAtTheEnd(Wrong):
    def choices(self):
        return {"it": Choice(WholeDenoiser(), Mask(steps=(0, 3)), Interrupted())}


class Stale(Newest):
    _mean: Any = PrivateAttr(default=None)

    def changed(self, tensor, history, at):
        if self._mean is None:
            self._mean = torch.zeros(tensor.shape[1:])
        return tensor + self._mean


@caught_by("check_shape_change")
class ShapeKeptOnThePolicy(Wrong):
    def choices(self):
        return {"it": Choice(WholeDenoiser(), Every(n=2), Stale())}


class Noisy(Newest):
    def changed(self, tensor, history, at):
        return tensor + 0.01 * torch.randn_like(tensor)


@caught_by("check_again")
class Nondeterministic(Wrong):
    stand_in = Noisy()


class Accumulating(Newest):
    """Counts the predictions since the run began, with any other thread's."""

    _count: int = PrivateAttr(default=0)

    def begin(self, run, shared):
        self._count = 0

    def changed(self, tensor, history, at):
        self._count += 1
        time.sleep(0.02)
        return tensor * (1 + 0.01 * self._count)


@caught_by("check_threads", step=ANY)
class SharedByThreads(Wrong):
    stand_in = Accumulating()


class Peeking(Newest):
    """Follows what other targets have left in this very call, or in the last one where the denoiser is compiled."""

    watches: ClassVar[bool] = True

    def watch(self, kept, history, at):
        at.shared["seen"] = float(kept[0].abs().mean())

    def changed(self, tensor, history, at):
        return tensor * at.shared["seen"]


@caught_by("check_compiled", site="transformer_blocks.0.ff")
class ReadInTheSameCall(Wrong):
    def choices(self):
        seen = Choice(Sites(kinds="self_attention"), Every(n=1), Peeking())
        return {"seen": seen, "scaled": Choice(Sites(kinds="feed_forward"), Every(n=2), Peeking())}


# -- the model ----------------------------------------------------------------------------------------------------


class Hooking(Reuse):
    def begin(self, run, shared):
        return run.denoiser.register_forward_hook(
            lambda module, args, output: tuple(tensor * 1.01 for tensor in output)
        )


@caught_by("check_noop_is_exact", step=0)
class HookLeftOnTheModel(Wrong):
    stand_in = Hooking()


class HookingAgain(Hooking):
    """Replaces the hook of the last run, which may have been on another copy of the model."""

    _last: Any = PrivateAttr(default=None)

    def begin(self, run, shared):
        if self._last is not None:
            self._last.remove()
        self._last = super().begin(run, shared)


@caught_by("check_deepcopy", step=0)
class HookForgottenOnACopy(Wrong):
    stand_in = HookingAgain()


class Tuning(Reuse):
    def begin(self, run, shared):
        run.denoiser.proj_out.bias.data += 0.01


@caught_by("check_undo", site="proj_out", step=0)
class WeightsChanged(Wrong):
    stand_in = Tuning()


@caught_by("check_differs", site="transformer_blocks.0.attn2.to_k")
class NothingToSave(Wrong):
    """Approximates what is equal in all steps."""

    place = Sites(kinds="text_key_value")


class Halves(Newest):
    """Takes for granted that both branches run."""

    def changed(self, tensor, history, at):
        first, second = tensor.chunk(2)
        return torch.cat([first, second])


@caught_by("check_composes", step=3)
class BothBranchesNeeded(Wrong):
    stand_in = Halves()


# -- schedules ----------------------------------------------------------------------------------------------------

_COUNTER = itertools.count()


class Counting(Schedule):
    name: ClassVar[str] = "counting"

    def full(self, at):
        return next(_COUNTER) % 3 == 0


@caught_by("check_schedule_is_pure", step=5)
class GlobalCounter(Wrong):
    schedule = Counting()


class PerCall(Schedule):
    """Counts the calls of two branches as steps."""

    name: ClassVar[str] = "per_call"
    _calls: int = PrivateAttr(default=0)

    def full(self, at):
        self._calls += 1
        return self._calls // 2 % 2 == 0


@caught_by("check_schedule_is_pure", "wan", step=5)
class CounterPerCall(Wrong):
    def choices(self):
        return {"it": Choice(WholeDenoiser(), PerCall(), Reuse())}


class ByPrompt(Schedule):
    """Full in more steps for some prompts, as decided at the beginning by each process on its own."""

    name: ClassVar[str] = "by_prompt"
    _often: bool = PrivateAttr(default=False)

    def begin(self, run, shared):
        self._often = bool(run.arguments["prompt_embeds"].sum() > 10)

    def action(self, at):
        if at.step == 0:
            return OPEN
        return Action.STORE if at.step % (2 if self._often else 3) == 0 else Action.REUSE

    def decide(self, at):
        return Action.STORE


@caught_by("check_ranks", "flux", step=2)
class DecidedByEachRank(Wrong):
    def choices(self):
        return {"it": Choice(WholeDenoiser(), ByPrompt(), Reuse())}


class Early(Schedule):
    name: ClassVar[str] = "early"

    def action(self, at):
        return Action.STORE if at.step % 2 else Action.REUSE


@caught_by("check_counts_match_plan", step=0)
class ReuseBeforeStore(Wrong):
    schedule = Early()


class ByStep(Schedule):
    name: ClassVar[str] = "by_step"

    def full(self, at):
        return at.step % 3 == 0


@caught_by("check_origin", "sd", site="region 0")
class OriginIgnored(Wrong):
    place = NestedRegion(branch=0)
    schedule = ByStep()
    change = BranchChange.REFRESH


# -- forecasts ----------------------------------------------------------------------------------------------------


class Backwards(Linear):
    """A forecast with the wrong sign."""

    def weights(self, times, at):
        newest, *rest = super().weights(times, at)
        return [2 - newest, -rest[0]] if rest else [newest]


@caught_by("check_linear_ramp", step=AHEAD)
class WrongSign(Wrong):
    stand_in = Backwards()


class FromTheOlder(StandIn):
    """The line's slope times the distance to the older entry, added to the newer one."""

    name: ClassVar[str] = "from_the_older"
    length: ClassVar[int | None] = 2

    def weights(self, times, at):
        if len(times) < 2:
            return [1.0]
        share = (at.step - times[1].step) / (times[0].step - times[1].step)
        return [1 + share, -share]


@caught_by("check_linear_ramp", "flux", step=AHEAD)
class OffByOne(Wrong):
    stand_in = FromTheOlder()


class NotOne(StandIn):
    name: ClassVar[str] = "not_one"
    length: ClassVar[int | None] = 2

    def weights(self, times, at):
        return [0.7, 0.2][: len(times)]


@caught_by("check_linear_ramp", step=AHEAD)
class WeightsThatDoNotAddUp(Wrong):
    stand_in = NotOne()


class Deep(Newest):
    """A forecast whose length was left at 1."""

    def changed(self, tensor, history, at):
        if len(history) < 2:
            return tensor
        return 2 * tensor - history[1].tensors[0]


@caught_by("check_history_length", step=AHEAD)
class LengthTooShort(Wrong):
    stand_in = Deep()


class Impatient(StandIn):
    """Takes for granted that two entries are kept."""

    name: ClassVar[str] = "impatient"
    length: ClassVar[int | None] = 2

    def predict(self, history: tuple[Entry, ...], at, given=()):
        newer, older = history
        return tuple(1.5 * a - 0.5 * b for a, b in zip(newer.tensors, older.tensors))


@caught_by("check_history_length", step=AHEAD)
class HistoryStillShort(Wrong):
    schedule = Mask(steps=(0, 1, 4))
    stand_in = Impatient()


# -- names and specs ----------------------------------------------------------------------------------------------


class Listing(Wrong):
    """Written with a key that the class doesn't have."""

    level: int = 1

    def __str__(self):
        return f"wrong:depth={self.level}"


caught_by("check_spec_round_trip", nowhere=NO_RUN)(Listing)


@caught_by("check_spec_round_trip", given={"level": 2}, nowhere=NO_RUN)
class KeyLeftOut(Wrong):
    level: int = 1

    def __str__(self):
        return "wrong"


class Misspelt(Reuse):
    def pedict(self, history, at, given=()):
        return tuple(tensor * 0.5 for tensor in history[0].tensors)


@caught_by("check_names", nowhere=NO_RUN)
class MisspeltMethod(Wrong):
    stand_in = Misspelt()


class MisspeltVariable(Linear):
    lenght: ClassVar[int] = 2


@caught_by("check_names", nowhere=NO_RUN)
class MisspeltLength(Wrong):
    stand_in = MisspeltVariable()
