"""Gunicorn with native threads: nothing is patched, as with `flask run`."""

import threading
import time

from flaskapp.config import load_config

_config = load_config()
bind = [f"127.0.0.1:{_config.port}"]
workers = _config.web_concurrency
worker_class = "gthread"
threads = 100
errorlog = "-"
GRACE_SECONDS = 1


def post_worker_init(worker):
    tollgate = worker.wsgi.extensions["tollgate"]
    tollgate.start()
    threading.Thread(target=_end_answers_in_time, args=(worker, tollgate.answers), daemon=True).start()


def _end_answers_in_time(worker, answers):
    """As in `gunicorn.conf.py`, which cannot be read here: it patches everything."""
    while worker.alive:
        time.sleep(0.1)
    time.sleep(GRACE_SECONDS)
    answers.stop()
