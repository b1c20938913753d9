"""Does what the Dockerfile says in directories instead of containers, where there is root and no Docker engine.

    python3 scripts/try_dockerfile.py BASE [--copy FILE]...

BASE is what `debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm BASE` made. It is
copied for each stage and not changed. `--copy` takes a file of this machine along, such as pip's configuration. At the
end the command of the image runs as its user until its health check holds. It is no gate: it takes minutes.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEALTHY_SECONDS = 60
USUAL_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Stage:
    """One stage of the Dockerfile, as a directory to change the root to."""

    def __init__(self, base: Path, place: Path, taken: list[Path]) -> None:
        self.place, self.folder, self.user = place, "/", "0"
        self.environment = {"PATH": USUAL_PATH, **{name: text for name, text in os.environ.items() if "PIP_" in name}}
        subprocess.run(["cp", "-a", str(base), str(place)], check=True)
        (place / "usr/bin/python").symlink_to("python3")
        for file in (Path("/etc/resolv.conf"), *taken):
            target = place / file.relative_to("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)

    def inside(self, path: str) -> Path:
        return self.place / str(Path(self.folder) / path).lstrip("/")

    def command(self, *words: str) -> list[str]:
        enter = ["/usr/sbin/chroot", f"--userspec={self.user}:{self.user}", str(self.place)]
        return [*enter, "/bin/sh", "-c", f'cd {self.folder} && exec "$0" "$@"', *words]

    def do(self, name: str, rest: str, stages: dict[str, "Stage"]) -> None:
        if name == "ENV":
            words = [word.partition("=") for word in shlex.split(rest)]
            self.environment |= {key: re.sub(r"\$PATH", self.environment["PATH"], text) for key, _, text in words}
        elif name == "WORKDIR":
            self.folder = rest
            self.inside("").mkdir(parents=True, exist_ok=True)
        elif name == "USER":
            self.user = rest
        elif name == "RUN":
            subprocess.run(self.command("/bin/sh", "-ec", rest), env=self.environment, check=True)
        elif name == "COPY":
            *sources, target = [word for word in rest.split() if not word.startswith("--")]
            source_stage = re.match(r"--from=(\S+)", rest)
            origin = stages[source_stage[1]].place if source_stage else ROOT
            for source in sources:
                there = origin / source.lstrip("/")
                to = self.inside(target)
                if there.is_dir():
                    shutil.copytree(there, to, symlinks=True, dirs_exist_ok=True)
                else:
                    shutil.copy(there, to)


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("--copy", type=Path, action="append", default=[])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tollgate-image-") as folder:
        stages: dict[str, Stage] = {}
        healthy: list[str] = []
        for name, rest in instructions():
            print(f"{name} {rest[:100]}", flush=True)
            if name == "FROM":
                stage = Stage(given.base, Path(folder) / str(len(stages)), given.copy)
                stages[rest.rpartition(" AS ")[2]] = stage
            elif name == "HEALTHCHECK":
                healthy = json.loads(rest.partition("CMD ")[2])
            elif name == "CMD":
                serve(stage, json.loads(rest), healthy)
            else:
                stage.do(name, rest, stages)


def serve(stage: Stage, words: list[str], healthy: list[str]) -> None:
    """Run the command of the image, until its health check holds or it took too long."""
    environment = {**stage.environment, "REDIS_URL": "redis://127.0.0.1:1/0", "PORT": os.environ.get("PORT", "8000")}
    server = subprocess.Popen(stage.command(*words), env=environment)
    try:
        end = time.monotonic() + HEALTHY_SECONDS
        while subprocess.run(
            stage.command(*healthy), env=environment, check=False, stderr=subprocess.DEVNULL
        ).returncode:
            if server.poll() is not None or time.monotonic() > end:
                sys.exit("The image does not become healthy.")
            time.sleep(0.5)
        print(f"Healthy, as user {stage.user}.")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
