"""The race lab: servers of its own, an upstream that bills, tables and a report. The race is `flaskapp.lab.race`."""
