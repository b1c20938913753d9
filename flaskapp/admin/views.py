"""Routes of the dashboard and of the admin API. All of them answer 401 without the operator's token or session."""

import secrets
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, make_response, redirect, render_template, request, url_for
from jinja2 import Template
from werkzeug.utils import import_string
from werkzeug.wrappers import Response as WsgiResponse

from flaskapp.admin.access import SESSION_SECONDS, Access, Session
from flaskapp.admin.panel import (
    Panel,
    Row,
    RowsRejected,
    SettingsRejected,
    StaleDraft,
    StoreError,
    StrictJsonError,
)
from flaskapp.admin.tables import TABLES, Draft, blank, without_blanks
from flaskapp.http.refusals import INVALID_REQUEST, THROTTLE_UNAVAILABLE, problem

COOKIE = "tollgate_admin"
MOST_BYTES, MOST_LOG_IN_BYTES = 262_144, 4_096
"""Of a body."""
_STALE = (
    "Nothing was changed: {} has changed since this page was made. Below is what was typed; save again to put it in "
    "place of the list that holds now."
)
_REDIS_SILENT = "Redis could not be asked, so the change may or may not be there: look again when Redis is back."


def make_admin(panel: Panel, admin_token: str | None, race_dir: Path | None = None) -> Blueprint:
    """The blueprint ``admin``.

    Args:
        panel: the settings.
        admin_token: without one, all routes answer 401.
        race_dir: where the race of the lab keeps its lock; None for no such page.
    """
    blueprint = Blueprint("admin", __name__, template_folder="templates")
    access = Access(admin_token, panel.now_seconds)
    api, dashboard = _Api(panel, access), _Dashboard(panel, access, has_race=race_dir is not None)
    blueprint.add_url_rule("/api/v1/admin/settings", "api_show", api.show, methods=["GET"])
    blueprint.add_url_rule("/api/v1/admin/settings", "api_change", api.change, methods=["PATCH"])
    blueprint.add_url_rule("/admin", "dashboard", dashboard.show, methods=["GET"])
    blueprint.add_url_rule("/admin/login", "login", dashboard.log_in, methods=["POST"])
    blueprint.add_url_rule("/admin/logout", "logout", dashboard.log_out, methods=["POST"])
    blueprint.add_url_rule("/admin/settings", "change", dashboard.change, methods=["POST"])
    lists = f"/admin/settings/<any({', '.join(TABLES)}):name>"
    blueprint.add_url_rule(lists, "change_list", dashboard.change_list, methods=["POST"])
    if race_dir is not None:
        _add_race(blueprint, panel, access, race_dir)
    blueprint.before_request(_bound_body)
    blueprint.after_request(_never_store)
    return blueprint


def _bound_body() -> None:
    request.max_content_length = MOST_LOG_IN_BYTES if request.endpoint == "admin.login" else MOST_BYTES


def _add_race(blueprint: Blueprint, panel: Panel, access: Access, race_dir: Path) -> None:
    """The lab's page, which is imported with the first request for it."""

    @cache
    def page() -> Any:  # flaskapp.lab.page.RacePage, which is not imported here
        return import_string("flaskapp.lab.page.RacePage")(panel, access, race_dir)

    blueprint.add_url_rule("/admin/race", "race", lambda: page().show(), methods=["GET"])
    blueprint.add_url_rule("/admin/race/run", "race_run", lambda: page().run(), methods=["POST"])


class _Api:
    """Settings as JSON, behind the bearer token."""

    def __init__(self, panel: Panel, access: Access) -> None:
        self._panel = panel
        self._access = access

    def show(self) -> WsgiResponse:
        if not self._access.knows_bearer(request.headers.get("Authorization", "")):
            return self._stranger()
        return Response(self._panel.as_json(), mimetype="application/json")

    def change(self) -> WsgiResponse:
        if not self._access.knows_bearer(request.headers.get("Authorization", "")):
            return self._stranger()
        if request.mimetype not in {"application/json", "application/merge-patch+json"}:
            return problem(
                415, INVALID_REQUEST, "Content-Type: has to be application/json", "This route takes application/json."
            )
        try:
            self._panel.change_json(request.get_data())
        except (StrictJsonError, SettingsRejected, StoreError) as error:
            return _refused(error)
        return Response(self._panel.as_json(), mimetype="application/json")

    @staticmethod
    def _stranger() -> WsgiResponse:
        message = "This needs the header Authorization: Bearer <ADMIN_TOKEN>."
        return problem(401, "unauthorized", "token", message, headers={"WWW-Authenticate": 'Bearer realm="admin"'})


class BehindLogIn:
    """A page for those who logged in."""

    def __init__(self, panel: Panel, access: Access) -> None:
        self.panel = panel
        self.access = access

    def session(self) -> Session | None:
        """The session of the present request, unless it was ended."""
        session = self.access.session(request.cookies.get(COOKIE))
        return None if session is None or self.panel.has_ended(session.session_id) else session

    def log_in_page(self, error: str = "") -> Response:
        """The page for those without a session: status 401."""
        page = rendered("admin/login.html", 401, error=error, is_configured=self.access.is_configured)
        page.headers["WWW-Authenticate"] = 'Bearer realm="admin"'
        return page


class _Dashboard(BehindLogIn):
    """The settings as a page."""

    def __init__(self, panel: Panel, access: Access, *, has_race: bool) -> None:
        super().__init__(panel, access)
        self._has_race = has_race

    def show(self) -> WsgiResponse:
        session = self.session()
        if session is None:
            return self.log_in_page()
        changed = [self.panel.row(name) for name in request.args.get("changed", "").split(",")]
        return self._page(session, changed=[row for row in changed if row is not None])

    def log_in(self) -> WsgiResponse:
        # No CSRF token here: there is one account only, so logging another person in gains nothing.
        if not self.access.knows(request.form.get("token", "").encode()) or not self.access.is_configured:
            return self.log_in_page(error="That is not the token.")
        response = redirect(url_for("admin.dashboard"), 303)
        response.set_cookie(COOKIE, self.access.new_cookie(), max_age=SESSION_SECONDS, **_cookie_attributes())
        return response

    def log_out(self) -> WsgiResponse:
        session = self.session()
        if session is None or not self.access.is_same(request.form.get("csrf_token", ""), session):
            return self.log_in_page(error="The session has ended.")
        response: WsgiResponse = redirect(url_for("admin.dashboard"), 303)
        try:
            self.panel.end_session(session.session_id, SESSION_SECONDS)
        except StoreError:
            response = self.log_in_page(error="Logged out here; Redis is away, so a copy of the cookie stays good.")
        response.delete_cookie(COOKIE, **_cookie_attributes())
        return response

    def change(self) -> WsgiResponse:
        session = self._session_of_form()
        if not isinstance(session, Session):
            return session
        texts = _texts(request.form.to_dict(), request.form.getlist("unset"))
        try:
            self.panel.change_texts(texts)
        except SettingsRejected as error:
            typed = {name: text for name, text in texts.items() if text is not None}
            return self._page(
                session, 422, error=f"Nothing was changed. {error}.", typed=typed, problems=error.problems
            )
        except StoreError:
            return self._page(session, 503, error=_REDIS_SILENT)
        return self._changed(*texts)

    def change_list(self, name: str) -> WsgiResponse:
        """Save the rows of a list, or show one more or one less of them, which saves nothing."""
        session = self._session_of_form()
        if not isinstance(session, Session):
            return session
        draft = _draft(name)
        if draft is None:
            return self._page(session, 422, error="This form is none of ours; nothing was changed.")
        if "add" in request.form or "remove" in request.form:
            return self._page(session, draft=draft)
        return self._saved(session, replace(draft, rows=without_blanks(name, draft.rows)))

    def _saved(self, session: Session, draft: Draft) -> WsgiResponse:
        try:
            self.panel.change_rows(draft)
        except RowsRejected as error:
            draft = replace(draft, problems={problem.row: problem for problem in error.rows})
            return self._page(
                session, 422, error=f"Nothing was changed. {error}.", problems=error.problems, draft=draft
            )
        except SettingsRejected as error:
            return self._page(session, 422, error=f"Nothing was changed. {error}.", draft=draft)
        except StaleDraft as error:
            return self._page(session, 409, error=_STALE.format(draft.name), draft=replace(draft, seen=error.seen))
        except StoreError:
            return self._page(session, 503, error=_REDIS_SILENT, draft=draft)
        return self._changed(draft.name)

    def _session_of_form(self) -> Session | Response:
        """The session that a form was made for, or the page that says why nothing was changed."""
        session = self.session()
        if session is None:
            return self.log_in_page(error="The session has ended; nothing was changed.")
        if not self.access.is_same(request.form.get("csrf_token", ""), session):
            return self._page(session, 403, error="This form is from another session; nothing was changed. Try again.")
        return session

    @staticmethod
    def _changed(*names: str) -> WsgiResponse:
        return redirect(url_for("admin.dashboard", changed=",".join(names), _anchor=next(iter(names), None)), 303)

    def _page(
        self,
        session: Session,
        status: int = 200,
        *,
        error: str = "",
        changed: list[Row] | None = None,
        typed: Mapping[str, str] | None = None,
        problems: Mapping[str, str] | None = None,
        draft: Draft | None = None,
    ) -> Response:
        groups = self.panel.groups(typed or {}, problems or {}, draft)
        return rendered(
            "admin/dashboard.html",
            status,
            panel=self.panel,
            groups=groups,
            csrf_token=session.csrf_token,
            has_race=self._has_race,
            error=error,
            changed=changed or [],
        )


def _refused(error: Exception) -> Response:
    if isinstance(error, StrictJsonError):
        return problem(400, INVALID_REQUEST, f"body: {error}", f"The body cannot be used: {error}.")
    if isinstance(error, SettingsRejected):
        fields = dict(error.problems)
        return problem(422, INVALID_REQUEST, str(error), f"Nothing was changed. {error}.", extra={"fields": fields})
    return problem(503, THROTTLE_UNAVAILABLE, "store", _REDIS_SILENT, retry_after_seconds=1)


def _texts(form: Mapping[str, str], unset: list[str]) -> dict[str, str | None]:
    """What to change: a field that is named by an `unset` button goes back, whatever stands in it."""
    texts: dict[str, str | None] = {name: text for name, text in form.items() if name not in {"csrf_token", "unset"}}
    return {**texts, **dict.fromkeys(unset)}


def _draft(name: str) -> Draft | None:
    """The rows of the form in hand, without the one that is to be removed; None for a form that is none of ours."""
    columns = blank(name)
    cells = [request.form.getlist(column) for column in columns]
    if len({len(column) for column in cells}) > 1:
        return None
    rows = [dict(zip(columns, texts, strict=True)) for texts in zip(*cells, strict=True)]
    if "add" in request.form:
        rows.append(dict(blank(name)))
    removed = request.form.get("remove", "")
    kept = [texts for number, texts in enumerate(rows, 1) if str(number) != removed]
    return Draft(name, kept, request.form.get("seen", ""))


def _cookie_attributes() -> dict[str, Any]:
    # Behind a proxy the browser alone says how its page came.
    secure = request.is_secure or request.headers.get("Origin", "").startswith("https://")
    return {"path": url_for("admin.dashboard"), "httponly": True, "samesite": "Strict", "secure": secure}


def rendered(template: str | Template, status: int, *, has_script: bool = False, **values: object) -> Response:
    """A page with its Content-Security-Policy; with `has_script` it may run its own script and ask this service."""
    nonce = secrets.token_urlsafe(16)
    response = make_response(render_template(template, nonce=nonce, **values), status)
    scripts = f"script-src 'nonce-{nonce}'; connect-src 'self'; " if has_script else ""
    response.headers["Content-Security-Policy"] = (
        f"default-src 'none'; {scripts}style-src 'nonce-{nonce}'; img-src data:; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    )
    response.headers["X-Frame-Options"] = "DENY"
    response.headers["Referrer-Policy"] = "same-origin"
    return response


def _never_store(response: Response) -> Response:
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response
