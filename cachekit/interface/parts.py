"""The three parts that a policy is made of: where it acts, when, and what stands in for what is skipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from typing_extensions import Self

from cachekit.errors import SpecError, reason_of, source_of
from cachekit.interface.moment import Action, History, Moment, Open, Streams, Time
from cachekit.interface.sites import SiteMap, Target
from cachekit.interface.variables import refuse_fields, refuse_variables

if TYPE_CHECKING:
    from cachekit.interface.adapter import Layout
    from cachekit.interface.beginning import Beginning

#: What a stand-in is made for: the output itself, the output minus what entered, or the clean sample it implies.
Quantity = Literal["output", "residual", "x0"]


class BranchChange(str, Enum):
    """How kept tensors change when a guidance branch is dropped.

    `REMAINING` keeps the part of each branch, for as long as it may be read. `MEAN` keeps the mean over all branches
    for the one that runs on. `REFRESH` keeps each part too, but where the branch is dropped for good the schedule
    starts anew, with `Moment.origin` at that step.
    """

    REMAINING = "remaining"
    MEAN = "mean"
    REFRESH = "refresh"


class Part(BaseModel):
    """Base of everything that a spec can name: its fields are the keys, and it is written and parsed as text.

    Instances are frozen, so that runs and threads can share them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    #: The word in a spec: lower case, digits and underscores.
    name: ClassVar[str] = ""
    #: One line for listings.
    summary: ClassVar[str] = ""
    #: Where the method was published, such as "arXiv 2404.02747".
    paper: ClassVar[str] = ""
    #: The key of a value that is given without one: `every(3)` is `every(n=3)`.
    positional: ClassVar[str] = ""
    #: Keys of which one at most may be given.
    exclusive: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **values: Any) -> None:
        """Check the values of the fields; raises `SpecError` where one of them is wrong."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SpecError(f"{type(self).__name__}: {_reason(error)}") from error

    @model_validator(mode="after")
    def _refuse_exclusive(self) -> Self:
        given = [key for key, _ in self.given() if key in self.exclusive] if self.exclusive else []
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one of them")
        return self

    @classmethod
    def __pydantic_init_subclass__(cls, **given: Any) -> None:
        """Raise `PolicyError` for a field or a class variable that could never work."""
        super().__pydantic_init_subclass__(**given)
        refuse_fields(cls, cls.model_fields)
        refuse_variables(cls)

    @classmethod
    def spellings(cls) -> Mapping[str, Part]:
        """Words that stand for instances of this class, besides its name."""
        return {}

    def __str__(self) -> str:
        """Write the part as text that parses back to an equal one; defaults are left out."""
        text = ",".join(f"{key}={word(value)}" for key, value in self.given())
        return f"{self.name}({text})" if text else self.name

    def given(self) -> Iterator[tuple[str, Any]]:
        """Yield the keys whose values differ from their defaults, in the order of the fields."""
        for key, described in type(self).model_fields.items():
            value = getattr(self, key)
            if described.is_required() or value != described.get_default(call_default_factory=True):
                yield key, value


def credited(part: Part, policy: Part) -> str:
    """Write a part of a policy for an error, with the distributions that the policy itself doesn't come from."""
    sources = dict.fromkeys(source_of(one) for one in (part, *inner_parts(part)))
    return f"{part}{' and'.join(source for source in sources if source not in ('', source_of(policy)))}"


def inner_parts(part: Part) -> Iterator[Part]:
    """Yield the parts that a part's fields hold, and those that they hold."""
    for key in type(part).model_fields:
        value = getattr(part, key)
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, Part):
                yield one
                yield from inner_parts(one)


class Where(Part):
    """Selects the targets of a policy in a model.

    >>> from cachekit import Kind, Site
    >>> class FirstBlock(Where):
    ...     name: ClassVar[str] = "first_block"
    ...     def find(self, sites: SiteMap) -> Sequence[Target]:
    ...         return sites.of(Kind.BLOCK)[:1]
    >>> FirstBlock().find(SiteMap("Toy", (Site("blocks.0", Kind.BLOCK), Site("blocks.1", Kind.BLOCK))))
    (Site(name='blocks.0', kind=<Kind.BLOCK: 'block'>, resizes=False),)
    """

    def find(self, sites: SiteMap) -> Sequence[Target]:
        """Choose the sites or regions to act on, once, in `apply`.

        Raises `SiteError` where the model has none of them; the error says what was looked for and what to use instead.
        """
        raise NotImplementedError

    def stays(self, layout: Layout) -> str:
        """Name the branch that runs on where guidance drops one: "cond" or "uncond"."""
        return "cond"


class Schedule(Part):
    """Decides in which steps a target is computed.

    The answer must depend on the moment's step, steps, origin, time and target alone, because it is also asked for
    plans and estimates. A whole schedule, which computes every second step:

    >>> class EverySecond(Schedule):
    ...     name: ClassVar[str] = "every_second"
    ...     def full(self, at: Moment) -> bool:
    ...         return (at.step - at.origin) % 2 == 0
    >>> [EverySecond().action(Moment(step, steps=4)).value for step in range(4)]
    ['store', 'reuse', 'store', 'reuse']
    """

    #: Whether a STORE must happen in its own step, so that blocks around the target run in full. Others are postponed
    #: to the next step that runs in full.
    insists: ClassVar[bool] = False

    def begin(self, run: Beginning, shared: dict[str, Any]) -> None:
        """Refuse a run with a `CachekitError` before anything is computed, where the schedule doesn't serve it."""

    def full(self, at: Moment) -> bool:
        """Whether the target is computed in this step."""
        raise NotImplementedError

    def action(self, at: Moment) -> Action | Open:
        """Decide what happens in a step: STORE in full ones, REUSE in the others.

        `OPEN` leaves it to the run: to `decide`, or to the signals of an `Indicator`. STOREs that no later REUSE reads
        are only computed.
        """
        full = self.full(at)
        if not isinstance(full, bool):
            raise TypeError(f"full returned {full!r}; return True or False")
        return Action.STORE if full else Action.REUSE

    def decide(self, at: Moment) -> Action:
        """Decide an open action at the beginning of a step, with the run's memory in `at.memory` and `at.shared`."""
        return Action.COMPUTE


class StandIn(Part):
    """Makes the output of a skipped target from those kept before.

    `predict` is a pure function of the history. Most stand-ins are weighted sums, for which `weights` is enough; one
    that repeats half of the last value and half of the one before:

    >>> class Average(StandIn):
    ...     name: ClassVar[str] = "average"
    ...     length: ClassVar[int | None] = 2
    ...     def weights(self, times: Sequence[Time], at: Moment) -> Sequence[float]:
    ...         return [1 / len(times)] * len(times)
    >>> Average().weights([Time(4), Time(2)], Moment(5, 25))
    [0.5, 0.5]
    """

    #: How many entries are read, None for all of the run. 0 keeps nothing.
    length: ClassVar[int | None] = 1
    #: Whether computed outputs are corrected by `amend`, which reads the history too.
    amends: ClassVar[bool] = False
    #: Whether what is kept is shown to `watch`; then nothing is left out that no later step reads.
    watches: ClassVar[bool] = False

    of: Quantity = "output"

    @property
    def reads(self) -> tuple[str, ...]:
        """The attributes of `Time` that are needed, for an error where a scheduler doesn't give them."""
        return ("kind", "sigma") if self.of == "x0" else ()

    def missing(self, times: Sequence[Time]) -> str:
        """Name the scheduler's values that are needed but missing at some of these times; "" if none are."""
        lacking = (name for name in self.reads if not times or any(_lacks(time, name) for time in times))
        return " and ".join(lacking)

    @property
    def entries(self) -> int | None:
        """How many entries this stand-in reads: `length`, unless a field decides."""
        return self.length

    def begin(self, run: Beginning, shared: dict[str, Any]) -> None:
        """Prepare for a run, or refuse it with a `CachekitError` before anything is computed.

        `shared` is what the other methods have as `Moment.shared`, except where costs are counted: there it is empty.
        """

    def weights(self, times: Sequence[Time], at: Moment) -> Sequence[float]:
        """Weigh the entries made at `times`, the newest first; the moment's `time` is what they are to predict."""
        raise NotImplementedError

    def predict(self, history: History, at: Moment, given: Streams = ()) -> Streams:
        """Make the tensors of a skipped target, like those of the newest entry in number, shape, dtype and device.

        `history` has at least one entry unless `length` is 0. `given` is, at guidance, the output of the branch that
        runs, and at the denoiser the sample; elsewhere it is empty. What is predicted is the output, or what `of`
        names.
        """
        read = history[: self.entries]
        return combine(read, self.weights([entry.at for entry in read], at))

    def amend(self, output: Streams, history: History, at: Moment, given: Streams = ()) -> Streams:
        """Correct a computed output of the denoiser, before it is kept and returned, if `amends` is set."""
        return output

    def watch(self, kept: Streams, history: History, at: Moment) -> None:
        """Look at what is about to be kept, and at what was kept before, if `watches` is set."""


def _lacks(time: Time, name: str) -> bool:
    """Whether a scheduler doesn't give a value, or one that is of no use; a log-SNR of 0 is one like others."""
    value = getattr(time, name)
    return value is None if name == "log_snr" else not value


def combine(history: History, weights: Sequence[float]) -> Streams:
    """Add up the tensors of a history, each entry times its weight; low precision is added up in float32.

    Entries with a weight of 0 are left out, and a single entry with a weight of 1 is returned as it is. Raises
    `ValueError` where there are not as many weights as entries.

        newer, older = history
        combine(history, [2.0, -1.0])  # a straight line through both, one step further
    """
    if len(weights) != len(history):
        raise ValueError(f"{len(weights)} weights for {len(history)} kept entries; give one for each")
    used = [(entry.tensors, weight) for entry, weight in zip(history, weights) if weight]
    if len(used) == 1 and used[0][1] == 1:
        return used[0][0]
    return tuple(
        _weighted([tensors[place] for tensors, _ in used], [weight for _, weight in used], like)
        for place, like in enumerate(history[0].tensors)
    )


def _weighted(tensors: Sequence[Any], weights: Sequence[float], like: Any) -> Any:
    if not tensors:
        return like * 0
    wide = [tensor.float() if tensor.element_size() < 4 else tensor for tensor in tensors]
    total = wide[0] * weights[0]
    for tensor, weight in zip(wide[1:], weights[1:]):
        total = total + tensor * weight
    return total.to(like.dtype)


@dataclass(frozen=True)
class Choice:
    """One place, one schedule and one stand-in, and what a change of branches does to what is kept.

    >>> from cachekit import Every, Linear, Span
    >>> choice = Choice(Span(first=1), Every(n=3), Linear(of="residual"), BranchChange.REFRESH)
    >>> str(choice.where), str(choice.when), str(choice.what)
    ('span(first=1)', 'every(n=3)', 'linear(of=residual)')
    """

    where: Where
    when: Schedule
    what: StandIn
    change: BranchChange = BranchChange.REMAINING

    def misfit(self) -> str:
        """Describe an attribute of the wrong type, and the remedy; "" if there is none."""
        for key, base in (("where", Where), ("when", Schedule), ("what", StandIn), ("change", BranchChange)):
            part = getattr(self, key)
            if isinstance(part, type):
                return f"has the class {part.__name__} as {key}; write {part.__name__}()"
            if not isinstance(part, base):
                return f"has {part!r} as {key}; give an instance of {base.__name__}"
        return ""

    def with_parts(self, **parts: Part) -> Choice:
        """Make a choice with some of its parts replaced."""
        return replace(self, **parts)  # type: ignore[arg-type]


def word(value: Any) -> str:
    """Write a value of a spec: a word, a number, a part, or a list with semicolons (";" where it is empty)."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, (tuple, list)):
        return ";".join(map(word, value)) or ";"
    return str(value.value if isinstance(value, Enum) else value)


def _reason(error: ValidationError) -> str:
    """Write the first reason of an error of pydantic, after the key and the value that are wrong.

    Where a key takes one of several types, the reasons of all of them are in the error.
    """
    first, *others = error.errors()
    key, given = _key(first["loc"]), first["input"]
    if first["type"] == "missing":
        return f"{key} is needed; give {key}=..."
    if isinstance(given, type):
        return f"{key} is the class {given.__name__}, not an instance; write {given.__name__}()"
    same = [other["msg"].removeprefix("Input should be ") for other in others if _key(other["loc"]) == key]
    message = ", or ".join([reason_of(first), *same])
    return f"{key}={repr(given)[1:-1] if isinstance(given, str) else given}: {message}" if key else message


def _key(loc: tuple[Any, ...]) -> str:
    """Write the place of an error without the names of a union's types, which follow the key."""
    return ".".join(str(part) for place, part in enumerate(loc) if place == 0 or isinstance(part, int))
