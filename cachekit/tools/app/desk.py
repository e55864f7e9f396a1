"""What happens in the app: every change and every click, as functions of plain values."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cachekit.errors import CachekitError
from cachekit.interface.parts import Part
from cachekit.interface.policy import Policy
from cachekit.registry.catalog import Catalog
from cachekit.tools.app import texts
from cachekit.tools.app.drafts import Draft, canonical, drafts_of, specs_of
from cachekit.tools.app.drawing import Comparison, Progress, Request, Studio
from cachekit.tools.app.form import OWN, Control, controls, edited, started
from cachekit.tools.app.preview import Defaults, Outline

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MOST", "Answer", "Desk"]

#: Most specs that are compared at once.
MOST = 4
#: Most models whose outlines are held.
_OUTLINES = 4
#: Pictures are shown at least this many pixels wide, in whole pixels of their own.
_SHOWN = 512

#: Pictures with captions, a table or an error as HTML, and the report.
Answer = tuple[list[tuple["Image", str]], str, str]
Drafts = tuple[Draft, ...]

_log = logging.getLogger(__name__)


class Desk:
    """Answers each event of the page. Errors become lines of the page."""

    def __init__(self, catalog: Catalog, studio: Studio) -> None:
        """Offer what `catalog` has, and draw with `studio`."""
        self._catalog = catalog
        self._studio = studio
        self.outline = functools.lru_cache(maxsize=_OUTLINES)(lambda model: Outline(model, catalog))

    # -- choosing -----------------------------------------------------------------------------------------

    def policies(self) -> list[tuple[str, str]]:
        """List what the menu of policies shows, and the name of each."""
        return [(f"{name}: {policy.summary}", name) for name, policy in sorted(self._catalog.policies.items())]

    def about(self, draft: Draft) -> str:
        """Describe a chosen policy in a line."""
        policy = self._catalog.policies[draft.name]
        return f"{policy.summary}{', ' * bool(policy.paper)}{policy.paper}"

    def described(self, model: str) -> tuple[str, Defaults | None]:
        """Describe a model as HTML, with how it is run; None where it can't be read."""
        try:
            outline = self.outline(model.strip())
            return texts.message(outline.title), outline.defaults
        except Exception as error:  # noqa: BLE001 - the page shows what a model raises
            return _failed(error), None

    def started(self, text: str) -> Drafts:
        """Parse the specs that the page begins with; raises a `CachekitError`."""
        return drafts_of(text, self._catalog)

    def chosen(self, names: Sequence[str], drafts: Drafts) -> Drafts:
        """Begin policies that have been added to the menu's choice, and drop those that have been taken out."""
        kept = [draft for draft in drafts if draft.name in names]
        present = {draft.name for draft in kept}
        return (*kept, *(started(name, Policy, self._catalog) for name in names if name not in present))

    def typed(self, text: str, drafts: Drafts) -> Drafts:
        """Parse specs that have been typed; the form stays as it is while they can't be parsed."""
        try:
            return drafts_of(text, self._catalog)
        except CachekitError:
            return drafts

    def controls(self, draft: Draft, base: type[Part]) -> list[Control]:
        """List the controls of a policy or part."""
        return controls(draft, base, self._catalog)

    def parts(self, control: Control) -> list[tuple[str, str]]:
        """List what the menu of a part shows, and the name of each."""
        left_out = [] if control.own is None else [(f"own: {control.own}" if control.own else "own", OWN)]
        # A default may be a part that no plugin registers.
        present = [] if control.text in (OWN, *control.words) else [(control.text, control.text)]
        return [*left_out, *present, *((name, name) for name in control.words)]

    def edited(self, drafts: Drafts, path: Sequence[str], value: str) -> Drafts:
        """Change a value of the form; the path is the number of a policy and the keys that lead to the value."""
        place, keys = int(path[0]), path[1:]
        if place >= len(drafts):  # the form has just been replaced
            return drafts
        changed = edited(drafts[place], Policy, keys, value, self._catalog)
        return (*drafts[:place], changed, *drafts[place + 1 :])

    def text(self, drafts: Drafts) -> str:
        """Write the specs of the form."""
        return canonical(drafts, self._catalog)

    # -- before a run -------------------------------------------------------------------------------------

    def preview(self, model: str, text: str, steps: int, guidance: float | None, guided: bool) -> tuple[str, str]:
        """Draw the plan and write the estimate, as HTML; where there is an error, that in place of the estimate."""
        try:
            specs = specs_of(text)
            if not specs:
                return "", texts.message("Choose a policy, or type a spec.")
            branches = guided and (guidance is None or guidance > 1)
            found = self.outline(model.strip()).preview(specs, int(steps), branches)
        except Exception as error:  # noqa: BLE001 - the page shows what a policy or a model raises
            return "", _failed(error)
        return texts.heat_map(found), texts.costs(found)

    def lines(self, request: Request, text: str) -> str:
        """Write the lines of Python that do what is chosen; empty while a spec can't be split."""
        try:
            return texts.python_lines(request, specs_of(text), *self._studio.loaded_with)
        except CachekitError:
            return ""

    # -- runs ---------------------------------------------------------------------------------------------

    def draw(self, request: Request, listed: Sequence[str], progress: Progress) -> Answer:
        """Draw each text of specs beside the uncached picture, at most `MOST`."""
        drawn: list[Comparison] = []
        try:
            if not listed or len(listed) > MOST:
                raise CachekitError(f"{len(listed)} specs: choose 1 to {MOST}")
            request = replace(request, model=request.model.strip())
            for text in listed:
                drawn.append(self._studio.draw(request, specs_of(text), progress))
        except Exception as error:  # noqa: BLE001 - the page shows what a policy or a pipeline raises
            return [], _failed(error), ""
        return _pictures(drawn), texts.comparison(drawn), "\n\n".join(str(one.cached.report) for one in drawn)


def _pictures(drawn: Sequence[Comparison]) -> list[tuple[Image, str]]:
    cached = [(_enlarged(one.cached.image), " + ".join(one.specs)) for one in drawn]
    return [(_enlarged(drawn[0].uncached.image), "uncached"), *cached]


def _enlarged(image: Image) -> Image:
    """Enlarge a small picture by a whole number, so that its own pixels can be seen."""
    factor = -(-_SHOWN // image.width)
    return image.resize((image.width * factor, image.height * factor), 0) if factor > 1 else image


def _failed(error: Exception) -> str:
    if not isinstance(error, CachekitError):
        _log.error("the app met an error", exc_info=error)
    return texts.problem(error)
