"""The race on the dashboard: a page behind its log-in, in development mode only."""

from pathlib import Path

from flask import Response, current_app, request
from jinja2 import ChoiceLoader, PackageLoader, Template
from werkzeug.wrappers import Response as WsgiResponse

from flaskapp.admin.access import Access
from flaskapp.admin.panel import Panel
from flaskapp.admin.views import BehindLogIn, rendered
from flaskapp.http.refusals import INVALID_REQUEST, problem
from flaskapp.lab.race_runner import DEFAULTS, FIELDS, RaceRefused, RaceRuns, start_race


class RacePage(BehindLogIn):
    """The race, run and drawn; made by `flaskapp.admin` with the first request for it."""

    def __init__(self, panel: Panel, access: Access, data_dir: Path) -> None:
        super().__init__(panel, access)
        self._data_dir = data_dir

    def show(self) -> WsgiResponse:
        """``GET /admin/race``."""
        session = self.session()
        if session is None:
            return self.log_in_page()
        return rendered(
            _template("race.html"),
            200,
            has_script=True,
            panel=self.panel,
            csrf_token=session.csrf_token,
            fields=FIELDS,
            defaults=DEFAULTS,
        )

    def run(self) -> WsgiResponse:
        """``POST /admin/race/run``: lines of JSON as they come. The race ends when its reader leaves."""
        session = self.session()
        if session is None:
            return problem(401, "unauthorized", "session", "The session has ended. Load the page again.")
        if not self.access.is_same(request.form.get("csrf_token", ""), session):
            return problem(403, "unauthorized", "csrf_token", "This form is from another session. Load the page again.")
        try:
            running = start_race(self._data_dir, request.form)
        except RaceRefused as error:
            return problem(422, INVALID_REQUEST, str(error), f"Nothing was started. {error}.")
        except RaceRuns:
            return problem(409, "race_running", "running", "A race is running already. One at a time.")
        response = Response(running.lines(), mimetype="application/x-ndjson")
        # Not in the generator: one that is left before its first line never begins, and so never ends.
        response.call_on_close(running.close)
        return response


def _template(name: str) -> Template:
    """A template of the lab, which may extend the dashboard's."""
    environment = current_app.jinja_env
    loaders = [loader for loader in (PackageLoader("flaskapp.lab"), environment.loader) if loader is not None]
    return environment.overlay(loader=ChoiceLoader(loaders)).get_template(name)
