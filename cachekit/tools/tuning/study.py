"""The study: trials of Optuna in a journal file, which several processes and machines may share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachekit.files import unwritable_reason
from cachekit.interface.presets import Figures
from cachekit.tools.tuning.candidates import Candidate
from cachekit.tools.tuning.targets import Targets, TuningError, similarity_of

__all__ = ["Journal", "Measured"]

_STUDY = "cachekit"
#: Attributes of a study and of a trial.
_KEY, _CANDIDATE, _FIGURES, _REASON, _HIGHER = "key", "candidate", "figures", "reason", "higher"
#: PSNR that counts for identical images, since objectives are finite.
_IDENTICAL = 100.0


@dataclass(frozen=True)
class Measured:
    """A candidate and its figures."""

    candidate: Candidate
    figures: Figures


class Journal:
    """The trials of a study: those of this process and of all others that write to its file."""

    def __init__(self, path: Path | None, key: Mapping[str, Any], targets: Targets, judged: bool, seed: int) -> None:
        """Open or begin a study; without a `path` in memory. `key` is what its figures are of.

        Raises `TuningError` where the file has a study of something else.
        """
        self._optuna = optuna = _imported()
        self._targets = targets
        self._judged = judged
        storage = _storage(optuna, path)
        directions = ["maximize", "minimize", *(["maximize"] if judged else [])]
        sampler = optuna.samplers.TPESampler(seed=seed + os.getpid() if path else seed, n_startup_trials=8)
        try:
            self.study = optuna.create_study(
                storage=storage, study_name=_STUDY, directions=directions, sampler=sampler, load_if_exists=True
            )
        except (ValueError, KeyError, OSError) as error:
            raise TuningError(
                f"journal {str(path)!r} is not a study of cachekit tune: {error}; name another"
            ) from error
        self._begun: list[Any] = []
        self._refuse_others(path, dict(key))

    def _refuse_others(self, path: Path | None, key: dict[str, Any]) -> None:
        if _KEY not in self.study.user_attrs:
            self.study.set_user_attr(_KEY, key)
            return
        there = self.study.user_attrs[_KEY]
        for name, value in key.items():
            if there.get(name) != value:
                what, held, given = _different(name, there.get(name), value)
                raise TuningError(f"journal {str(path)!r} has a study of {what} {held}, not {given}; name another")

    # -- trials -------------------------------------------------------------------------------------------

    def enqueue(self, ladder: Sequence[Mapping[str, Any]]) -> None:
        """Have a later trial try the first of these parameters, and hold the others for `climb`."""
        if ladder:
            first, *higher = map(dict, ladder)
            self.study.enqueue_trial(first, user_attrs={_HIGHER: higher}, skip_if_exists=True)

    def climb(self, trial: Any) -> None:
        """Have a later trial try the parameters that are next on the ladder of a trial."""
        self.enqueue(trial.user_attrs.get(_HIGHER, ()))

    @contextmanager
    def begun_again(self) -> Iterator[None]:
        """Have those trials begun in this block that an exception leaves unfinished tried later, with their ladders."""
        self._begun.clear()
        try:
            yield
        except BaseException:
            there = {one.number: one for one in self.study.get_trials(deepcopy=False)}
            for trial in self._begun:
                if not there[trial.number].state.is_finished():
                    self.study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
                    # What was queued, too, where the trial hadn't yet asked for all of it.
                    given = {**there[trial.number].system_attrs.get("fixed_params", {}), **trial.params}
                    self.study.enqueue_trial(given, user_attrs={_HIGHER: trial.user_attrs.get(_HIGHER, [])})
            raise

    @property
    def has_waiting(self) -> bool:
        """Whether any trial is to be tried later."""
        waiting = (self._optuna.trial.TrialState.WAITING,)
        return bool(self.study.get_trials(deepcopy=False, states=waiting))

    def ask(self) -> Any:
        """Begin a trial."""
        trial = self.study.ask()
        self._begun.append(trial)
        return trial

    def refuse(self, trial: Any, candidate: Candidate | None, reason: str) -> None:
        """End a trial of what can't be, or needn't be measured."""
        if candidate is not None:
            trial.set_user_attr(_CANDIDATE, _written(candidate))
        trial.set_user_attr(_REASON, reason)
        trial.set_constraint("refused", 1.0)
        self.study.tell(trial, state=self._optuna.trial.TrialState.PRUNED)

    def add(self, trial: Any, candidate: Candidate, figures: Figures) -> None:
        """End a trial with what was measured."""
        trial.set_user_attr(_CANDIDATE, _written(candidate))
        trial.set_user_attr(_FIGURES, figures.model_dump(mode="json"))
        for place, target in enumerate(self._targets.listed):
            trial.set_constraint(str(place), target.shortfall(figures))
        self.study.tell(trial, self._values(figures))

    def _values(self, figures: Figures) -> list[float]:
        saving = self._targets.saving(figures)
        similar = min(max(similarity_of(figures), 0.0), _IDENTICAL)
        return [similar, 1 / max(saving, 1e-6), *([figures.caption_match or 0.0] if self._judged else [])]

    # -- what is there ------------------------------------------------------------------------------------

    @property
    def measured(self) -> list[Measured]:
        """All that was measured, by any process, each candidate once, with the most images."""
        found: dict[Candidate, Figures] = {}
        for trial in self.study.get_trials(deepcopy=False):
            if _FIGURES in trial.user_attrs and trial.state.is_finished():
                candidate, figures = _read(trial.user_attrs[_CANDIDATE]), Figures(**trial.user_attrs[_FIGURES])
                if candidate not in found or found[candidate].images < figures.images:
                    found[candidate] = figures
        return [Measured(*one) for one in found.items()]

    @property
    def reasons(self) -> list[str]:
        """Why trials were refused, but for those of what was measured before."""
        measured = {one.candidate for one in self.measured}
        trials = [one for one in self.study.get_trials(deepcopy=False) if _REASON in one.user_attrs]
        found = {str(one.user_attrs[_REASON]): one.user_attrs.get(_CANDIDATE) for one in trials}
        return [reason for reason, written in found.items() if not (written and _read(written) in measured)]

    def front(self) -> list[Measured]:
        """Those measured that no other beats in similarity, cost and caption match, the cheapest first."""
        everything = self.measured
        found = [one for one in everything if not any(self.beats(other.figures, one.figures) for other in everything)]
        # Of equals, such as one step with whatever spacing, the first is shown.
        different = {tuple(self._values(one.figures)): one for one in reversed(found)}
        return sorted(different.values(), key=lambda one: -self._targets.saving(one.figures))

    def beats(self, one: Figures, other: Figures, margin: float = 0.0) -> bool:
        """Whether `one` is nowhere worse than `other` and somewhere better; by `margin` dB at least."""
        mine, theirs = self._values(one), self._values(other)
        signs = [1, -1, 1]
        gains = [sign * (a - b) for sign, a, b in zip(signs, mine, theirs)]
        gains[0] -= margin
        return all(gain >= 0 for gain in gains) and any(gain > 0 for gain in gains)


def _different(name: str, held: Any, given: Any) -> tuple[str, Any, Any]:
    """Name what differs, and both values: of lists the first entries that do."""
    if not (isinstance(held, list) and isinstance(given, list)):
        return name, held, given
    if len(held) != len(given):
        return f"another number of {name}:", len(held), len(given)
    pairs = enumerate(zip(held, given), 1)
    number, (one, other) = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
    return f"{name}, where number {number} is", repr(one), repr(other)


def _imported() -> Any:
    """Import Optuna, or raise `TuningError` with the command that installs it."""
    try:
        import optuna
    except ImportError as error:
        raise TuningError(f"tuning needs Optuna ({error}): pip install 'cachekit-diffusion[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _storage(optuna: Any, path: Path | None) -> Any:
    if path is None:
        return None
    journal = optuna.storages.journal
    if reason := unwritable_reason(path):
        raise TuningError(f"cannot write journal {str(path)!r}: {reason}")
    try:
        # A lock that is a file of its own works on network file systems too.
        return optuna.storages.JournalStorage(
            journal.JournalFileBackend(str(path), lock_obj=journal.JournalFileOpenLock(str(path)))
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TuningError(f"journal {str(path)!r} is not a study of cachekit tune: {error}; name another") from error


def _written(candidate: Candidate) -> dict[str, Any]:
    return {"specs": list(candidate.specs), "steps": candidate.steps, "spacing": candidate.spacing}


def _read(data: Mapping[str, Any]) -> Candidate:
    return Candidate(tuple(data["specs"]), data["steps"], data["spacing"])
