"""What a worker of the service has loaded, in development mode: no lab, no conformance suite, no command."""

import requests

from tests.servers import ADMIN_TOKEN, Service

NOT_SERVED = (
    "backends.conformance",
    "flaskapp.lab",
    "flaskapp.cli.console",
    "flaskapp.cli.settings",
    "flaskapp.ops.embedded_redis",
)


class Telling(Service):
    application = "tests.http.loaded:app"

    def loaded(self):
        return set(self.get("/loaded").json())


def of(modules, packages):
    return sorted(name for name in modules if any(f"{name}.".startswith(f"{package}.") for package in packages))


def test_a_worker_loads_no_lab_until_its_page_is_asked_for(redis_of, tmp_path):
    environment = {"WEB_CONCURRENCY": "1", "ENABLE_COST_THROTTLING": "true", "DEMO_TOKENS_PER_SECOND": "0"}
    with Telling(tmp_path, redis_of("loaded").url, **environment) as service, requests.Session() as operator:
        assert service.chat().status_code == 200
        operator.post(f"{service.base_url}/admin/login", data={"token": ADMIN_TOKEN})
        page = operator.get(f"{service.base_url}/admin", timeout=30)
        assert 'href="/admin/race"' in page.text
        loaded = service.loaded()
        assert {"flaskapp.chat.routes", "flaskapp.admin.views", "backends.strategies.atomic"} <= loaded
        assert of(loaded, NOT_SERVED) == []
        assert operator.get(f"{service.base_url}/admin/race", timeout=30).status_code == 200
        # The race itself runs in a process of its own.
        assert of(service.loaded(), NOT_SERVED) == [
            "flaskapp.lab",
            "flaskapp.lab.page",
            "flaskapp.lab.race_runner",
        ]
