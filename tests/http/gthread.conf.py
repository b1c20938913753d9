"""Gunicorn with native threads: nothing is patched, as with `flask run`."""

from flaskapp.config import load_config

_config = load_config()
bind = [f"127.0.0.1:{_config.port}"]
workers = _config.web_concurrency
worker_class = "gthread"
threads = 100
errorlog = "-"


def post_worker_init(worker):
    worker.wsgi.extensions["tollgate"].start()
