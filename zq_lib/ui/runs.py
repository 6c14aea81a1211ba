"""The running computation of every visitor: started by one button, ended by another, and never mixed up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import gradio as gr

from zq_lib.ui.serve import ONE_AT_A_TIME, readable

QUEUED = "Waiting for a free place."


class Runs:
    """One run per visitor. `stopped` and `refused` are what the page says after Stop, and after a clear error.

    Gradio's own `cancels` leaves the event pending for a moment, in which a new click is lost, and then shows an error;
    here the run ends itself at its next look. It takes a ticket before it is queued, so that Stop and a new click also
    reach a run that still waits.
    """

    def __init__(self, stopped: str, refused: str = "Nothing was run.") -> None:
        self.stopped, self.refused = stopped, refused
        self._tickets: dict[str, list[str]] = {}

    def begin(self, request: gr.Request) -> tuple[list[str], str]:
        """End the visitor's run, if there is one; a ticket that stays empty until the new one has to end, and words."""
        self.end(request)
        self._tickets[str(request.session_hash)] = ticket = []
        return ticket, QUEUED

    def stop(self, request: gr.Request) -> None:
        """End the visitor's run and say so."""
        self.end(request, self.stopped)

    def end(self, request: gr.Request, say: str = "") -> None:
        """End the visitor's run, if there is one; without words when the page shows something else by now."""
        self._tickets.pop(str(request.session_hash), []).append(say)

    def follow(self, ticket: list[str], outputs: int, pages: Iterator[Sequence[Any]]) -> Iterator[Sequence[Any]]:
        """Pass on the pages of a run, of `outputs` values each with the state's words first, until its ticket ends it.

        An empty page is only an occasion to stop. Errors become a message, and the state says that nothing was run.
        """
        others = [gr.skip()] * (outputs - 1)
        try:
            with readable(), closing(pages):
                for page in pages:
                    if ticket:
                        if ticket[0]:
                            yield [ticket[0], *others]
                        return
                    if page:
                        yield page
        except gr.Error:
            yield [self.refused, *others]
            raise

    def connect(
        self, triggers: Any, stop: gr.Button, run: Any, inputs: Sequence[Any], outputs: Sequence[Any], **how: Any
    ) -> None:
        """Tie `run(ticket, *inputs)` to the `triggers` of a click or a slider, and the Stop button to its end.

        `outputs` begins with the note that tells the state.
        """
        ticket = gr.State(None)
        how = {"trigger_mode": "multiple", **how}
        quick: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        gr.on(triggers, self.begin, None, [ticket, outputs[0]], **how, **quick).then(
            run, [ticket, *inputs], list(outputs), show_progress_on=outputs[0], api_visibility="private",
            trigger_mode="multiple", **ONE_AT_A_TIME,
        )  # fmt: skip
        stop.click(self.stop, None, None, **quick)
