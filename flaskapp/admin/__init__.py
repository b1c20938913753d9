"""The dashboard and the admin API over the live settings."""

from flaskapp.admin.panel import Panel
from flaskapp.admin.views import make_admin

__all__ = ["Panel", "make_admin"]
