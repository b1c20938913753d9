"""Three of the clients of the matrix, in each case of it: two whose retries obey us, and one that has its own.

The rest of them runs with ``python -m tests.interop``.
"""

import pytest

from tests.docs.pages import ROOT, rows
from tests.interop.__main__ import main
from tests.interop.environments import NotInstalled, node_environment, python_environment
from tests.interop.matrix import CASES, CLIENTS, Front, Process, run

HERE = ("openai-python", "openai-node", "ai-sdk")


@pytest.fixture(scope="module")
def front():
    with Front() as front:
        yield front


@pytest.fixture(scope="module", params=HERE)
def process(request, front):
    client = CLIENTS[request.param]
    try:
        command = client.command(request.param)
    except NotInstalled as error:
        pytest.skip(f"{request.param} cannot be installed here: {error}")
    with Process(command, front.service.directory / f"{request.param}.log", front.service.base_url) as process:
        yield client, process


@pytest.mark.timeout(1_000)  # a registry that hangs is given up before, and the client skipped
@pytest.mark.parametrize("case", CASES, ids=[case.title for case in CASES])
def test_a_client_and_only_its_base_url_and_key(front, process, case):
    cell, is_right = run(case, *process, front)
    assert is_right, cell


def test_the_page_has_the_clients_of_the_matrix():
    listed = [cells[0].replace("`", "").split("<br>") for cells in rows(ROOT / "docs" / "CLIENTS.md", "client")]
    assert listed == [[*client.requirements, *filter(None, [client.setting])] for client in CLIENTS.values()]


def test_what_cannot_be_installed_is_said_in_a_line(monkeypatch, tmp_path):
    monkeypatch.setattr("tests.interop.environments.ENVIRONMENTS", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(NotInstalled, match=r"No matching distribution found for openai==3\.57\.0"):
        python_environment("openai-python", ("openai==3.57.0",))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotInstalled, match="no node on PATH"):
        node_environment("openai-node", ("openai@7.59.0",))


def test_a_name_that_there_is_not(capsys):
    with pytest.raises(SystemExit):
        main(["no-such-client"])
    assert "no such client: no-such-client; there are openai-python, " in capsys.readouterr().err
