# The service in a container: gunicorn on port 8000 as a user without rights. What it keeps is in /app/.data.
# Beside that only /tmp is written to; docs/SECURITY.md says how the image that it begins with is renewed.
FROM python:3.13.15-slim-trixie@sha256:7c61056e61ac89e852de05f3dc6fa51a6dd2181797bceed46aa725dd7cb2cd3b AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1
WORKDIR /build
COPY requirements.lock requirements-build.lock ./
RUN python -m venv /opt/tollgate \
    && /opt/tollgate/bin/pip install --no-deps --require-hashes --requirement requirements.lock \
    && python -m venv /opt/build \
    && /opt/build/bin/pip install --no-deps --require-hashes --requirement requirements-build.lock
COPY pyproject.toml README.md wsgi.py gunicorn.conf.py ./
COPY backends backends
COPY flaskapp flaskapp
RUN /opt/build/bin/python -m hatchling build --target wheel --directory /dist \
    && /opt/tollgate/bin/pip install --no-deps --no-index /dist/*.whl

FROM python:3.13.15-slim-trixie@sha256:7c61056e61ac89e852de05f3dc6fa51a6dd2181797bceed46aa725dd7cb2cd3b
RUN useradd --system --uid 10001 --user-group --no-create-home tollgate \
    && install --directory --owner tollgate --group tollgate /app /app/.data
ENV PATH=/opt/tollgate/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOST=0.0.0.0
COPY --from=builder /opt/tollgate /opt/tollgate
WORKDIR /app
COPY wsgi.py gunicorn.conf.py ./
USER 10001
VOLUME /app/.data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:%s/healthz' % (os.environ.get('PORT') or 8000), timeout=2)"]
CMD ["gunicorn", "--config", "gunicorn.conf.py", "wsgi:app"]
