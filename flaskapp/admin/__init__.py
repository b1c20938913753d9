"""The operator's room: the dashboard and the admin API over the live settings."""

from flaskapp.admin.panel import Panel
from flaskapp.admin.race_desk import RaceDesk
from flaskapp.admin.views import make_admin

__all__ = ["Panel", "RaceDesk", "make_admin"]
