"""The page of the app: its layout, and which component's events go where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from cachekit.interface.parts import Part
from cachekit.interface.policy import Policy
from cachekit.models.names import DEMOS
from cachekit.tools.app.desk import MOST, Desk
from cachekit.tools.app.drafts import JOIN, Draft
from cachekit.tools.app.drawing import Progress, Request
from cachekit.tools.app.form import Control, Kind, number
from cachekit.tools.app.texts import message

__all__ = ["STYLE", "Page"]

#: Tables and plans scroll within their column, in the page's own colours.
STYLE = """
.wide { overflow-x: auto } .wide svg { display: block; max-width: none }
.wide table { border-collapse: collapse; width: 100% }
.wide th, .wide td { padding: .2em .6em; text-align: right; white-space: nowrap }
.wide th:first-child, .wide td:first-child { text-align: left; white-space: normal }
.problem { border-left: 4px solid #d55e00; padding-left: .6em; overflow-wrap: anywhere }
"""
_STEPS = 100
_QUIET = {"show_progress": "hidden", "trigger_mode": "always_last"}
#: Pictures are drawn one after the other, whoever asks for them.
_DRAWING = {"concurrency_id": "drawing", "concurrency_limit": 1}


class Page:
    """The components of the page, wired to a desk.

    Nothing is decided here: each event passes values to the desk, and shows what it returns.
    """

    def __init__(self, desk: Desk) -> None:
        """Show what `desk` offers."""
        self._desk = desk

    def build(self, model: str, specs: Sequence[str]) -> Any:
        """Build the page, which begins with a model and specs; raises a `CachekitError` where they can't be used."""
        drafts = self._desk.started(JOIN.join(specs))
        defaults = self._desk.outline(model).defaults
        with gr.Blocks(title="cachekit", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
            # Sessions begin with copies of these.
            self._drafts, self._shape = gr.State(drafts), gr.State(0)
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self._choose_run(model, defaults)
                    self._choose_policies(drafts)
                with gr.Column(scale=3, min_width=320):
                    self._show_preview()
                    self._show_pictures()
            self._show_comparison()
            self._listen(blocks)
        return blocks

    # -- layout -------------------------------------------------------------------------------------------

    def _choose_run(self, model: str, defaults: Any) -> None:
        listed = [*DEMOS] if model in DEMOS else [*DEMOS, model]
        label, info = "Pipeline", "embedded, a folder, or a hub id; an architecture such as sdxl for estimates alone"
        self._model = gr.Dropdown(listed, value=model, allow_custom_value=True, label=label, info=info, elem_id="model")
        self._note = gr.HTML(self._desk.described(model)[0], elem_id="note")
        self._prompt = gr.Textbox(defaults.prompt, label="Prompt", elem_id="prompt")
        with gr.Row():
            self._steps = gr.Slider(1, _STEPS, defaults.steps, step=1, label="Steps", elem_id="steps")
            self._seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
        with gr.Row():
            self._guidance = gr.Number(defaults.guidance, label="Guidance scale", elem_id="guidance")
            self._guided = gr.Checkbox(defaults.guided, label="two guidance branches", elem_id="guided")

    def _choose_policies(self, drafts: tuple[Draft, ...]) -> None:
        names = [draft.name for draft in drafts]
        self._menu = gr.Dropdown(
            self._desk.policies(), value=names, multiselect=True, label="Policies", elem_id="policies"
        )
        label, copied = "Spec", ["copy"]
        self._spec = gr.Textbox(self._desk.text(drafts), label=label, lines=2, buttons=copied, elem_id="spec")
        gr.render(inputs=[self._drafts], triggers=[self._shape.change])(self._show_form)
        with gr.Accordion("Python", open=False, elem_id="python"):
            self._lines = gr.Textbox(show_label=False, lines=8, buttons=copied, interactive=False, elem_id="lines")

    def _show_preview(self) -> None:
        self._costs = gr.HTML(elem_id="costs")
        self._plan = gr.HTML(elem_id="plan", max_height=420)

    def _show_pictures(self) -> None:
        self._draw = gr.Button("Draw", variant="primary", elem_id="draw")
        # Lossless, so that what is compared is what was drawn.
        self._slider = gr.ImageSlider(
            label="uncached | with policies", type="pil", format="png", interactive=False, elem_id="slider"
        )
        self._figures = gr.HTML(elem_id="figures")
        with gr.Accordion("Report", open=False):
            self._report = gr.Textbox(show_label=False, lines=6, interactive=False, elem_id="report")

    def _show_comparison(self) -> None:
        with gr.Accordion(f"Compare up to {MOST} specs", open=False, elem_id="comparison"):
            self._compared = gr.Dropdown(
                [], multiselect=True, allow_custom_value=True, max_choices=MOST, label="Specs", elem_id="compared"
            )
            with gr.Row():
                self._add = gr.Button("Add the spec above", elem_id="add")
                self._compare = gr.Button("Draw all", variant="primary", elem_id="compare")
            self._gallery = gr.Gallery(columns=MOST + 1, format="png", label="Pictures", elem_id="gallery")
            self._ranking = gr.HTML(elem_id="ranking")

    # -- the form of the chosen policies ------------------------------------------------------------------

    def _show_form(self, drafts: tuple[Draft, ...]) -> None:
        for place, draft in enumerate(drafts):
            with gr.Group():
                gr.HTML(message(f"{draft.name}: {self._desk.about(draft)}"), padding=True)
                self._show_controls((str(place),), draft, Policy)

    def _show_controls(self, path: tuple[str, ...], draft: Draft, base: type[Part]) -> None:
        for control in self._desk.controls(draft, base):
            here = (*path, control.key)
            label, name = ".".join(here[1:]), "-".join(("key", *here))
            {
                Kind.NUMBER: self._show_number,
                Kind.FLAG: self._show_flag,
                Kind.MENU: self._show_menu,
                Kind.TEXT: self._show_text,
                Kind.PART: self._show_part,
            }[control.kind](control, here, {"label": label, "elem_id": name, "interactive": True})
            if control.part and control.base:
                self._show_controls(here, control.part, control.base)

    def _show_number(self, control: Control, path: tuple[str, ...], shown: dict[str, Any]) -> None:
        if control.words:
            written = number(control.number)
            choices = [("a number", written), *((word, word) for word in control.words)]
            chosen = control.text if control.is_word else written
            menu = gr.Dropdown(choices, value=chosen, label=shown["label"], elem_id=f"{shown['elem_id']}-as")
            self._changes(menu, path, str, reshapes=True)
        if control.is_word:
            return
        if control.low is None:
            component = gr.Number(control.number, step=control.step or 0.1, **shown)
        else:
            component = gr.Slider(control.low, control.high, control.number, step=control.step, **shown)
        self._changes(component, path, lambda value: "" if value is None else number(value))

    def _show_flag(self, control: Control, path: tuple[str, ...], shown: dict[str, Any]) -> None:
        self._changes(gr.Checkbox(control.text == "true", **shown), path, lambda value: str(value).lower())

    def _show_menu(self, control: Control, path: tuple[str, ...], shown: dict[str, Any]) -> None:
        self._changes(gr.Dropdown([*control.words], value=control.text, **shown), path, str)

    def _show_text(self, control: Control, path: tuple[str, ...], shown: dict[str, Any]) -> None:
        hint = f"or {', '.join(control.words)}" if control.words else None
        self._changes(gr.Textbox(control.text, info=hint, **shown), path, str)

    def _show_part(self, control: Control, path: tuple[str, ...], shown: dict[str, Any]) -> None:
        names = self._desk.parts(control)
        self._changes(gr.Dropdown(names, value=control.text, **shown), path, str, reshapes=True)

    def _changes(
        self, component: Any, path: tuple[str, ...], write: Callable[[Any], str], reshapes: bool = False
    ) -> None:
        """Pass what the user changes in a component of the form to the desk; a new shape shows the form anew."""

        def changed(drafts: tuple[Draft, ...], shape: int, value: Any) -> tuple[Any, str, int]:
            found = self._desk.edited(drafts, path, write(value))
            return found, self._desk.text(found), shape + reshapes

        component.input(
            changed, [self._drafts, self._shape, component], [self._drafts, self._spec, self._shape], **_QUIET
        )

    # -- events -------------------------------------------------------------------------------------------

    def _listen(self, blocks: Any) -> None:
        self._listen_to_choices(blocks)
        previewed = [self._model, self._spec, self._steps, self._guidance, self._guided]
        changes = [component.change for component in previewed]
        gr.on([blocks.load, *changes], self._desk.preview, previewed, [self._plan, self._costs], **_QUIET)
        request = [self._model, self._prompt, self._steps, self._guidance, self._seed]
        written = [blocks.load, *(component.change for component in (*request, self._spec))]
        gr.on(written, self._written, [*request, self._spec], self._lines, **_QUIET)
        shown = [self._slider, self._figures, self._report]
        self._draw.click(_with_progress(self._drawn), [*request, self._spec], shown, **_DRAWING)
        self._add.click(_added, [self._compared, self._spec], self._compared)
        compared = [self._gallery, self._ranking]
        self._compare.click(_with_progress(self._ranked), [*request, self._compared], compared, **_DRAWING)

    def _listen_to_choices(self, blocks: Any) -> None:
        run = [self._note, self._steps, self._guidance, self._guided, self._prompt]
        self._model.input(self._described, [self._model, *run[1:]], run)
        form = [self._drafts, self._shape]
        self._menu.input(self._chosen, [self._menu, *form], [*form, self._spec], **_QUIET)
        self._spec.input(self._typed, [self._spec, *form], [*form, self._menu], **_QUIET)
        # The form is shown when its number of changes changes, which it also does when the page opens.
        blocks.load(lambda shape: shape + 1, self._shape, self._shape, **_QUIET)

    def _described(self, model: str, *present: Any) -> tuple[Any, ...]:
        note, defaults = self._desk.described(model)
        if defaults is None:
            return note, *present
        return note, defaults.steps, defaults.guidance, defaults.guided, defaults.prompt

    def _chosen(self, names: list[str], drafts: tuple[Draft, ...], shape: int) -> tuple[Any, int, str]:
        found = self._desk.chosen(names, drafts)
        return found, shape + 1, self._desk.text(found)

    def _typed(self, text: str, drafts: tuple[Draft, ...], shape: int) -> tuple[Any, int, list[str]]:
        found = self._desk.typed(text, drafts)
        return found, shape + (found != drafts), [draft.name for draft in found]

    def _written(self, *values: Any) -> str:
        *request, text = values
        return self._desk.lines(_request(*request), text)

    def _drawn(self, show: Progress, *values: Any) -> tuple[Any, str, str]:
        *request, text = values
        pictures, figures, report = self._desk.draw(_request(*request), [text], show)
        return tuple(picture for picture, _ in pictures) or None, figures, report

    def _ranked(self, show: Progress, *values: Any) -> tuple[Any, str]:
        *request, listed = values
        pictures, figures, _ = self._desk.draw(_request(*request), listed, show)
        return pictures, figures


def _request(model: str, prompt: str, steps: float, guidance: float | None, seed: float | None) -> Request:
    return Request(model, prompt, int(steps), guidance, int(seed or 0))


def _added(listed: list[str], text: str) -> list[str]:
    return [*listed, text][:MOST] if text and text not in listed else listed


def _with_progress(answer: Callable[..., Any]) -> Callable[..., Any]:
    """Give an answer a function that shows progress; gradio finds its own by the default of an argument."""

    def answered(*values: Any, progress: Any = gr.Progress()) -> Any:  # noqa: B008
        return answer(lambda name, done, total: progress((done, total), desc=name), *values)

    return answered
