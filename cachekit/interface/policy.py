"""What a caching policy defines: its settings, and its choices of where, when and what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cachekit.errors import PolicyError, SpecError, answered, attributed
from cachekit.interface.parts import Choice, Part, Schedule, StandIn, Where, word

if TYPE_CHECKING:
    from cachekit.interface.observation import Observation

#: The keys by which a spec replaces the parts of a policy.
PARTS = ("where", "when", "what")


class Policy(Part):
    """Base of all policies: subclass it, set `name` and `summary`, add fields, write `choices`.

    A whole policy, which computes self-attention every second step and reuses it in between:

    >>> from cachekit import Choice, Every, Reuse, Sites
    >>> class EverySecond(Policy):
    ...     name: ClassVar[str] = "every_second"
    ...     first: int = 1
    ...     def choices(self) -> Mapping[str, Choice]:
    ...         return {"attention": Choice(Sites(kinds="self_attention"), Every(n=2, first=self.first), Reuse())}
    >>> str(EverySecond(first=4))
    'every_second:first=4'

    The fields are the keys of the spec; pydantic checks their values. Instances are frozen, so that runs and threads
    can share them: what changes during a run belongs in the moment's `memory`, which lives as long as the run.

    `where`, `when` and `what` replace the parts of a policy that has one choice; by default they are None.
    """

    #: Whether several policies of this name can be applied together.
    repeats: ClassVar[bool] = False

    where: Where | None = None
    when: Schedule | None = None
    what: StandIn | None = None

    def choices(self) -> Mapping[str, Choice]:
        """Name the policy's choices: what each is for, for listings, and the choice."""
        raise NotImplementedError

    def chosen(self) -> Mapping[str, Choice]:
        """Make the choices, with the parts that the spec replaces.

        Raises `SpecError` where a part is given for a policy with several choices, and `PolicyError` where `choices`
        raises, or returns what can't be used.
        """
        choices = self._checked_choices()
        given = {key: getattr(self, key) for key in PARTS if getattr(self, key) is not None}
        if not given:
            return choices
        if len(choices) > 1:
            raise SpecError(
                f"spec {str(self)!r}: {self.name} has {len(choices)} choices ({', '.join(choices)}), so"
                f" {next(iter(given))}= could mean any of them; leave it out"
            )
        return {name: choice.with_parts(**given) for name, choice in choices.items()}

    def _checked_choices(self) -> Mapping[str, Choice]:
        try:
            choices = answered(lambda: f"{attributed(self)}: choices", self.choices)
        except SpecError as error:  # of a part, which has no part in the spec
            raise SpecError(f"{attributed(self)}: choices: {error}") from error
        if not isinstance(choices, Mapping) or not (choices or self.observes):
            raise PolicyError(f"{attributed(self)}: choices returned {choices!r}; return at least one Choice, by name")
        for name, choice in choices.items():
            reason = choice.misfit() if isinstance(choice, Choice) else f"is {choice!r}; make it a Choice"
            if reason:
                raise PolicyError(f"{attributed(self)}: the choice {name!r} {reason}")
        return choices

    @property
    def observes(self) -> bool:
        """Whether `observe` is called; override it if the policy's fields can make that unnecessary."""
        return type(self).observe is not Policy.observe

    def observe(self, seen: Observation, memory: dict[str, Any]) -> None:
        """Look at the outputs of the branches after a call of the denoiser, for later steps' `Schedule.decide`.

        `memory` is what the policy's schedules have as `Moment.shared`.
        """

    @property
    def caution(self) -> str:
        """A warning about these settings, for the report of a run; "" if there is none."""
        return ""

    # -- text ---------------------------------------------------------------------------------------------

    def given(self) -> Iterator[tuple[str, Any]]:
        """Yield the keys whose values differ from their defaults: the policy's own, then replaced parts."""
        given = dict(super().given())
        yield from ((key, value) for key, value in given.items() if key not in PARTS)
        yield from ((key, value) for key, value in given.items() if key in PARTS)

    def __str__(self) -> str:
        """Write the policy as a spec that parses back to an equal one; defaults are left out."""
        text = ",".join(f"{key}={word(value)}" for key, value in self.given())
        return f"{self.name}:{text}" if text else self.name
