"""The samples in deploy/, run by the programs that they are for, where those are installed."""

import re
import shutil
import subprocess
import sys

import pytest
import requests

from flaskapp.config import load_config
from flaskapp.ops.embedded_redis import free_port
from flaskapp.ops.processes import end_process, guardian_of
from tests.servers import CHAT, LITECOIN, ROOT, Service, parse_events, wait_until

DEPLOY = ROOT / "deploy"
NGINX = (DEPLOY / "nginx.conf").read_text()
UNIT = (DEPLOY / "tollgate.service").read_text()
WRAPPER = """
daemon off;
master_process off;
pid {place}/nginx.pid;
error_log {place}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {place}/body;
    proxy_temp_path {place}/proxy;
    fastcgi_temp_path {place}/fastcgi;
    uwsgi_temp_path {place}/uwsgi;
    scgi_temp_path {place}/scgi;
    include {place}/site.conf;
}}
"""


@pytest.fixture
def service(tmp_path, redis_url):
    environment = {"TRUSTED_PROXY_HOPS": "1", "ENABLE_COST_THROTTLING": "true", "DEMO_TOKENS_PER_SECOND": "20"}
    with Service(tmp_path / "service", redis_url, **environment) as service:
        yield service


@pytest.fixture
def nginx(service, tmp_path):
    """nginx on a free port in front of `service`; its base URL, and a visitor who trusts its certificate."""
    if not (shutil.which("nginx") and shutil.which("openssl")):
        pytest.skip("needs nginx and openssl")
    names = [
        "-subj",
        "/CN=chat.example",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        tmp_path / "key.pem",
        "-out",
        tmp_path / "cert.pem",
    ]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *names], check=True, capture_output=True
    )
    port = free_port()
    site = NGINX.replace("listen 443 ssl", f"listen 127.0.0.1:{port} ssl").replace(":8000", f":{service.port}")
    site = re.sub(r"/etc/nginx/tls/\S+\.pem", f"{tmp_path}/cert.pem", site)
    site = re.sub(r"/etc/nginx/tls/\S+\.key", f"{tmp_path}/key.pem", site)
    (tmp_path / "site.conf").write_text(site)
    (tmp_path / "nginx.conf").write_text(WRAPPER.format(place=tmp_path))
    process = subprocess.Popen(["nginx", "-c", tmp_path / "nginx.conf", "-p", tmp_path])
    guardian = guardian_of(process.pid)
    base = f"https://127.0.0.1:{port}"
    try:
        with requests.Session() as visitor:
            visitor.trust_env = False  # the environment may name certificates of its own
            visitor.verify = str(tmp_path / "cert.pem")
            wait_until(lambda: process.poll() is not None or _answers(visitor, base), 10, "nginx answers")
            assert process.poll() is None, (tmp_path / "error.log").read_text()
            yield base, visitor
    finally:
        end_process(process, 5)
        guardian.kill()
        guardian.communicate()


def _answers(visitor, base):
    try:
        return visitor.get(f"{base}/healthz", timeout=2).status_code == 200
    except requests.RequestException:
        return False


def test_behind_nginx_an_answer_comes_in_pieces_and_is_charged_to_the_visitors_network(nginx, service):
    base, visitor = nginx
    headers = {"X-Forwarded-For": "203.0.113.9"}
    with visitor.post(base + CHAT, json=LITECOIN, headers=headers, stream=True, timeout=30) as answer:
        assert answer.status_code == 200
        parts = list(answer.iter_content(None))
    assert len(parts) > 5
    assert parse_events(b"".join(parts))[-1]["status"] == "complete"
    usage = visitor.get(f"{base}/api/v1/usage", timeout=30).json()
    assert usage["identifier"] == "ip:127.0.0.1"  # nginx' visitor, and not what it claims


@pytest.mark.parametrize("path", ["/metrics", "/admin", "/admin/race", "/api/v1/admin/settings"])
def test_what_is_the_operators_is_closed_to_visitors(nginx, path):
    base, visitor = nginx
    assert visitor.get(base + path, timeout=30).status_code == 403


def test_the_time_outs_fit_the_deadline_of_a_stream():
    deadline_seconds = load_config({}).stream_deadline_seconds
    found = re.findall(r"proxy_(?:read|send)_timeout (\d+)s", NGINX)
    assert len(found) == 2
    assert all(int(seconds) > deadline_seconds for seconds in found)


def test_systemd_gives_more_time_to_stop_than_gunicorn_takes():
    grace = re.search(r"graceful_timeout = \d+ if .+ else (\d+)", (ROOT / "gunicorn.conf.py").read_text())
    assert int(re.search(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)[1]) > int(grace[1])


def test_the_unit_runs_nothing_that_a_small_installation_has_not():
    programs = re.findall(r"^Exec\w+=(\S+)", UNIT, re.MULTILINE)
    assert programs == ["/opt/tollgate/bin/llm-tollgate", "/bin/sh"]


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    unit = tmp_path / "tollgate.service"
    unit.write_text(UNIT.replace("/opt/tollgate/bin/llm-tollgate", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    about_it = [line for line in done.stderr.splitlines() if "tollgate.service" in line]
    assert about_it == []
    unit.write_text(UNIT.replace("KillMode=mixed", "KillMode=maybe"))
    broken = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    assert "Failed to parse kill mode" in broken.stderr
