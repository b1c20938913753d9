"""The service: all that knows HTTP. The application is made in `flaskapp.factory`."""
