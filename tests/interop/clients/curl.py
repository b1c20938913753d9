"""curl, which may try again three times. Without a longest time it would wait for hours where it is asked to."""

import json
import subprocess
import sys

from conversation import serve


class HTTPError(Exception):
    """A status from 400 on."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status_code = status


def curl(question, **options):
    body = {"model": question.model, "messages": [question.asked], **options}
    command = [
        "curl",
        "--silent",
        "--no-buffer",
        "--retry",
        "3",
        "--retry-max-time",
        "30",
        "--write-out",
        "\n%{http_code}",
    ]
    command += ["--header", "Content-Type: application/json", "--header", f"Authorization: Bearer {question.key}"]
    url = f"{question.base_url}/chat/completions"
    done = subprocess.run([*command, "--data", json.dumps(body), url], capture_output=True, text=True, check=False)
    text, _, status = done.stdout.rpartition("\n")
    if int(status) >= 400:
        raise HTTPError(int(status), json.loads(text.splitlines()[-1])["error"]["message"])
    return text


def whole(question, pieces):
    answer = curl(question).splitlines()[-1]  # before it stand the refusals that it tried again after
    return json.loads(answer)["choices"][0]["message"]["content"]


def streamed(question, pieces):
    for line in curl(question, stream=True).splitlines():
        event = json.loads(line[6:]) if line.startswith("data: {") else {}
        if "error" in event:
            raise HTTPError(None, event["error"]["message"])
        pieces.extend(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
    return "".join(pieces)


if __name__ == "__main__":
    sys.exit(serve(whole=whole, streamed=streamed))
