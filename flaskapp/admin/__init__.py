"""The operator's room: the dashboard and the admin API over the live settings."""

from flaskapp.admin.panel import Panel
from flaskapp.admin.views import make_admin
from flaskapp.lab.race_runner import RaceRunner

__all__ = ["Panel", "RaceRunner", "make_admin"]
